"""A small cache of given texts, one token a byte, with random rows; and a student that reads the same bytes."""

import numpy as np
import torch
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from shared.cache.reader import Cache
from shared.cache.writer import CacheWriter
from shared.tokenizer import encode_text, load_tokenizer
from tests.support.cache_rows import IDENTITY, SOURCES, build_options, shard_of_logits
from tests.support.student_cache import VOCABULARY, save_tokenizer


def make_text_cache(path, texts, *, k=6, scale=3, seed=0, ids=None, prompt=2):
    """A document for each text (or list of ids); the first `prompt` rows are no targets. Returns cache and logits."""
    options = build_options(top_k=k, head_width=VOCABULARY, tokenizer_size=VOCABULARY, num_shards=1)
    with CacheWriter(path, options) as writer:
        save_tokenizer(path / "tokenizer")
        tokenizer = load_tokenizer(path / "tokenizer")
        documents = [[0, *(encode_text(tokenizer, text) if isinstance(text, str) else text), 0] for text in texts]
        tokens = np.concatenate(documents)
        lengths = [len(document) for document in documents]
        logits = np.random.default_rng(seed).normal(0, scale, (len(tokens), VOCABULARY)).astype(np.float32)
        mask = np.concatenate([(np.arange(n) >= prompt) & (np.arange(n) < n - 1) for n in lengths])
        shard = shard_of_logits(logits, lengths, np.full(len(tokens), k), tokens, loss_mask=mask)
        for number, meta in enumerate(shard.doc_meta):
            meta["id"] = ids[number] if ids else meta["id"]
        writer.write_shard(0, shard, {})
        writer.finish(IDENTITY, SOURCES)
    return Cache(path), logits


def save_student(directory, *, positions=64):
    """A random model of the cache's tokenizer."""
    save_tokenizer(directory)
    torch.manual_seed(1)
    config = Starcoder2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    Starcoder2ForCausalLM(config).save_pretrained(directory)
    return directory
