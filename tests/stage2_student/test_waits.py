"""What makes the host wait for a GPU in a training step, counted on a processor; and what older cards run."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from shared.model import gpt
from shared.model.gpt import GPT, PRESETS, Documents, document_bounds
from stage2_student.arguments import compiles, half_precision, training_arguments
from stage2_student.config import StudentConfig
from stage2_student.dataset import Batch, collate
from stage2_student.experiments.dense import DenseBlocks, DenseLoss
from stage2_student.fused import HeadLoss
from tests.support.host_waits import HostWaits
from tests.support.student_cache import VOCABULARY, make_cache

T, K, V = 48, 5, PRESETS["tiny"].vocab_size


def block(seed):
    """A packed block of three documents, half of its positions targets, with narrow teacher rows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, V, T)
    labels[::2] = gpt.IGNORE
    return {
        "input_ids": rng.integers(0, V, T),
        "position_ids": np.concatenate([np.arange(20), np.arange(17), np.arange(T - 37)]),
        "labels": labels,
        "soft_ids": np.stack([rng.choice(V, K, replace=False) for _ in range(T)]).astype(np.uint16),
        "soft_codes": np.sort(rng.integers(0, 30, (T, K))).astype(np.uint16),
        "soft_k": np.full(T, K, np.int32),
        "soft_log_tail": np.full(T, -1.0, np.float32),
        "soft_codebook": np.linspace(0, 9, 30, dtype=np.float32),
    }


def test_batches_say_what_the_device_would_be_asked_for():
    batch = collate([block(0), block(1)])
    assert torch.equal(batch["document_bounds"], document_bounds(batch["position_ids"]))
    assert batch["document_bounds"].tolist() == [0, 20, 37, 48, 68, 85, 96]
    assert torch.equal(batch["targets"], (batch["labels"].flatten() != gpt.IGNORE).nonzero().squeeze(1))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_step_waits_for_nothing_before_its_losses_are_read(monkeypatch, alpha):
    torch.manual_seed(0)
    model = GPT(PRESETS["tiny"])
    heads = PRESETS["tiny"].num_attention_heads // PRESETS["tiny"].num_key_value_heads
    monkeypatch.setattr(  # a GPU's way that a processor has too
        Documents,
        "attend",
        lambda self, q, k, v: self.attend_masked(q, *(x.repeat_interleave(heads, dim=1) for x in (k, v))),
    )
    model.head_loss = HeadLoss(StudentConfig(alpha=alpha))
    batch = collate([block(0), block(1)])
    num_items = torch.tensor(len(batch["targets"]))
    with HostWaits() as waits:
        output = model(**batch, num_items_in_batch=num_items)
        output["loss"].backward()
    assert waits.found == []
    # The same without what `collate` has counted, which a GPU would be asked for.
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    plain = {name: field for name, field in batch.items() if name not in ("document_bounds", "targets")}
    with HostWaits() as waits:
        again = model(**plain, num_items_in_batch=num_items)
        again["loss"].backward()
    assert {wait.partition(" ")[0] for wait in waits.found} == {"nonzero"}
    assert torch.equal(again["loss"], output["loss"])
    assert torch.equal(model.model.embed_tokens.weight.grad, gradient)


def test_the_dense_arm_waits_once_a_micro_batch_for_the_numbers_of_its_rows(monkeypatch, tmp_path):
    """Its rows lie in a file on the host, which reads them by chunk."""
    cache, file = make_cache(tmp_path / "cache"), tmp_path / "rows.npy"
    targets = sum(int(cache.loss_mask(doc).sum()) for doc in range(cache.num_documents))
    teacher = torch.randn(targets, VOCABULARY, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    np.save(file, teacher.numpy().astype(np.float16))
    blocks = DenseBlocks([cache], block_size=T, seed=0, num_blocks=2)
    batch = collate([blocks[0], blocks[1]])
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(PRESETS["tiny"], vocab_size=VOCABULARY))
    model.head_loss = DenseLoss(StudentConfig(loss="dense"), file, [cache])
    monkeypatch.setattr("stage2_student.fused.chunk_rows", lambda device: 16)
    num_chosen = len(batch["targets"])
    assert num_chosen > 3 * 16
    with HostWaits() as waits:
        output = model(**batch, num_items_in_batch=torch.tensor(num_chosen))
        output["loss"].backward()
    assert waits.found == [f"cpu {(num_chosen, 1)}"]


