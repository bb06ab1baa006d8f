"""The Hub: commits that names stand for, model snapshots, cards, and uploads of students and caches."""

import contextlib
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shared.errors import ConfigError, require
from shared.progress import progress

LOOKUP_SECONDS = 5.0
COMMIT_FILES = 500  # of one commit to a data set
# Top-level files only: safetensors, configuration, tokenizer, model card. Never code, never pickles.
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]
_WANTED: dict[str, Any] = {"allow_patterns": MODEL_FILES, "ignore_patterns": ["*/*"]}


def find_commit(hub_id: str, repo_type: str, revision: str | None = None) -> str | None:
    """The commit that a name stands for now; None in offline mode, where the local cache knows.

    Sends one request without retries, so that an absent Hub is reported at once.

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

    A commit (40 digits) is never another one: where its snapshot is whole, nothing is sent.

    Raises:
        ConfigError: the Hub cannot be reached, or has no such model or revision.
    """
    from huggingface_hub import snapshot_download

    if revision and (kept := _kept_snapshot(hub_id, revision)):
        return kept, revision
    find_commit(hub_id, "model", revision)
    _quiet_unless_terminal()
    try:
        snapshot = snapshot_download(hub_id, revision=revision, **_WANTED)
    except Exception as error:  # transport errors have another base class in each version
        raise explain(error, hub_id) from error
    return Path(snapshot), Path(snapshot).name  # …/snapshots/<commit>, whatever the revision was called


def _kept_snapshot(hub_id: str, commit: str) -> Path | None:
    """A commit's snapshot that was fetched before and is whole by the client's listing of the repository."""
    from huggingface_hub import errors, snapshot_download

    try:
        from huggingface_hub import get_cached_repo_tree
    except ImportError:  # older clients keep no listing
        return None
    if not re.fullmatch("[0-9a-f]{40}", commit):
        return None
    with contextlib.suppress(errors.CachedRepoTreeNotFoundError, errors.LocalEntryNotFoundError):
        get_cached_repo_tree(hub_id, revision=commit)
        return Path(snapshot_download(hub_id, revision=commit, local_files_only=True, **_WANTED))
    return None


def require_repository(repo_id: str) -> None:
    """Refuse an upload that cannot succeed before anything is exported; sends no request.

    Raises:
        ConfigError: the id is not `owner/name`, the Hub is switched off, or there is no token.
    """
    from huggingface_hub import constants, errors, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise errors.HFValidationError("no owner is named")
    except errors.HFValidationError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError("not the id of a repository", where=repo_id, expected="OWNER/NAME", got=reason) from error
    is_on, fix = not constants.HF_HUB_OFFLINE, "`hf auth login` with a token that may write, or HF_TOKEN"
    require(is_on, "the Hub is switched off (HF_HUB_OFFLINE=1)", where=repo_id, fix="unset HF_HUB_OFFLINE")
    require(get_token() is not None, "there is no token for the Hub", where=constants.ENDPOINT, fix=fix)


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload an exported student; creates the repository where there is none.

    Args:
        folder: as `export` wrote it; only `MODEL_FILES` leave it.
        repo_id: `owner/name`.
        private: create a private repository; an existing one must be private.

    Returns:
        Its URL.

    Raises:
        ConfigError: the Hub cannot be reached or refuses, or the repository is public though `private` was asked for.
    """
    from huggingface_hub import HfApi

    _quiet_unless_terminal()
    hub = HfApi()
    try:
        url = hub.create_repo(repo_id, private=private or None, exist_ok=True)
        is_public = private and not hub.repo_info(repo_id).private
        if not is_public:
            message = "Upload a student made by codedistill"
            hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, **_WANTED)
    except Exception as error:  # transport errors have another base class in each version
        raise _explain_push(error, repo_id, f"then `hf upload {repo_id} {folder}`: the export is whole") from error
    fix = f"make it private there, then `hf upload {repo_id} {folder}`; or name another"
    require(not is_public, "the repository is there already and is public", where=url, fix=fix)
    return str(url)


def open_dataset(repo_id: str, branch: str | None, *, private: bool) -> str:
    """Create a data set, and a branch of it, where there is none.

    Returns:
        The commit at the head of the branch.

    Raises:
        ConfigError: the Hub cannot be reached or refuses, or the data set is public though `private` was asked for.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        url = hub.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True)
        if branch:
            hub.create_branch(repo_id, branch=branch, repo_type="dataset", exist_ok=True)
        info = hub.repo_info(repo_id, repo_type="dataset", revision=branch)
    except Exception as error:  # transport errors have another base class in each version
        raise _explain_push(error, repo_id, "run the command again: it continues") from error
    is_public = private and not info.private
    require(not is_public, "the data set is there already and is public", where=url, fix="name another")
    return str(info.sha)


