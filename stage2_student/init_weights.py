"""Where a student's first weights come from, if not from the seed: an earlier run, an export, a like checkpoint."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shared.cache.reader import Cache
from shared.checkpoints import weight_files, weights_sha256
from shared.errors import CacheMismatchError, ConfigError
from shared.files import read_json, sha256_file
from shared.model.gpt import GPT, GPTConfig
from shared.tokenizer import load_tokenizer, tokenizer_digest

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
# What decides the function that the weights compute; the number of positions and the first weights' spread do not.
DECISIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "use_bias", "norm_epsilon",
)  # fmt: skip


class Start:
    """A transformers directory of the Starcoder2 architecture whose weights a student of given sizes can take over.

    Config and tensor headers are read and compared; the weights are not read before `load_into`.

    Args:
        directory: a finished run, an export or any other such directory.
        sizes: the student's.
        cache: where the student's tokenizer is.

    Attributes:
        weights_sha256: of the file of weights, or over the digests of several.

    Raises:
        ConfigError: no such directory, or weights of another architecture, size or number format.
        CacheMismatchError: the directory's tokenizer is not the cache's.
    """

    def __init__(self, directory: Path, sizes: GPTConfig, cache: Cache) -> None:
        self.directory = directory
        _require_architecture(directory, sizes)
        if (directory / "tokenizer.json").exists():
            theirs, ours = (tokenizer_digest(load_tokenizer(path)) for path in (directory, cache.tokenizer_path))
            if theirs != ours:
                raise CacheMismatchError(
                    "the tokenizer of the weights to start from is not the cache's",
                    where=directory,
                    expected=f"{ours} ({cache.path})",
                    got=theirs,
                )
        self._file_of = _find_tensors(directory)
        _require_shapes(directory, self._file_of, sizes)
        files = sorted(set(self._file_of.values()))
        self.weights_sha256 = weights_sha256([sha256_file(file) for file in files])

    def describe(self) -> dict[str, Any]:
        """What `run.json` records."""
        return {"path": str(self.directory), "weights_sha256": self.weights_sha256}

    def load_into(self, model: GPT) -> None:
        """Copy the weights into the model's own, in its number format.

        Raises:
            ConfigError: a head of its own, which differs from the embedding.
        """
        if EMBEDDING in self._file_of and HEAD in self._file_of:
            embedding, head = self._read(EMBEDDING), self._read(HEAD)
            if not torch.equal(embedding, head):
                raise ConfigError(
                    "the weights to start from have a head of their own; the student's is its embedding",
                    where=self.directory,
                    got=f"{HEAD} differs from {EMBEDDING}",
                )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self._read(name if name in self._file_of else HEAD))

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _require_architecture(directory: Path, sizes: GPTConfig) -> None:
    from transformers import Starcoder2Config

    config = read_json(directory / "config.json")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type != "starcoder2":
        expected = "a finished run, an export or another directory with model_type starcoder2"
        raise ConfigError("cannot start from this model", where=directory, expected=expected, got=model_type)
    try:
        theirs = Starcoder2Config.from_dict(config)
    except Exception as error:  # transformers raises many unrelated types here
        got = f"{type(error).__name__}: {error}"
        raise ConfigError("transformers refuses the config to start from", where=directory, got=got) from error
    ours = Starcoder2Config(**sizes.to_dict(), bos_token_id=None, eos_token_id=None)
    pairs = {key: (getattr(ours, key), getattr(theirs, key)) for key in DECISIVE}
    pairs["rope_parameters"] = (ours.rope_parameters, theirs.rope_parameters)
    for key, (our_value, their_value) in pairs.items():
        if our_value != their_value:
            raise ConfigError(
                f"the weights to start from are of another {key}",
                where=directory,
                expected=f"{our_value} (the student's)",
                got=their_value,
                fix="give the student the sizes of that model" if key != "vocab_size" else None,
            )
    window = theirs.sliding_window
    if window is not None and window < sizes.max_position_embeddings:
        raise ConfigError(
            "the weights to start from attend within a window, the student everywhere",
            where=directory,
            expected=f"sliding_window null, or at least {sizes.max_position_embeddings}",
            got=window,
        )


def _find_tensors(directory: Path) -> dict[str, Path]:
    """The file of each tensor, by name."""
    found: dict[str, Path] = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ConfigError("cannot read the weights to start from", where=file, got=error) from error
    return found


def _require_shapes(directory: Path, file_of: dict[str, Path], sizes: GPTConfig) -> None:
    with torch.device("meta"):
        ours = {name: list(tensor.shape) for name, tensor in GPT(sizes).named_parameters()}
    expected = dict(ours)
    if HEAD in file_of:
        expected[HEAD] = ours[EMBEDDING]
        if EMBEDDING not in file_of:
            del expected[EMBEDDING]
    differing = sorted(expected.keys() ^ file_of.keys())
    if differing:
        state = "lack" if differing[0] in expected else "have one too many:"
        raise ConfigError(f"the weights to start from {state} {differing[0]}", where=directory)
    for name, shape in expected.items():
        with safe_open(file_of[name], framework="pt") as file:
            theirs = file.get_slice(name)
            if theirs.get_shape() != shape:
                raise ConfigError(
                    f"{name} to start from has another size", where=directory, expected=shape, got=theirs.get_shape()
                )
            if theirs.get_dtype() not in FLOATS:
                raise ConfigError(
                    f"{name} to start from is quantised",
                    where=directory,
                    expected=" | ".join(FLOATS),
                    got=theirs.get_dtype(),
                )
