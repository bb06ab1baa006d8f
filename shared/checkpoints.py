"""Model directories: found by path or Hub id, digested over the very files that transformers loads, loaded frozen.

Importing this module loads neither torch nor transformers.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.cache.reader import Cache
from shared.errors import ConfigError, require
from shared.files import read_json, sha256_file, sha256_json
from shared.hub import fetch_model, read_card, stated_license
from shared.machine import require_usable_card
from shared.process import local_rank, log
from shared.tokenizer import Tokenizer, load_tokenizer

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
LICENSE_LINKS = {  # of licenses that cards give only a short name of
    "bigcode-openrail-m": "https://huggingface.co/spaces/bigcode/bigcode-model-license-agreement"
}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.jinja")


# --- finding ---------------------------------------------------------------------------------------------------------


def find_model(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """A model's directory, and its commit if it came from the Hub; downloads what is not there yet.

    `name` is a directory or a Hub id, `revision` a branch, tag or commit of the latter.

    Raises:
        ConfigError: there is no such directory or model.
    """
    path = Path(name)
    if path.is_dir():
        require(revision is None, "a directory has no revision", where=name, got=revision, fix="leave --revision out")
        return path, None
    is_hub_id = _HUB_ID.fullmatch(name) and not path.exists()
    require(is_hub_id, "no such model", where=name, expected="a model directory or a Hub id such as owner/name")
    return fetch_model(name, revision)


def locate_model(name: str, cache_dir: Path | None = None) -> Path:
    """The directory of a model, given by directory or Hub id, that is to be evaluated. Raises as `find_model`.

    If the Hub id is that of the cache's teacher, the commit that made the cache is taken, wherever the main branch is.
    """
    commit = None
    if cache_dir and not Path(name).is_dir():
        teacher = Cache(cache_dir).manifest.identity["teacher"]
        commit = teacher.get("commit") if teacher.get("name") == name else None
    if commit:
        log(f"{name}: commit {commit}, which made {cache_dir}")
    return find_model(name, commit)[0]


def hub_commit(directory: Path) -> str | None:
    """The commit of a model that came from the Hub (…/snapshots/<commit>); None for any other directory."""
    is_commit = re.fullmatch(r"[0-9a-f]{40}", directory.name)
    return directory.name if is_commit and directory.parent.name == "snapshots" else None


def student_record(directory: Path) -> Path | None:
    """What a run or an export says of how it was trained; None for any other model."""
    records = (directory / name for name in ("run.json", "lineage.json"))
    return next((record for record in records if record.is_file()), None)


# --- digests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """A model on disk and what identifies it; None where unknown."""

    path: Path  # that transformers loads
    name: str  # Hub id, or the directory's name
    commit: str | None  # 40-digit Hub commit; None for a directory
    license: str | None  # as the model card says
    attribution: str | None  # where it is published, and its license's text where the card does not hold it
    weights_digest: str  # see `weights_digest`
    config_digest: str  # SHA-256 of `config.json`
    tokenizer_files_digest: str  # SHA-256 over the tokenizer files' SHA-256; shows an edit without loading anything


def identify_model(name: str, revision: str | None = None) -> ModelFiles:
    """Find a model and digest its files. Arguments are those of `find_model`.

    Raises:
        ConfigError: there is no such directory or model, or it lacks safetensors weights.
    """
    path, commit = find_model(name, revision)
    hub_id = name if commit else None
    card = read_card(path / "README.md") if (path / "README.md").is_file() else {}
    return ModelFiles(
        path=path,
        name=hub_id or path.resolve().name,
        commit=commit,
        license=stated_license(card),
        attribution=_attribution(card, hub_id),
        weights_digest=weights_digest(path),
        config_digest=sha256_file(path / "config.json"),
        tokenizer_files_digest=sha256_json(_digests(path, tokenizer_files(path))),
    )


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a model's tokenizer, by name."""
    return sorted({file for pattern in _TOKENIZER_FILES for file in directory.glob(pattern) if file.is_file()})


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers loads a model's weights from, by name: one, or those of the index.

    Raises:
        ConfigError: a file is missing, transformers would load other weights than these, or the folder holds two sets
            of weights.
    """
    index = directory / WEIGHTS_INDEX
    shards = _indexed_files(index) if index.is_file() else []
    names = shards or [WEIGHTS]
    if (directory / WEIGHTS).is_file():
        names = [WEIGHTS]
        # transformers loads the one file, vLLM what the index names. An index whose files are gone is only a leftover.
        seconds = [name for name in shards if name != WEIGHTS and (directory / name).is_file()]
        more = f" and {len(seconds) - 3} more" if len(seconds) > 3 else ""
        require(
            not seconds,
            "the folder holds two sets of weights",
            where=directory,
            expected=f"{WEIGHTS}, or the files that {WEIGHTS_INDEX} names",
            got=f"{WEIGHTS}; and {', '.join(seconds[:3])}{more}",
            fix="remove those that are not the model's: readers differ in which they load",
        )
    missing = [name for name in ["config.json", *names] if not (directory / name).is_file()]
    require(
        not missing,
        "the model lacks a file",
        where=directory,
        expected=", ".join(missing),
        fix="save it with save_pretrained (safetensors); if it is a run, finish it with `codedistill student train`",
    )
    config = read_json(directory / "config.json")
    others = ["adapter_config.json"] if (directory / "adapter_config.json").exists() else []
    if isinstance(config, dict) and "transformers_weights" in config:
        others.append("transformers_weights in config.json")
    require(
        not others,
        "the model loads more than its safetensors",
        where=directory,
        got=", ".join(others),
        fix="load it with transformers, merge an adapter, and save it with save_pretrained",
    )
    return [directory / name for name in names]


def _indexed_files(index: Path) -> list[str]:
    """The file names in an index of weights, at least one."""
    content = read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    names = set(files.values()) if isinstance(files, dict) else set()
    known = bool(names) and all(isinstance(name, str) and not Path(name).is_absolute() for name in names)
    require(known, "the index of the weights cannot be read", where=index,
            expected="file names by tensor in weight_map", got=repr(files)[:60])  # fmt: skip
    return sorted(names)


def weights_digest(directory: Path) -> str:
    """SHA-256 over the names and SHA-256 of the weight files, as a cache records its teacher's."""
    return sha256_json(_digests(directory, weight_files(directory)))


