"""Load any transformers directory for evaluation, and measure its size."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from shared.cache.reader import Cache
from shared.errors import ConfigError
from shared.files import sha256_file, sha256_json
from shared.process import local_rank, log
from shared.tokenizer import Tokenizer, load_tokenizer, tokenizer_digest

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def locate_model(name: str, cache_dir: Path | None = None) -> Path:
    """The directory of a model: itself, or the local snapshot of a Hub id.

    Args:
        name: a directory or a Hub id.
        cache_dir: a finished cache; the Hub id that is its teacher is taken at the commit that made it, wherever its
            main branch is now.

    Raises:
        ConfigError: neither a directory nor a model that the Hub, or its local cache, has.
    """
    if Path(name).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return Path(name)
    from data.hub import fetch_model

    teacher = Cache(cache_dir).manifest["identity"]["teacher"] if cache_dir else {}
    commit = teacher.get("commit") if teacher.get("name") == name else None
    if commit:
        log(f"{name}: commit {commit}, which made {cache_dir}")
    return fetch_model(name, commit)[0]


def hub_commit(directory: Path) -> str | None:
    """The commit of a model that came from the Hub (…/snapshots/<commit>); None for any other directory."""
    found = re.fullmatch(r"[0-9a-f]{40}", directory.name)
    return directory.name if found and directory.parent.name == "snapshots" else None


def load_model(directory: Path, dtype: str = "auto") -> tuple[Any, Tokenizer]:
    """Load model and tokenizer for inference, on a GPU where there is one; ranks take turns over several.

    Args:
        directory: a teacher, a training run or an export; weights as safetensors. Nothing is downloaded, and code that
            comes with a model is never run.
        dtype: a key of `DTYPES`; `auto` is what the model's config says.

    Raises:
        ConfigError: the directory is missing or holds no model that transformers can load.
        DistillError: its tokenizer cannot be loaded.
    """
    if not (directory / "config.json").is_file():
        raise ConfigError("not a model directory", where=directory, expected="config.json and *.safetensors in it")
    tokenizer = load_tokenizer(directory)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=DTYPES[dtype], trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError("cannot load the model", where=directory, got=f"{type(error).__name__}: {error}") from error
    device = f"cuda:{local_rank() % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), tokenizer


def model_digest(directory: Path, tokenizer: Tokenizer) -> str:
    """SHA-256 over what decides what a model writes: weights, configuration and tokenizer."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return sha256_json([[path.name, sha256_file(path)] for path in files] + [tokenizer_digest(tokenizer)])


def dtype_name(model: Any) -> str:
    """The dtype of a model's weights, such as `bfloat16`."""
    return str(model.dtype).removeprefix("torch.")


def num_parameters(model: torch.nn.Module) -> int:
    """Parameters, those of tied tensors once."""
    return sum(parameter.numel() for parameter in model.parameters())


def embedding_share(model: Any) -> float:
    """The share of the parameters that lies in the token embeddings and the output head, tied ones once."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    sizes: dict[Any, int] = {weight: weight.numel() for layer in layers if layer for weight in layer.parameters()}
    return sum(sizes.values()) / num_parameters(model)


def weight_bytes(directory: Path) -> int:
    """Size of a model's weight files on disk; a run's checkpoints do not count."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def describe_model(model: Any, directory: Path) -> dict[str, Any]:
    """What a result says of a model: where it is, its commit, size and dtype."""
    return {
        "path": str(directory),
        "commit": hub_commit(directory),
        "parameters": num_parameters(model),
        "embedding_share": embedding_share(model),
        "bytes": weight_bytes(directory),
        "dtype": dtype_name(model),
    }
