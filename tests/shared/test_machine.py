"""What a machine has, and whether torch can use it."""

import sys

import pynvml
import pytest
import torch

from shared.errors import ConfigError
from shared.machine import has_accelerator, require_usable_card


@pytest.fixture
def driver(monkeypatch):
    """A driver of this machine that lists some cards, which a processor build of torch cannot use."""

    def present(cards):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: cards)
        monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "550.54.15")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return present


def test_a_card_that_torch_cannot_use_stops_the_command(driver):
    driver(cards=2)
    with pytest.raises(ConfigError, match=r"cannot use this machine's NVIDIA card.*driver 550\.54\.15.*fix: update"):
        require_usable_card()


def test_hidden_cards_and_machines_without_one_run_on_the_processor(driver, monkeypatch):
    driver(cards=0)
    require_usable_card()
    driver(cards=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    require_usable_card()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    require_usable_card()
    monkeypatch.undo()
    require_usable_card()  # this machine as it is, its cards hidden from the tests


@pytest.mark.parametrize(("kind", "counts"), [("cuda", True), ("xpu", True), ("mps", False)])
def test_the_gpu_of_a_mac_is_not_used(monkeypatch, kind, counts):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    assert has_accelerator() == counts