def weights_sha256(digests: list[str]) -> str:
    """The SHA-256 of a model's one weight file, or over those of several; how runs record where they started."""
    return digests[0] if len(digests) == 1 else sha256_json(digests)


def model_digest(directory: Path) -> str:
    """SHA-256 over the files that decide what a model says: weights, configuration and tokenizer.

    Raises:
        ConfigError: it is no model directory.
    """
    files = identify_model(str(directory))
    return sha256_json([files.weights_digest, files.config_digest, files.tokenizer_files_digest])


def _digests(directory: Path, files: Iterable[Path]) -> dict[str, str]:
    return {str(file.relative_to(directory)): sha256_file(file) for file in files}


def _attribution(card: Mapping[str, Any], hub_id: str | None) -> str | None:
    """Where a model, or the one that its card says it was made from, is published; and the license's text."""
    base = card.get("base_model")
    published = hub_id or (base if isinstance(base, str) else None)
    link = card.get("license_link") or LICENSE_LINKS.get(str(card.get("license")))
    parts = [f"{published}, https://huggingface.co/{published}"] if published else []
    return ", ".join([*parts, f"license text: {link}"] if link else parts) or None


# --- loading ---------------------------------------------------------------------------------------------------------


def head_and_positions(directory: Path) -> tuple[int, int | None]:
    """Rows of the LM head, and the model's limit of positions; None where its configuration names none.

    Raises:
        ConfigError: transformers cannot read the configuration.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError("cannot read the model's configuration", where=directory, got=error) from error
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return config.vocab_size, limit


def load_frozen(directory: Path, dtype: str = "auto", *, load_in: str | None = None, **placement: Any) -> Any:
    """Load a causal language model for inference: only safetensors, none of its own code, nothing downloaded.

    Args:
        directory: `config.json` and safetensors weights.
        dtype: `float32`, `bfloat16` or `float16`; `auto` is the configuration's.
        load_in: `8bit` or `4bit` quantises the weights (bitsandbytes).
        placement: `device_map`, as transformers reads it (`auto` means the CPU where there is no accelerator), and
            `max_memory`.

    Raises:
        ConfigError: bitsandbytes is missing; torch cannot use the card that is there; or the directory holds no model
            that transformers can load, or not all of one: transformers would draw at random what is missing.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    files = weight_files(directory)
    if placement.get("device_map") != "cpu":
        require_usable_card()
        if placement.get("device_map") == "auto" and torch.backends.mps.is_available():
            log("a Mac's GPU has no float64: the model runs on the processor")
            placement["device_map"] = "cpu"
    disable_progress_bar()
    if load_in:
        placement["quantization_config"] = quantization_config(load_in, dtype)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **placement,
        )
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
        raise ConfigError("cannot load the model", where=directory, got=f"{type(error).__name__}: {error}") from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        expected = f"all of them in {', '.join(file.name for file in files)}"
        raise ConfigError("the files lack weights of the model", where=directory, expected=expected,
                          got=f"no {missing[0]}, {len(missing)} missing in all",
                          fix="copy or fetch the folder again")  # fmt: skip
    return model.eval().requires_grad_(False)


