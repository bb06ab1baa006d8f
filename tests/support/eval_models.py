"""A tiny random model with a tokenizer trained on the spot, for the evaluation's tests."""

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Starcoder2Config, Starcoder2ForCausalLM


def save_model(directory, *, seed=0, dtype=torch.float32, positions=256, **generation):
    """Save a Starcoder2 of two layers; `generation` goes into its generation config, as a careless publisher would."""
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


NO_DRAFT = {"acceptance_rate", "draft_speedup", "mean_accepted_length"}  # of a model that drafted for no teacher


def unknown_figures(model):
    """The figures that a report lacks of a model, but for MBPP's, which `make` does not ask for, and memory and energy,
    which only a GPU counts."""
    return set(model["reasons"]) - {"mbpp", "peak_bytes", "tokens_per_second_per_watt"}
