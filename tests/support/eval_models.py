"""Tiny random models with a tokenizer trained on the spot, for the evaluation's tests."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Starcoder2Config, Starcoder2ForCausalLM


def save_tokenizer(directory):
    """Save a byte-level BPE; returns the size of its vocabulary."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["def add(a, b):\n    return a + b\n", "for name in names:\n    print(name)\n"] * 9, trainer
    )
    name = "<|endoftext|>"
    vocabulary = backend.get_vocab_size()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=name, eos_token=name).save_pretrained(directory)
    return vocabulary


def save_model(directory, *, seed=0, dtype=torch.float32, positions=256, **generation):
    """Save a Starcoder2 of two layers; `generation` goes into its generation config, as a careless publisher would."""
    vocabulary = save_tokenizer(directory)
    torch.manual_seed(seed)
    config = Starcoder2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    model = Starcoder2ForCausalLM(config).to(dtype)
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(directory)
    return directory


ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 1, "num_hidden_layers": 4}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
# Architectures whose cache is not of attention only. Rwkv's and MiniMax's states take in padding, and Rwkv's mixes up
# rows. MiniMax refuses any cache but its own; RecurrentGemma returns none.
RECURRENT = {
    "Mamba": {"state_size": 8, "num_hidden_layers": 2},
    "Mamba2": {
        "state_size": 8, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8,
    },
    "Jamba": ATTENTION | EXPERTS | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "Qwen3Next": ATTENTION | EXPERTS | DELTA | {
        "num_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
    "FalconH1": ATTENTION | {
        "num_hidden_layers": 2, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64,
    },
    "Lfm2": ATTENTION | {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "Rwkv": {"num_hidden_layers": 2, "context_length": 256},
    "MiniMax": ATTENTION | EXPERTS | {
        "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 8,
    },
    "RecurrentGemma": {
        "num_attention_heads": 4, "intermediate_size": 96, "lru_width": 32, "num_hidden_layers": 3,
        "attention_window_size": 16,
    },
}  # fmt: skip


def save_recurrent(directory, architecture):
    """Save a model of an architecture of `RECURRENT`, with the tokenizer of `save_model`."""
    vocabulary = save_tokenizer(directory)
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    options = {"vocab_size": vocabulary, "hidden_size": 32, "initializer_range": 0.3} | ids | RECURRENT[architecture]
    config = getattr(transformers, f"{architecture}Config")(**options)
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(directory)
    return directory


NO_DRAFT = {"acceptance_rate", "draft_speedup", "mean_accepted_length"}  # of a model that drafted for no teacher


def unknown_figures(model):
    """The figures that a report lacks of a model, but for MBPP's, which `make` does not ask for, and memory, energy
    and decoding as served, which only a GPU has."""
    unknown = set(model["reasons"]) - {"mbpp", "peak_bytes", "tokens_per_second_per_watt"}
    return {key for key in unknown if not key.startswith("served_")}