def load_model(directory: Path, dtype: str = "auto") -> tuple[Any, Tokenizer]:
    """Load model and tokenizer for evaluation, on a GPU where there is one; ranks take turns over several.

    Raises:
        DistillError: as `load_frozen` and `load_tokenizer`.
    """
    import torch

    weight_files(directory)
    tokenizer = load_tokenizer(directory)
    device = f"cuda:{local_rank() % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    return load_frozen(directory, dtype).to(device), tokenizer


@contextlib.contextmanager
def trial(what: str, where: str, expected: str | None = None) -> Iterator[None]:
    """Try a model before long work: what it raises inside becomes a `ConfigError` of this message, but for a device
    without memory, which says nothing about the model."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models raise many unrelated types
        raise ConfigError(what, where=where, expected=expected, got=f"{type(error).__name__}: {error}") from error


def quantization_config(load_in: str, dtype: str) -> Any:
    """What transformers quantises the weights by: `8bit` (LLM.int8) or `4bit` (NF4), computing in `dtype`.

    Raises:
        ConfigError: bitsandbytes is missing.
    """
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    require(
        is_bitsandbytes_available(),
        f"--load-in {load_in} needs bitsandbytes",
        expected="the package bitsandbytes and a device it supports",
        got="no such package",
        fix="pip install bitsandbytes, or leave --load-in out",
    )
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


# --- describing ------------------------------------------------------------------------------------------------------


def device_kinds(model: Any) -> list[str]:
    """The kinds of devices that a model lies on, such as `cuda`."""
    placed = getattr(model, "hf_device_map", {"": model.device}).values()
    return sorted({"cuda" if isinstance(device, int) else str(device).partition(":")[0] for device in placed})


def dtype_name(model: Any) -> str:
    """The dtype of a model's weights, such as `bfloat16`."""
    return str(model.dtype).removeprefix("torch.")


def describe_model(model: Any, directory: Path) -> dict[str, Any]:
    """What a result says of a model: where it is, its commit, size and dtype.

    Tied parameters count once; `embedding_share` is the share of them in the token embeddings and the output head.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {weight for layer in layers if layer for weight in layer.parameters()}
    parameters = sum(weight.numel() for weight in model.parameters())
    return {
        "path": str(directory),
        "commit": hub_commit(directory),
        "parameters": parameters,
        "embedding_share": sum(weight.numel() for weight in embeddings) / parameters,
        "bytes": sum(path.stat().st_size for path in weight_files(directory)),
        "dtype": dtype_name(model),
    }
