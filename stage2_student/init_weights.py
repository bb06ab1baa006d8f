"""A student's first weights, where they are not drawn from the seed: all of them from a run, an export or a compatible
checkpoint, or the embedding from another model."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from shared.cache.identity import require_same
from shared.cache.reader import Cache
from shared.checkpoints import weight_files, weights_sha256
from shared.errors import ConfigError, require
from shared.files import read_json, sha256_file
from shared.model.gpt import GPT, GPTConfig
from shared.tokenizer import load_tokenizer, tokenizer_digest

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What the embedding of a model with any architecture is called, after the prefixes of its modules.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")
MAX_COUNTED_SHARDS = 64  # of a cache: two million tokens say how frequent a token is
# What decides the function that the weights compute; the number of positions and the initial spread do not.
DECISIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "use_bias", "norm_epsilon", "rope_parameters",
)  # fmt: skip


class Start(NamedTuple):
    """Weights to start from: all parameters of a `GPT` by name, and the SHA-256 of their file or files."""

    tensors: dict[str, Tensor]
    weights_sha256: str


def read_start(directory: Path, sizes: GPTConfig, cache: Cache) -> Start:
    """Read the weights of a transformers directory of the Starcoder2 architecture.

    Args:
        directory: a finished run, an export or any other such directory.
        sizes: the student's.
        cache: where the student's tokenizer is.

    Raises:
        ConfigError: no such directory, or weights of another architecture, size or number format.
        CacheMismatchError: the directory's tokenizer is not the cache's.
    """
    _require_architecture(directory, sizes)
    if (directory / "tokenizer.json").exists():
        theirs, ours = (tokenizer_digest(load_tokenizer(path)) for path in (directory, cache.tokenizer_path))
        require_same("the tokenizers", ours, theirs, ours_name=cache.path, theirs_name=directory,
                     fix="start from weights with the cache's tokenizer")  # fmt: skip
    files = weight_files(directory)
    try:
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError("cannot read the weights to start from", where=directory, got=error) from error
    head = tensors.get(HEAD)
    if head is not None:
        tensors.setdefault(EMBEDDING, head)
    _require_tensors(directory, tensors, sizes)
    if head is not None:
        what = "the weights to start from have a head of their own; the student's is its embedding"
        is_tied = torch.equal(tensors.pop(HEAD), tensors[EMBEDDING])
        require(is_tied, what, where=directory, got=f"{HEAD} differs from {EMBEDDING}")
    return Start(tensors, weights_sha256([sha256_file(file) for file in files]))


def _require_architecture(directory: Path, sizes: GPTConfig) -> None:
    from transformers import Starcoder2Config

    config = read_json(directory / "config.json")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    require(model_type == "starcoder2", "cannot start from this model", where=directory, got=model_type,
            expected="a finished run, an export or another directory with model_type starcoder2")  # fmt: skip
    try:
        theirs = Starcoder2Config.from_dict(config)
    except Exception as error:  # transformers raises many unrelated types here
        got = f"{type(error).__name__}: {error}"
        raise ConfigError("transformers refuses the config to start from", where=directory, got=got) from error
    ours = Starcoder2Config(**sizes.to_dict(), bos_token_id=None, eos_token_id=None)
    for key in DECISIVE:
        require(getattr(ours, key) == getattr(theirs, key), f"the weights to start from have another {key}",
                where=directory, expected=f"{getattr(ours, key)} (the student's)", got=getattr(theirs, key),
                fix="give the student the sizes of that model" if key != "vocab_size" else None)  # fmt: skip
    window, positions = theirs.sliding_window, sizes.max_position_embeddings
    require(window is None or window >= positions, "the weights to start from attend only within a window",
            where=directory, expected=f"sliding_window null, or at least {positions}", got=window)  # fmt: skip


def _require_tensors(directory: Path, tensors: dict[str, Tensor], sizes: GPTConfig) -> None:
    """Compare names, shapes and number formats with the student's."""
    with torch.device("meta"):
        ours = {name: str(list(parameter.shape)) for name, parameter in GPT(sizes).named_parameters()}
    theirs = {
        name: str(list(tensor.shape)) if tensor.is_floating_point() else f"the number format {tensor.dtype}"
        for name, tensor in tensors.items()
    }
    if HEAD in theirs:
        ours[HEAD] = ours[EMBEDDING]
    for name in sorted(ours.keys() | theirs.keys()):
        expected, got = ours.get(name, "no such tensor"), theirs.get(name, "no such tensor")
        require(expected == got, f"{name} of the weights to start from does not fit", where=directory,
                expected=expected, got=got)  # fmt: skip


