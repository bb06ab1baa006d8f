"""A student's first weights, where they are not drawn from the seed: a run, an export, or a compatible checkpoint."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from shared.cache.identity import require_same
from shared.cache.reader import Cache
from shared.checkpoints import weight_files, weights_sha256
from shared.errors import ConfigError, require
from shared.files import read_json, sha256_file
from shared.model.gpt import GPT, GPTConfig
from shared.tokenizer import load_tokenizer, tokenizer_digest

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = {"F64", "F32", "F16", "BF16"}
# What decides the function that the weights compute; the number of positions and the initial spread do not.
DECISIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "use_bias", "norm_epsilon", "rope_parameters",
)  # fmt: skip


class Start:
    """A transformers directory of the Starcoder2 architecture whose weights a student of given sizes can take over.

    Config, tokenizer and tensor headers are compared; the weights are not read before `load_into`.

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
            require_same("the tokenizers", ours, theirs, ours_name=cache.path, theirs_name=directory,
                         fix="start from weights with the cache's tokenizer")  # fmt: skip
        self._files = weight_files(directory)
        _require_tensors(directory, self._files, sizes)
        self.weights_sha256 = weights_sha256([sha256_file(file) for file in self._files])

    def describe(self) -> dict[str, Any]:
        """What `run.json` records."""
        return {"path": str(self.directory), "weights_sha256": self.weights_sha256}

    def load_into(self, model: GPT) -> None:
        """Copy the weights into the model's own, in its number format.

        Raises:
            ConfigError: the head has a matrix of its own, which differs from the embedding.
        """
        tensors = {name: tensor for file in self._files for name, tensor in load_file(file).items()}
        head = tensors.pop(HEAD, None)
        tied = head is None or torch.equal(tensors.setdefault(EMBEDDING, head), head)
        what = "the weights to start from have a head of their own; the student's is its embedding"
        require(tied, what, where=self.directory, got=f"{HEAD} differs from {EMBEDDING}")
        model.load_state_dict(tensors)


def _require_architecture(directory: Path, sizes: GPTConfig) -> None:
    from transformers import Starcoder2Config

    config = read_json(directory / "config.json")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    expected = "a finished run, an export or another directory with model_type starcoder2"
    require(
        model_type == "starcoder2", "cannot start from this model", where=directory, expected=expected, got=model_type
    )
    try:
        theirs = Starcoder2Config.from_dict(config)
    except Exception as error:  # transformers raises many unrelated types here
        got = f"{type(error).__name__}: {error}"
        raise ConfigError("transformers refuses the config to start from", where=directory, got=got) from error
    ours = Starcoder2Config(**sizes.to_dict(), bos_token_id=None, eos_token_id=None)
    for key in DECISIVE:
        ours_value, theirs_value = getattr(ours, key), getattr(theirs, key)
        require(ours_value == theirs_value, f"the weights to start from have another {key}", where=directory,
                expected=f"{ours_value} (the student's)", got=theirs_value,
                fix="give the student the sizes of that model" if key != "vocab_size" else None)  # fmt: skip
    window, positions = theirs.sliding_window, sizes.max_position_embeddings
    require(window is None or window >= positions, "the weights to start from attend only within a window",
            where=directory, expected=f"sliding_window null, or at least {positions}", got=window)  # fmt: skip


def _require_tensors(directory: Path, files: list[Path], sizes: GPTConfig) -> None:
    """Compare names, shapes and number formats with the student's, from the files' headers."""
    theirs: dict[str, list[int] | str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    header = tensors.get_slice(name)
                    is_float = header.get_dtype() in FLOATS
                    theirs[name] = header.get_shape() if is_float else f"the number format {header.get_dtype()}"
        except (OSError, SafetensorError) as error:
            raise ConfigError("cannot read the weights to start from", where=file, got=error) from error
    with torch.device("meta"):
        ours = {name: list(tensor.shape) for name, tensor in GPT(sizes).named_parameters()}
    if HEAD in theirs:
        ours[HEAD] = ours[EMBEDDING]
        theirs.setdefault(EMBEDDING, theirs[HEAD])
    for name in sorted(ours.keys() | theirs.keys()):
        expected, got = ours.get(name, "no such tensor"), theirs.get(name, "no such tensor")
        require(expected == got, f"{name} of the weights to start from does not fit", where=directory,
                expected=expected, got=got)  # fmt: skip
