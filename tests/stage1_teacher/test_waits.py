"""What makes the host wait for a GPU while a batch is labelled, counted on a processor, which has the GPU's way."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shared.logits import LogitSource, largest_by_sorting
from stage1_teacher import topk
from stage1_teacher.capture import capture_shard, to_arrays
from stage1_teacher.config import TeacherConfig
from stage1_teacher.documents import Segment
from tests.support.host_waits import HostWaits

V = 97


@pytest.fixture
def source():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LogitSource(LlamaForCausalLM(config).requires_grad_(False), chunk_rows=10)


def segments():
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, V, length).astype(np.uint32) for length in (9, 30, 4, 21, 2, 16)]
    return [
        Segment(ids=row, is_target=np.arange(len(row)) > 0, meta={"id": str(i), "digest": f"{i:064x}"})
        for i, row in enumerate(ids)
    ]


@pytest.mark.parametrize("samples_from", ["full", "tail"])
@pytest.mark.parametrize("notice", [None, "the model's own logits"])
def test_a_batch_waits_once_for_transformers_alone(monkeypatch, source, samples_from, notice):
    config = TeacherConfig(top_k=5, batch_tokens=60, samples=3, samples_from=samples_from)
    source.notice = notice
    want, _ = to_arrays(capture_shard(source, segments(), config, V, lambda _: None), segments(), config, V)
    monkeypatch.setattr(topk, "split_by_blocks", topk.split_at_once)
    monkeypatch.setattr(topk, "largest", largest_by_sorting)
    batches = []
    with HostWaits() as waits:
        captured = capture_shard(source, segments(), config, V, batches.append)
    assert len(batches) > 1
    assert all(wait.startswith(("_local_scalar_dense", "is_nonzero")) for wait in waits.found)
    assert len(waits.found) <= len(batches)  # of transformers, whether a batch is packed
    arrays, _ = to_arrays(captured, segments(), config, V)
    np.testing.assert_array_equal(arrays.topk_ids, want.topk_ids)
    np.testing.assert_array_equal(arrays.topk_margins, want.topk_margins)
    np.testing.assert_array_equal(arrays.samples.ids, want.samples.ids)
    np.testing.assert_allclose(arrays.tail_log, want.tail_log, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(arrays.entropy_nats, want.entropy_nats, rtol=1e-5)