def read_embedding(directory: Path, cache: Cache) -> Start:
    """Read a model's token embedding, as `EMBEDDING`: f32 `[V, H]`, V the cache's vocabulary.

    Args:
        directory: a model of any architecture, in safetensors.
        cache: where the student's tokenizer is.

    Raises:
        ConfigError: no such directory, no embedding in it, or one with fewer rows than the vocabulary.
        CacheMismatchError: the directory's tokenizer is not the cache's.
    """
    files = weight_files(directory)
    theirs, ours = (tokenizer_digest(load_tokenizer(path)) for path in (directory, cache.tokenizer_path))
    require_same("the tokenizers", ours, theirs, ours_name=cache.path, theirs_name=directory,
                 fix="take the embedding of the teacher, or of a model with its tokenizer")  # fmt: skip
    try:
        found = [(file, name) for file in files for name in _tensor_names(file) if name.endswith(EMBEDDINGS)]
        require(len(found) == 1, "the model has no embedding to start from", where=directory,
                expected=f"one tensor named {' or '.join(EMBEDDINGS)}", got=[name for _, name in found])  # fmt: skip
        (file, name), *_ = found
        with safe_open(file, framework="pt") as tensors:
            embedding_VH = tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ConfigError("cannot read the embedding to start from", where=directory, got=error) from error
    fits = embedding_VH.is_floating_point() and embedding_VH.ndim == 2 and len(embedding_VH) >= cache.tokenizer_size
    require(fits, f"{name} does not fit the vocabulary", where=directory,
            expected=f"floating point, [{cache.tokenizer_size} or more, H]",
            got=f"{embedding_VH.dtype}, {list(embedding_VH.shape)}")  # fmt: skip
    embedding_VH = embedding_VH[: cache.tokenizer_size].float()
    return Start({EMBEDDING: embedding_VH}, weights_sha256([sha256_file(file) for file in files]))


def _tensor_names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def token_counts(caches: Sequence[Cache]) -> Tensor:
    """How often each token id occurs in some shards of each cache, evenly spaced: f64 `[V]`."""
    counts = np.zeros(caches[0].tokenizer_size)
    for cache in caches:
        for number in range(0, cache.num_shards, math.ceil(cache.num_shards / MAX_COUNTED_SHARDS)):
            counts += np.bincount(cache.load_shard(number).tokens, minlength=len(counts))
    return torch.from_numpy(counts)


def project_embedding(embedding_VH: Tensor, counts_V: Tensor, drawn_VD: Tensor) -> Tensor:
    """An embedding in a student's width: in its leading directions by frequency, with the spread of the one drawn.

    The directions are the right singular vectors of the rows weighted by the square root of how often each token
    occurs: no D others keep more of the squared length of the corpus' tokens. Coordinates beyond H stay as drawn.

    Args:
        embedding_VH: f32, a teacher's.
        counts_V: f64, occurrences of each token.
        drawn_VD: f32, the student's at random.
    """
    weighted_VH = embedding_VH.double() * (counts_V / counts_V.sum()).sqrt()[:, None]
    _, directions_HH = torch.linalg.eigh(weighted_VH.T @ weighted_VH)  # by ascending eigenvalue
    width = min(directions_HH.shape[1], drawn_VD.shape[1])
    projected = embedding_VH.double() @ directions_HH.flip(1)[:, :width]
    result = drawn_VD.clone()
    spread, drawn_spread = (values.double().square().mean().sqrt() for values in (projected, drawn_VD))
    result[:, :width] = (projected * (drawn_spread / spread)).to(drawn_VD.dtype)
    return result
