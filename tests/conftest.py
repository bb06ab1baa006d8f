"""Tests share the helpers that lie in this folder."""

import os
import signal
from pathlib import Path

import pytest

# Side by side on few cores, threads of several processes wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault("WANDB_MODE", "disabled")  # every command would record a run


def pytest_configure(config):
    """Hide CUDA from all tests but those of `tests/gpu`: bits are compared, and ranks outnumber the cards."""
    if not any(Path(argument).resolve().is_relative_to(Path(__file__).parent / "gpu") for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


# A shell's background jobs ignore SIGINT, and so would the processes that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A Hub on 127.0.0.1 with a tiny StarCoder2, MBPP-like rows and HumanEval."""
    from tests.support.hub_contents import fill
    from tests.support.loopback_hub import Hub

    with Hub() as hub:
        fill(hub, tmp_path_factory.mktemp("starcoder2"))
        yield hub
