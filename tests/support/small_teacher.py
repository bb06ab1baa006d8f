"""A tiny random Llama and its tokenizer, as teacher."""

import torch

VOCABULARY, WIDTH = 300, 304


def save_teacher(path, tokenizer, *, width=WIDTH, change=None):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=width,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
        if change is not None:
            change(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
