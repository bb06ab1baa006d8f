"""An exported student on the Hub: its weights, configuration, tokenizer and card; nothing else leaves the folder."""

import re
import sys
from pathlib import Path

from shared.errors import ConfigError

# What `AutoModelForCausalLM` and `AutoTokenizer` read. Never pickles.
FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]


def require_repository(repo_id: str) -> None:
    """Refuse what no push can work with before anything is exported; asks nobody.

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
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("the Hub is switched off (HF_HUB_OFFLINE=1)", where=repo_id, fix="unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise ConfigError(
            "there is no token for the Hub",
            where=constants.ENDPOINT,
            fix="`hf auth login` with a token that may write, or HF_TOKEN",
        )


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload an exported student, into a repository that is made where there is none.

    Args:
        folder: as `export` wrote it.
        repo_id: `owner/name`.
        private: make the repository private; one that is there already must be.

    Returns:
        Its URL.

    Raises:
        ConfigError: the Hub cannot be reached or refuses, or the repository is public though `private` was asked for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    hub = HfApi()
    try:
        url = hub.create_repo(repo_id, private=private or None, exist_ok=True)
        is_public = private and not hub.repo_info(repo_id).private
        if not is_public:
            hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=FILES,
                ignore_patterns=["*/*"],
                commit_message="Upload a student made by codedistill",
            )
    except Exception as error:  # transport errors have another base class in each version
        raise _explain(error, folder, repo_id) from error
    if is_public:
        raise ConfigError(
            "the repository is there already and is public",
            where=url,
            fix=f"make it private there, then `hf upload {repo_id} {folder}`; or name another",
        )
    return str(url)


def _explain(error: Exception, folder: Path, repo_id: str) -> ConfigError:
    """What an error of the client means, in one line; the export stays."""
    from huggingface_hub import constants

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 9:
        chain.append(cause)
    statuses = [getattr(getattr(link, "response", None), "status_code", None) for link in chain]
    again = f"then `hf upload {repo_id} {folder}`: the export is whole"
    got = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if any(status in (401, 403) for status in statuses):
        return ConfigError(
            "the Hub refuses this token",
            where=repo_id,
            got=got,
            fix=f"`hf auth login` with a token that may write to {repo_id.partition('/')[0]}, {again}",
        )
    if any(re.search("Connect|Timeout|Network", type(link).__name__) for link in chain):
        return ConfigError("the Hub cannot be reached", where=constants.ENDPOINT, got=got, fix=f"try later, {again}")
    return ConfigError("the Hub does not take the student", where=repo_id, got=got, fix=f"mend that, {again}")
