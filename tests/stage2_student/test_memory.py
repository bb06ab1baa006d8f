"""The memory estimate against what a training step really keeps."""

import dataclasses

import pytest
import torch

from shared.errors import ConfigError
from shared.model.gpt import GPT, PRESETS
from stage2_student import memory
from stage2_student.config import StudentConfig
from stage2_student.fused import HeadLoss, chunk_rows
from stage2_student.memory import estimate_memory, fit_micro_batch


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("preset", ["tiny", "gpt-125m"])
def test_activations_are_estimated_within_a_quarter_on_the_safe_side(preset, bf16):
    sizes = dataclasses.replace(PRESETS[preset], vocab_size=512, num_hidden_layers=2)
    model = GPT(sizes)
    ids = torch.randint(512, (2, 128))
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        hidden = model.model(ids, torch.arange(128).expand(2, 128))
    assert hidden.shape == (2, 128, sizes.hidden_size)
    matrices = sum(p.numel() * (2 if bf16 else 0) for p in model.parameters() if p.dim() == 2) - 2 * (
        model.model.embed_tokens.weight.numel() if bf16 else 0
    )
    measured = sum(size for pointer, size in kept.items() if pointer not in weights) - matrices
    config = StudentConfig(per_device_train_batch_size=2, block_size=128, bf16=bf16)
    estimated = estimate_memory(config, sizes, 0).activation_bytes
    assert 1.0 <= estimated / measured <= 1.25, (estimated, measured)


def test_state_and_head_are_exact():
    sizes = PRESETS["tiny"]
    model = GPT(sizes)
    num_parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    head_loss = HeadLoss(StudentConfig(alpha=0, temperature=1.0))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None])
        weight = model.model.embed_tokens.weight
        head_loss(hidden.flatten(0, 1), weight, torch.zeros(4, dtype=torch.int64))["loss"].backward()
    optimizer.step()
    state = [p.nbytes + p.grad.nbytes for p in model.parameters()]
    state += [t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim()]
    config = StudentConfig(per_device_train_batch_size=1, block_size=4)
    estimate = estimate_memory(config, sizes, num_parameters)
    assert estimate.state_bytes == sum(state)
    V, H = weight.shape
    scratch = sum(tensor.nbytes for tensor in head_loss._scratch.values())
    assert scratch == chunk_rows("cpu") * V * 6 + V * H * 2
    assert estimate.head_bytes == scratch + V * H * (4 + 2)  # the matrix's gradient, and its bfloat16 copy
    assert estimate.total_bytes == estimate.state_bytes + estimate.activation_bytes + estimate.head_bytes


def test_the_micro_batch_is_the_largest_divisor_that_fits(monkeypatch):
    config = StudentConfig(preset="tiny", per_device_train_batch_size=6, gradient_accumulation_steps=4, block_size=64)
    sizes = PRESETS["tiny"]

    def fitted(batch_tokens):
        result = fit_micro_batch(config, sizes, 1000, batch_tokens)
        assert result.per_device_train_batch_size * result.gradient_accumulation_steps == 24
        return result.per_device_train_batch_size

    assert fit_micro_batch(config, sizes, 1000, None) is config
    assert [fitted(tokens) for tokens in (10_000, 1536, 1535, 64 * 5, 64)] == [24, 24, 12, 4, 1]
    with pytest.raises(ConfigError, match=r"not even one block.*at most 63 tokens; got: 64"):
        fitted(63)
    for size in (24, 8, 1):
        fitting = dataclasses.replace(config, per_device_train_batch_size=size)
        needed = estimate_memory(fitting, sizes, 1000).total_bytes
        monkeypatch.setattr(memory, "free_memory", lambda needed=needed: int(needed / memory.USABLE) + 1)
        assert fitted("auto") == size
    # A run that goes on keeps its micro-batch, since sums of another order are other numbers, while it fits.
    earlier = {"config": {"per_device_train_batch_size": 2}}
    assert fit_micro_batch(config, sizes, 1000, "auto", earlier=earlier).per_device_train_batch_size == 1
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 40)
    assert fit_micro_batch(config, sizes, 1000, "auto", earlier=earlier).per_device_train_batch_size == 2
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(ConfigError, match="at most 900 bytes"):
        fitted("auto")


def test_a_micro_batch_beyond_all_memory_is_refused_before_it_is_allocated(monkeypatch):
    config = StudentConfig(preset="tiny", per_device_train_batch_size=4096, block_size=1024)
    needed = estimate_memory(config, PRESETS["tiny"], 1000).total_bytes
    monkeypatch.setattr(memory, "total_memory", lambda: needed - 1)
    for batch_tokens in (None, 4096 * 1024):
        with pytest.raises(ConfigError, match=r"more memory than a device has.*fix: .*per_device_train_batch_size"):
            fit_micro_batch(config, PRESETS["tiny"], 1000, batch_tokens)
    assert fit_micro_batch(config, PRESETS["tiny"], 1000, 4095 * 1024).per_device_train_batch_size == 2048
    monkeypatch.setattr(memory, "total_memory", lambda: needed)
    assert fit_micro_batch(config, PRESETS["tiny"], 1000, None) is config


def test_recomputed_layers_keep_their_inputs_alone():
    sizes = PRESETS["tiny"]
    config = StudentConfig(per_device_train_batch_size=1, block_size=100)
    whole, recomputed = (
        estimate_memory(dataclasses.replace(config, training={"gradient_checkpointing": flag}), sizes, 0)
        for flag in (False, True)
    )
    per_layer = (whole.activation_bytes - 100 * 4 * 192) / 4
    assert recomputed.activation_bytes == per_layer + 100 * 4 * 192 * (4 + 1)


def test_free_memory_is_some_of_the_machine():
    assert 0 < memory.free_memory() < memory.total_memory() < 1 << 45