def listed_digests(repo_id: str, commit: str) -> dict[str, str]:
    """What the Hub lists of a data set's files: SHA-256 of a large one, git's id of a small one, by name."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        listed = list(HfApi().list_repo_tree(repo_id, repo_type="dataset", revision=commit, recursive=True))
    except Exception as error:  # transport errors have another base class in each version
        raise explain(error, repo_id) from error
    files = [entry for entry in listed if isinstance(entry, RepoFile)]
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def push_files(
    repo_id: str,
    branch: str | None,
    head: str,
    files: Mapping[str, tuple[Path, str]],
    *,
    last: Mapping[str, bytes | Path],
    stale: Iterable[str],
) -> str:
    """Commit files to a data set; the Hub takes no file twice, so a kill loses little.

    Args:
        repo_id: `owner/name`.
        branch: which branch; the main one by default.
        head: the commit that the branch is at; each commit is refused where another process has moved it.
        files: path and SHA-256 by name; the client hashes none of them again.
        last: what the last commit adds.
        stale: names of files that the last commit removes.

    Returns:
        The last commit.

    Raises:
        ConfigError: the Hub cannot be reached or refuses, or another process has changed the branch.
    """
    from huggingface_hub import CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi

    _quiet_unless_terminal()
    hub, names = HfApi(), list(files)
    steps = [names[at : at + COMMIT_FILES] for at in range(0, len(names), COMMIT_FILES)] or [[]]
    message = "Upload a logit cache made by codedistill"
    try:
        with progress("push", len(names), "files") as bar:
            for step in steps:
                operations: list[CommitOperation] = []
                for name in step:
                    file, digest = files[name]
                    addition = CommitOperationAdd(name, file)
                    addition.upload_info.sha256 = bytes.fromhex(digest)
                    operations.append(addition)
                if step is steps[-1]:
                    operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
                    operations += [CommitOperationAdd(name, content) for name, content in last.items()]
                commit = hub.create_commit(
                    repo_id,
                    operations,
                    commit_message=message,
                    repo_type="dataset",
                    revision=branch,
                    num_threads=8,
                    parent_commit=head,
                )
                head = str(commit.oid)
                bar.advance(len(step))
    except Exception as error:  # transport errors have another base class in each version
        raise _explain_push(error, repo_id, "run the command again: it continues") from error
    return head


def explain(error: Exception, where: str) -> ConfigError:
    """What an error of the Hub or its clients means for somebody who reads from it, in one line."""
    from huggingface_hub import constants, errors

    chain, got = _chain(error), _short(error)

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if constants.HF_HUB_OFFLINE:
        fix = "fetch it once without HF_HUB_OFFLINE=1, check the name, or name local files"
        return ConfigError("not in the local Hub cache (HF_HUB_OFFLINE=1)", where=where, got=got, fix=fix)
    if has(errors.GatedRepoError) or "is a gated dataset" in str(error):  # `datasets` drops the cause
        fix = f"ask for access at {constants.ENDPOINT}, then `hf auth login` or HF_TOKEN"
        return ConfigError("access to a gated repository is not granted", where=where, fix=fix)
    if has(errors.RevisionNotFoundError):
        return ConfigError("the Hub has no such revision", where=where, fix="name a branch, a tag or a commit")
    if has(errors.RepositoryNotFoundError, errors.HFValidationError):
        fix = "check the name; for a private one `hf auth login` or HF_TOKEN"
        return ConfigError("the Hub has no such repository", where=where, got=got, fix=fix)
    if _is_unreachable(chain):
        fix = "check the path of local files; HF_HUB_OFFLINE=1 if it was fetched before, HF_ENDPOINT for a mirror"
        got = f"no answer from {constants.ENDPOINT} ({got})"
        return ConfigError("the Hub cannot be reached", where=where, got=got, fix=fix)
    return ConfigError("cannot load from the Hub", where=where, got=got, fix="check the name and the split")


def _explain_push(error: Exception, repo_id: str, again: str) -> ConfigError:
    """What an error means for an upload, in one line; what is uploaded stays here too."""
    from huggingface_hub import constants

    chain, got = _chain(error), _short(error)
    statuses = [getattr(getattr(link, "response", None), "status_code", None) for link in chain]
    if any(status in (401, 403) for status in statuses):
        fix = f"`hf auth login` with a token that may write to {repo_id.partition('/')[0]}, {again}"
        return ConfigError("the Hub refuses this token", where=repo_id, got=got, fix=fix)
    if 412 in statuses:
        return ConfigError("another process has changed the repository meanwhile", where=repo_id, got=got, fix=again)
    if _is_unreachable(chain):
        return ConfigError("the Hub cannot be reached", where=constants.ENDPOINT, got=got, fix=f"try later, {again}")
    return ConfigError("the Hub does not accept the upload", where=repo_id, got=got, fix=f"resolve that, {again}")


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 9:
        chain.append(cause)
    return chain


def _is_unreachable(chain: list[BaseException]) -> bool:
    return any(word in type(link).__name__ for link in chain for word in ("Connect", "Timeout", "Network"))


def _short(error: Exception) -> str:
    """The error's type and first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _quiet_unless_terminal() -> None:
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def read_card(card: Path) -> dict[str, Any]:
    """The front matter of a model's or data set's card; empty where there is none, or it is not YAML."""
    import yaml
    from huggingface_hub import RepoCard

    try:
        front_matter: dict[str, Any] = RepoCard.load(card).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return {}
    return front_matter


def stated_license(front_matter: Mapping[str, Any]) -> str | None:
    """The license that a card states, or all of several; None where it states none."""
    license = front_matter.get("license")
    return " AND ".join(license) if isinstance(license, list) else license
