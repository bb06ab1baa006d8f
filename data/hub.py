"""The Hub: the commit that a name stands for, model snapshots, and rows of data sets, pinned to that commit."""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data import mbpp
from data.tabular import Row
from shared.errors import ConfigError

LOOKUP_SECONDS = 5.0
# Top-level files only: safetensors, configuration, tokenizer, model card. Never code, never pickles.
_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]


def read_hub(hub_id: str, split: str, revision: str | None = None) -> tuple[str, str | None, Iterator[Row]]:
    """The commit (40 digits), the licence its card states, and the rows of one split.

    Offline (`HF_HUB_OFFLINE=1`) these are the rows prepared last, and the commit is theirs.

    Args:
        hub_id: `owner/name`.
        split: as the data set names it.
        revision: branch, tag or commit; the main branch by default.

    Raises:
        ConfigError: the Hub cannot be reached, or has no such data set, revision or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("Hub data sets need a package", got=error, fix="pip install datasets") from error
    configuration = "full" if hub_id == mbpp.HUB_ID else None
    commit = find_commit(hub_id, "dataset", revision)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(hub_id, configuration, split=split, revision=commit)
    except Exception as error:  # the library raises many unrelated types
        raise explain(error, f"{hub_id}, split {split!r}") from error
    found = _prepared_commit(rows)
    if commit not in (None, found):
        raise ConfigError("another commit of the data set was read", where=hub_id, expected=commit, got=found)
    if commit is None and revision is not None and revision != found:
        raise ConfigError(
            "the local Hub cache holds another commit",
            where=hub_id,
            expected=revision,
            got=found,
            fix="fetch it once without HF_HUB_OFFLINE=1",
        )
    return found, _licence(hub_id, found), (Row(f"{hub_id}, row {i}", row) for i, row in enumerate(rows, start=1))


def find_commit(hub_id: str, repo_type: str, revision: str | None = None) -> str | None:
    """The commit that a name stands for now; None in offline mode, where the local cache knows.

    One request without retries: a Hub that is not there is known at once.

    Args:
        hub_id: `owner/name`.
        repo_type: `model` or `dataset`.
        revision: branch, tag or commit; the main branch by default.

    Raises:
        ConfigError: the Hub cannot be reached, or has no such repository or revision.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().repo_info(hub_id, repo_type=repo_type, revision=revision, timeout=LOOKUP_SECONDS).sha
    except Exception as error:  # transport errors have another base class in each version
        raise explain(error, hub_id) from error


def fetch_model(hub_id: str, revision: str | None = None) -> tuple[Path, str]:
    """A local snapshot of a model and its commit; offline, the snapshot fetched before.

    Raises:
        ConfigError: the Hub cannot be reached, or has no such model or revision.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    find_commit(hub_id, "model", revision)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        snapshot = snapshot_download(hub_id, revision=revision, allow_patterns=_MODEL_FILES, ignore_patterns=["*/*"])
    except Exception as error:  # transport errors have another base class in each version
        raise explain(error, hub_id) from error
    return Path(snapshot), Path(snapshot).name  # …/snapshots/<commit>, whatever the revision was called


def explain(error: Exception, where: str) -> ConfigError:
    """What the Hub's or its clients' error means, in one line."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 9:
        chain.append(cause)

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if constants.HF_HUB_OFFLINE:
        fix = "fetch it once without HF_HUB_OFFLINE=1, check the name, or name local files"
        return ConfigError("not in the local Hub cache (HF_HUB_OFFLINE=1)", where=where, got=_short(error), fix=fix)
    if has(errors.GatedRepoError) or "is a gated dataset" in str(error):  # `datasets` drops the cause
        fix = f"ask for access at {constants.ENDPOINT}, then `hf auth login` or HF_TOKEN"
        return ConfigError("access to a gated repository is not granted", where=where, fix=fix)
    if has(errors.RevisionNotFoundError):
        return ConfigError("the Hub has no such revision", where=where, fix="name a branch, a tag or a commit")
    if has(errors.RepositoryNotFoundError, errors.HFValidationError):
        fix = "check the name; for a private one `hf auth login` or HF_TOKEN"
        return ConfigError("the Hub has no such repository", where=where, got=_short(error), fix=fix)
    if any("Connect" in type(link).__name__ or "Timeout" in type(link).__name__ for link in chain):
        fix = "HF_HUB_OFFLINE=1 if it was fetched before, HF_ENDPOINT for a mirror, or name local files"
        got = f"no answer from {constants.ENDPOINT} ({_short(error)})"
        return ConfigError("the Hub cannot be reached", where=where, got=got, fix=fix)
    return ConfigError("cannot load from the Hub", where=where, got=_short(error), fix="check the name and the split")


def _short(error: Exception) -> str:
    """The error's type and first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _prepared_commit(rows: Any) -> str:
    """The commit that rows were prepared from: `datasets` names their folder after it."""
    folders = [Path(file["filename"]).parent.name for file in rows.cache_files]
    if not folders or not re.fullmatch(r"[0-9a-f]{40}", folders[0]):
        raise ConfigError("cannot tell the commit of a data set", expected="a folder named after it", got=folders[:1])
    return folders[0]


def _licence(hub_id: str, commit: str) -> str | None:
    """The licence that the card states; None where there is no card or it says nothing."""
    from huggingface_hub import DatasetCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        card = hf_hub_download(hub_id, "README.md", repo_type="dataset", revision=commit)
    except EntryNotFoundError:
        return None
    return stated_licence(read_card(DatasetCard, Path(card)))


def read_card(card_class: Any, card: Path) -> dict[str, Any]:
    """A card's front matter; empty where there is none, or it is not YAML."""
    import yaml

    try:
        front_matter: dict[str, Any] = card_class.load(card).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return {}
    return front_matter


def stated_licence(front_matter: Mapping[str, Any]) -> str | None:
    """The licence, or all of several; None where the card says nothing."""
    licence = front_matter.get("license")
    return " AND ".join(licence) if isinstance(licence, list) else licence
