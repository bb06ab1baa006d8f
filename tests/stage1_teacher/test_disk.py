import pytest

from stage1_teacher.config import TeacherConfig
from stage1_teacher.disk import least_bytes_per_token

MEASURED = {16: 31.2, 50: 82.6, 64: 104.2, 128: 207.6}  # MBPP, tests/bench/RESULTS.md
MEASURED_F16 = {16: 43.6, 50: 124.0, 64: 156.6, 128: 300.4}


@pytest.mark.parametrize("top_k", MEASURED)
def test_the_least_is_just_below_real_caches(top_k):
    for codec, measured in (("q", MEASURED), ("f16", MEASURED_F16)):
        least = least_bytes_per_token(TeacherConfig(top_k=top_k, codec=codec), 49_152)
        assert 0.88 < least / measured[top_k] <= 1.0


def test_samples_and_small_vocabularies_count():
    plain = least_bytes_per_token(TeacherConfig(), 49_152)
    assert least_bytes_per_token(TeacherConfig(samples=50), 49_152) == plain + 15
    assert least_bytes_per_token(TeacherConfig(), 5_000) < plain
    assert least_bytes_per_token(TeacherConfig(), 20) == 5 + 20
