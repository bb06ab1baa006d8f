"""Tests share the helpers that lie in this folder."""

import pytest


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A Hub on 127.0.0.1 with a tiny StarCoder2, MBPP-like rows and HumanEval."""
    from hub_contents import fill
    from loopback_hub import Hub

    with Hub() as hub:
        fill(hub, tmp_path_factory.mktemp("starcoder2"))
        yield hub
