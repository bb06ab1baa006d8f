"""Data sets on the Hub, pinned to the commit that their name stands for."""

import os
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tabular import Row, Table
from shared.errors import ConfigError, require
from shared.hub import explain, find_commit, read_card, stated_license


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSplit:
    """One split of a data set on the Hub."""

    commit: str  # 40 digits
    config: str
    license: str | None  # as its card states; None where it states none
    table: Table


def open_hub(
    hub_id: str,
    split: str,
    revision: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    *,
    offline: bool = False,
) -> HubSplit:
    """Open one split: fetched and mapped into memory, or streamed where only its first rows are wanted.

    Offline (`HF_HUB_OFFLINE=1`) these are the rows prepared last, and the commit is theirs; nothing is streamed.

    Args:
        revision: branch, tag or commit; the main branch by default.
        config: one of its configurations; by default the only one, or the one that its card says is the default.
        limit: no more rows than that will be read; nothing of them is kept on the disk.
        offline: as `HF_HUB_OFFLINE=1`, for this data set; refused at once where nothing of it was prepared.

    Raises:
        ConfigError: the Hub cannot be reached, has no such data set, revision, configuration or split; several
            configurations and none is named; or the split has no rows.
    """
    prepared = hub_id.replace("/", "___")
    is_there = not offline or (_datasets_folder() / prepared).is_dir()
    require(is_there, "the data set is not at hand", where=hub_id, fix="read it once while the Hub can be reached")
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("Hub data sets need a package", got=error, fix="pip install datasets") from error
    commit = None if offline else find_commit(hub_id, "dataset", revision)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        streaming = commit is not None and limit is not None
        local = {"download_config": datasets.DownloadConfig(local_files_only=True)} if offline else {}
        rows = datasets.load_dataset(hub_id, config, split=split, revision=commit, streaming=streaming, **local)
        # Streamed rows of JSONL: their columns are known once one is read.
        names = tuple(rows.column_names or next(iter(rows), ()))
    except Exception as error:  # the library raises many unrelated types
        where = ", ".join([hub_id, *([f"configuration {config!r}"] if config else []), f"split {split!r}"])
        raise (commit and _explain_config(hub_id, commit, config)) or explain(error, where) from error
    if not streaming:
        asked, commit = commit or revision, _prepared_commit(rows)
        fix = "fetch it once without HF_HUB_OFFLINE=1"
        require(asked in (None, commit), "the local Hub cache holds another commit", where=hub_id, expected=asked,
                got=commit, fix=fix)  # fmt: skip
    assert commit is not None
    is_empty = not names if streaming else len(rows) == 0
    require(not is_empty, "an empty data set", where=f"{hub_id}, split {split!r}", expected="at least one row")

    def read(columns: Collection[str]) -> Iterator[Row]:
        chosen = rows.select_columns([name for name in names if name in columns])
        return (Row(f"{hub_id}, row {number}", row) for number, row in enumerate(chosen, start=1))

    return HubSplit(
        commit=commit,
        config=rows.config_name,
        license=_license(hub_id, commit),
        table=Table(hub_id, names, read, lambda limit: limit if streaming else min(len(rows), limit or len(rows))),
    )


def _datasets_folder() -> Path:
    """Where `datasets` keeps what it prepared, without importing it."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets")).expanduser()


def _explain_config(hub_id: str, commit: str, config: str | None) -> ConfigError | None:
    """The error for a configuration that is missing or unknown, with the names; None where that is not the matter."""
    import datasets

    try:
        names = datasets.get_dataset_config_names(hub_id, revision=commit)
    except Exception:  # whatever hid the rows hides the names
        return None
    if config in names or (config is None and len(names) < 2):
        return None
    what = "the data set has several configurations" if config is None else "the data set has no such configuration"
    fix = "--dataset-config NAME, or owner/name:NAME"
    return ConfigError(what, where=hub_id, expected=f"one of: {', '.join(names)}", got=config, fix=fix)


def _prepared_commit(rows: Any) -> str:
    """The commit that rows were prepared from: `datasets` names their folder after it."""
    folders = [Path(file["filename"]).parent.name for file in rows.cache_files]
    is_commit = folders and re.fullmatch(r"[0-9a-f]{40}", folders[0])
    expected = "a folder named after it"
    require(is_commit, "cannot tell the commit of a data set", expected=expected, got=folders[:1])
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
