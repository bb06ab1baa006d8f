"""The digest's matrix on the demo teacher's own tokenizer, of 49,152 tokens, where that has been fetched."""

from pathlib import Path

import pytest

from tests.shared.test_tokenizer_digest import (  # noqa: F401
    digest,
    test_every_change_is_seen,
    test_however_it_is_loaded_or_saved,
    test_what_does_not_decide_ids_leaves_it,
)

DEMO = Path(__file__).parents[2] / "artifacts" / "teachers" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def folder():
    if not DEMO.is_dir():
        pytest.skip("`make teacher PROFILE=demo` has not been run")
    return DEMO
