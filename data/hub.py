"""Data sets on the Hub, pinned to the commit that their name stands for."""

import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from data.tabular import Row, Table
from shared.errors import ConfigError, require
from shared.hub import explain, find_commit, read_card, stated_license

CONFIGURATIONS = {"google-research-datasets/mbpp": "full"}  # of data sets with several; others have one


def open_hub(hub_id: str, split: str, revision: str | None = None) -> tuple[str, str | None, Table]:
    """The commit (40 digits), the license its card states, and one split.

    Offline (`HF_HUB_OFFLINE=1`) these are the rows prepared last, and the commit is theirs.

    Args:
        hub_id: `owner/name`.
        split: as the data set names it.
        revision: branch, tag or commit; the main branch by default.

    Raises:
        ConfigError: the Hub cannot be reached, has no such data set, revision or split, or the split has no rows.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("Hub data sets need a package", got=error, fix="pip install datasets") from error
    commit = find_commit(hub_id, "dataset", revision)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(hub_id, CONFIGURATIONS.get(hub_id), split=split, revision=commit)
    except Exception as error:  # the library raises many unrelated types
        raise explain(error, f"{hub_id}, split {split!r}") from error
    prepared = _prepared_commit(rows)
    require(
        commit in (None, prepared),
        "another commit of the data set was read",
        where=hub_id,
        expected=commit,
        got=prepared,
    )
    require(
        commit is not None or revision in (None, prepared),
        "the local Hub cache holds another commit",
        where=hub_id,
        expected=revision,
        got=prepared,
        fix="fetch it once without HF_HUB_OFFLINE=1",
    )
    require(len(rows), "an empty data set", where=f"{hub_id}, split {split!r}", expected="at least one row")

    def read(columns: Collection[str]) -> Iterator[Row]:
        chosen = rows.select_columns([name for name in rows.column_names if name in columns])
        return (Row(f"{hub_id}, row {number}", row) for number, row in enumerate(chosen, start=1))

    return prepared, _license(hub_id, prepared), Table(hub_id, tuple(rows.column_names), read)


def _prepared_commit(rows: Any) -> str:
    """The commit that rows were prepared from: `datasets` names their folder after it."""
    folders = [Path(file["filename"]).parent.name for file in rows.cache_files]
    require(
        folders and re.fullmatch(r"[0-9a-f]{40}", folders[0]),
        "cannot tell the commit of a data set",
        expected="a folder named after it",
        got=folders[:1],
    )
    return folders[0]


def _license(hub_id: str, commit: str) -> str | None:
    """The license that the card states; None where there is no card or it states none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        card = hf_hub_download(hub_id, "README.md", repo_type="dataset", revision=commit)
    except EntryNotFoundError:
        return None
    return stated_license(read_card(Path(card)))
