"""Tests of one body for every device: on a processor in `make test`, on a card by `pytest tests/gpu`."""

import pytest
import torch

ON_A_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_TWO_CARDS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
EVERY_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_CARD)])
