"""The kernels that inductor makes of a chunk's loss, on a processor; `tests/gpu` has those of a card."""

import pytest
import torch

from stage2_student import fused
from stage2_student.config import StudentConfig
from tests.gpu.test_losses import check


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("loss", "divergence", "temperature"),
    [("ghost", "forward", 1.0), ("truncated", "jsd", 2.0), ("sampled", "forward", 1.0), ("hybrid", "forward", 2.0)],
)
def test_compiled_kernels_equal_float64(monkeypatch, loss, divergence, temperature):
    monkeypatch.setattr(fused, "chunk_rows", lambda device: 64)
    torch.compiler.reset()
    config = StudentConfig(loss=loss, divergence=divergence, temperature=temperature)
    check(config, 1e-4, torch.float32, "cpu", compiles=True)
