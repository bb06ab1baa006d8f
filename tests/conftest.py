"""Tests share the helpers that lie in this folder."""

import os
import signal

import pytest

# Side by side on few cores, threads of several processes wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault("WANDB_MODE", "disabled")  # every command would record a run

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
