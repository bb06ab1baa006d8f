"""A small cache with a real tokenizer, for the student's tests."""

import dataclasses
import itertools

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shared.cache.reader import Cache
from shared.cache.writer import CacheWriter
from tests.support.cache_rows import IDENTITY, build_options, samples_of_logits, shard_of_logits

VOCABULARY = 257
SOURCE = {"name": "made", "split": "train", "revision": None, "license": None, "digest": "dd", "num_documents": 0}


def save_tokenizer(directory):
    """Every byte is a token; id 0 opens and closes documents."""
    names = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=names[0], eos_token=names[0])
    tokenizer.save_pretrained(directory)


def make_cache(path, *, lengths=(21, 9, 1, 34, 2, 55, 13, 40), seed=0, k=6, teacher="random", prompt=3, samples=None,
               codec="f16", scale=2, shards=2):  # fmt: skip
    """Documents of given lengths in shards; rows of ragged k, logits of N(0, scale²).

    The first `prompt` rows are no targets; there may be one number per document. `samples` are the options of
    `samples_of_logits`: every row then has sampled targets.
    """
    identity = IDENTITY | {"teacher": IDENTITY["teacher"] | {"name": teacher, "weights_digest": teacher}}
    build = build_options(top_k=k, head_width=VOCABULARY, tokenizer_size=VOCABULARY, codec=codec, num_shards=shards)
    rng = np.random.default_rng(seed)
    writer = CacheWriter(path, build)
    save_tokenizer(path / "tokenizer")
    borders = [len(lengths) * number // shards for number in range(shards + 1)]
    for number, (first, stop) in enumerate(itertools.pairwise(borders)):
        part = lengths[first:stop]
        S = sum(part)
        tokens = rng.integers(1, 30, S)
        logits = rng.normal(0, scale, (S, VOCABULARY)).astype(np.float32)
        at = np.concatenate([np.arange(n) for n in part])
        prompts = np.repeat(np.broadcast_to(prompt, len(lengths))[first:stop], part)
        last = np.concatenate([np.arange(n) == n - 1 for n in part])
        shard = shard_of_logits(logits, part, rng.integers(1, k + 1, S), tokens, loss_mask=~last & (at >= prompts))
        if samples:
            shard = dataclasses.replace(shard, samples=samples_of_logits(logits, shard, seed=seed, **samples))
        writer.write_shard(number, shard, {})
    writer.finish(identity, [SOURCE | {"digest": f"digest of seed {seed}", "num_documents": len(lengths)}])
    return Cache(path)