def test_a_batch_moves_as_one_buffer():
    batch = collate([block(0), block(1)])
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert isinstance(moved, Batch) and moved.buffer.device.type == "meta"
    for name, field in batch.items():  # each in the same place of one buffer
        found = moved[name]
        assert (found.shape, found.dtype, found.device.type) == (field.shape, field.dtype, "meta")
        assert found.storage_offset() == field.storage_offset()
    assert [field.storage_offset() for field in moved.values()][1:] != [0] * (len(moved) - 1)
    here = batch.to("cpu", non_blocking=True)
    assert isinstance(here, Batch) and all(torch.equal(here[name], batch[name]) for name in batch)
    parts = Batch(dict(batch)).to(torch.device("meta"))
    assert {(field.device.type, field.storage_offset()) for field in parts.values()} == {("meta", 0)}


def test_the_plain_loss_takes_batches_too():
    torch.manual_seed(0)
    model, batch = GPT(PRESETS["tiny"]), collate([block(0), block(1)])
    batch = {name: field for name, field in batch.items() if not name.startswith("soft_")}
    chosen = model(**batch)["loss"]
    del batch["targets"]
    torch.testing.assert_close(chosen, model(**batch)["loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("capability", "bf16", "expected"),
    [
        ((7, 5), True, {"bf16": False, "fp16": True}),
        ((7, 5), False, {"bf16": False}),
        ((8, 0), True, {"bf16": True}),
    ],
)
def test_cards_without_bfloat16_train_in_float16(monkeypatch, capability, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert half_precision(StudentConfig(bf16=bf16)) == expected


@pytest.mark.parametrize(
    ("settings", "has_card", "has_triton", "expected"),
    [
        ({}, True, True, True),
        ({}, True, False, False),
        ({}, False, True, False),
        ({"training": {"fsdp": "full_shard"}}, True, True, False),
        ({"torch_compile": False}, True, True, False),
        ({"torch_compile": True}, False, False, True),
    ],
)
def test_students_are_compiled_where_there_is_a_card(monkeypatch, settings, has_card, has_triton, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_card)
    monkeypatch.setattr("stage2_student.arguments.has_triton", lambda: has_triton)
    assert compiles(StudentConfig(**settings)) == expected


@pytest.mark.parametrize(("settings", "expected"), [({}, False), ({"training": {"tf32": True}}, True)])
def test_compiling_does_not_turn_tf32_on(monkeypatch, tmp_path, settings, expected):
    """A processor has no such flag; `tests/gpu` reads it on a card."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # transformers sets it for the whole process
    switched = []
    monkeypatch.setattr(transformers.training_args, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(transformers.training_args, "enable_tf32", switched.append)
    training_arguments(StudentConfig(torch_compile=True, **settings), tmp_path, has_validation=False)
    assert switched[-1] is expected


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "expected"),
    [
        ((9, 0), torch.bfloat16, 64, True),
        ((8, 0), torch.float16, 256, True),
        ((7, 5), torch.float16, 64, False),
        ((9, 0), torch.float32, 64, False),
        ((9, 0), torch.bfloat16, 42, False),
        ((9, 0), torch.bfloat16, 320, False),
    ],
)
def test_flash_attention_is_asked_for_where_it_runs(monkeypatch, capability, dtype, size, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    class Heads:
        device = torch.device("cuda")
        shape = (1, 2, 8, size)

    Heads.dtype = dtype
    assert gpt.runs_flash(Heads) == expected
    Heads.device = torch.device("cpu")
    assert not gpt.runs_flash(Heads)
