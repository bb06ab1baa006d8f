"""The frozen teacher: found and digested without torch, then loaded and placed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import ConfigError, DistillError
from shared.files import read_json, sha256_file, sha256_json
from shared.hub import fetch_model, read_card, stated_licence

LICENCE_LINKS = {  # of licences that their cards name by a short name alone
    "bigcode-openrail-m": "https://huggingface.co/spaces/bigcode/bigcode-model-license-agreement"
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherFiles:
    """A teacher on disk and what identifies it.

    Attributes:
        path: directory that transformers loads.
        name: Hub id, or the directory's name.
        commit: 40-digit Hub commit; None for a directory.
        licence: as the model card says; None where unknown.
        attribution: where it is published, and its licence's text where the card does not hold it; None where unknown.
        weights_digest: SHA-256 over the safetensors files' SHA-256.
        config_digest: SHA-256 of `config.json`.
        tokenizer_files_digest: SHA-256 over the tokenizer files' SHA-256; tells an edit without loading anything.
    """

    path: Path
    name: str
    commit: str | None
    licence: str | None
    attribution: str | None
    weights_digest: str
    config_digest: str
    tokenizer_files_digest: str


def locate_teacher(teacher: str, revision: str | None = None) -> TeacherFiles:
    """Find a teacher's files (downloading those of a Hub id) and digest them; loads no torch.

    Args:
        teacher: a directory or a Hub id.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ConfigError: there is no such directory or model, or it has no safetensors weights.
    """
    path, commit = Path(teacher), None
    if not path.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", teacher) or path.exists():
            raise ConfigError(
                "no such teacher", where=teacher, expected="a model directory or a Hub id such as owner/name"
            )
        path, commit = fetch_model(teacher, revision)
    elif revision is not None:
        raise ConfigError("a directory has no revision", where=teacher, got=revision, fix="leave --revision out")
    config, card = path / "config.json", _card(path)
    weights = _digest_files(path, _weight_files(path))
    return TeacherFiles(
        path=path,
        name=teacher if commit else path.resolve().name,
        commit=commit,
        licence=stated_licence(card),
        attribution=_attribution(card, teacher if commit else None),
        weights_digest=sha256_json(weights),
        config_digest=sha256_file(config),
        tokenizer_files_digest=sha256_json(
            _digest_files(
                path, [p for pattern in ("*token*", "vocab*", "merges*", "*.jinja") for p in path.glob(pattern)]
            )
        ),
    )


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    missing = [name for name in ["config.json", *sorted(names)] if not (path / name).is_file()]
    if missing:
        raise ConfigError(
            "the teacher lacks a file",
            where=path,
            expected=missing[0],
            fix="save it with save_pretrained (safetensors)",
        )
    return [path / name for name in names]


def _digest_files(path: Path, files: list[Path]) -> dict[str, str]:
    return {str(file.relative_to(path)): sha256_file(file) for file in files if file.is_file()}


def _card(path: Path) -> dict[str, Any]:
    """The front matter of a teacher's model card; empty where it has none."""
    card = path / "README.md"
    return read_card(card) if card.is_file() else {}


def _attribution(card: Mapping[str, Any], hub_id: str | None) -> str | None:
    """Where a teacher, or the model that its card says it was made from, is published; and the licence's text."""
    base = card.get("base_model")
    published = hub_id or (base if isinstance(base, str) else None)
    link = card.get("license_link") or LICENCE_LINKS.get(str(card.get("license")))
    parts = [f"{published}, https://huggingface.co/{published}"] if published else []
    return ", ".join([*parts, f"licence text: {link}"] if link else parts) or None


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A loaded teacher: evaluation mode, no gradients; `devices` are the kinds it lies on, such as `cuda`."""

    model: Any
    num_parameters: int
    devices: list[str]


def head_and_positions(path: Path) -> tuple[int, int | None]:
    """Rows of the LM head and the model's own limit of positions (None where its configuration names none)."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise DistillError("cannot read the teacher's configuration", where=path, got=error) from error
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return config.vocab_size, limit


def load_teacher(path: Path, *, dtype: str, load_in: str | None = None, **placement: Any) -> Teacher:
    """Load a teacher from a directory: safetensors only, no code of its own, frozen.

    Args:
        path: directory with `config.json` and safetensors weights.
        dtype: `bfloat16`, `float16` or `float32`.
        load_in: `8bit` or `4bit` quantises the weights (bitsandbytes).
        placement: `device_map`, as transformers reads it (`auto` means the CPU where there is no accelerator), and
            `max_memory`.

    Raises:
        ConfigError: bitsandbytes is missing.
        DistillError: files that transformers cannot load.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    quantised = {"quantization_config": quantization_config(load_in, dtype)} if load_in else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=getattr(torch, dtype),
            **placement,
            use_safetensors=True,
            trust_remote_code=False,
            **quantised,
        )
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        raise DistillError("cannot load the teacher", where=path, got=f"{type(error).__name__}: {error}") from error
    model.eval().requires_grad_(False)
    placed = getattr(model, "hf_device_map", {"": model.device}).values()
    devices = sorted({"cuda" if isinstance(device, int) else str(device).partition(":")[0] for device in placed})
    return Teacher(model=model, num_parameters=model.num_parameters(), devices=devices)


def quantization_config(load_in: str, dtype: str) -> Any:
    """What transformers is told to quantise the weights: `8bit` (LLM.int8) or `4bit` (NF4), computing in `dtype`.

    Raises:
        ConfigError: bitsandbytes is missing.
    """
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ConfigError(
            f"--load-in {load_in} needs bitsandbytes",
            expected="the package bitsandbytes and a device it supports",
            got="no such package",
            fix="pip install bitsandbytes, or leave --load-in out",
        )
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
