"""Rows of a Hub data set, pinned to the commit that was read."""

from collections.abc import Iterator

from data import mbpp
from data.tabular import Row
from shared.errors import ConfigError


def read_hub(hub_id: str, split: str) -> tuple[str, str | None, Iterator[Row]]:
    """The commit (40 digits), the licence its card states, and the rows of one split.

    Raises:
        ConfigError: the Hub cannot be reached, or has no such data set or split.
    """
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError("Hub data sets need a package", got=error, fix="pip install datasets") from error
    configuration = "full" if hub_id == mbpp.HUB_ID else None
    try:
        info = HfApi().dataset_info(hub_id)
        rows = datasets.load_dataset(hub_id, configuration, split=split, revision=info.sha)
    except Exception as error:  # the two libraries raise many unrelated types, network ones included
        raise ConfigError(
            "cannot load a Hub data set",
            where=f"{hub_id}, split {split!r}",
            got=f"{type(error).__name__}: {error}",
            fix="check the name and the network, or give a local FILE.jsonl or FILE.parquet",
        ) from error
    licence = info.card_data.get("license") if info.card_data else None
    if isinstance(licence, list):
        licence = " AND ".join(licence)
    assert info.sha is not None
    return info.sha, licence, (Row(f"{hub_id}, row {i}", row) for i, row in enumerate(rows, start=1))
