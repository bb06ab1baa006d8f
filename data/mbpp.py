"""MBPP (Austin et al. 2021, CC BY 4.0): recognised by its columns, split by `task_id`."""

from collections.abc import Iterable, Mapping
from typing import Any

from data.records import Document
from data.tabular import Row
from data.templates import mbpp_document
from shared.errors import ConfigError

NAME = "mbpp"
HUB_ID = "google-research-datasets/mbpp"
LICENCE = "CC-BY-4.0"
ATTRIBUTION = (
    "MBPP by J. Austin, A. Odena, M. Nye et al., Google Research: Program Synthesis with Large Language Models, 2021, "
    "arXiv:2108.07732, https://github.com/google-research/google-research/tree/master/mbpp"
)
SPLITS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


def is_mbpp(fields: Mapping[str, Any]) -> bool:
    """Whether a row has MBPP's columns, full or sanitized."""
    return {"task_id", "code", "test_list"} <= fields.keys()


def read_split(rows: Iterable[Row], split: str) -> list[Document]:
    """The documents of one split, in the rows' order; every row is checked, of whatever split.

    Raises:
        ConfigError: a malformed row, a `task_id` twice or outside MBPP, or a split without rows.
    """
    seen: dict[int, str] = {}
    found: dict[str, list[Document]] = {}
    for row in rows:
        document, task_id = mbpp_document(row), row.integer("task_id")
        if task_id in seen:
            raise row.error("task_id", expected="each id once", got=f"{task_id}, as {seen[task_id]}")
        seen[task_id] = row.where
        home = next((name for name, ids in SPLITS.items() if task_id in ids), None)
        if home is None:
            raise row.error("task_id", expected="1 to 974", got=task_id)
        found.setdefault(home, []).append(document)
    if split not in found:
        available = ", ".join(name for name in SPLITS if name in found) or "none"
        raise ConfigError("no rows in the split", where="MBPP", expected=f"one of: {available}", got=repr(split))
    return found[split]
