"""`teacher build` killed once, and ended by signals; `make soak` kills it more often."""

import signal

import pytest

from tests.support.cache_faults import contents
from tests.support.teacher_kills import Builds, num_shards, whole_shards


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    return Builds(tmp_path_factory.mktemp("builds"), num_documents=40)


def test_a_killed_build_goes_on_to_the_same_bytes(builds, tmp_path):
    path = tmp_path / "killed"
    status, said = builds.run(path, kill_at_shard=3)
    assert status == -9, said
    assert 3 <= num_shards(path) < builds.num_shards
    kept = whole_shards(path)
    assert len(kept) >= 4
    status, said = builds.run(path)
    assert status == 0, said
    assert f"{len(kept) // 2} of {builds.num_shards} shards are done already" in said
    assert "40 documents are tokenised already" in said
    assert contents(path) == builds.expected
    assert whole_shards(path).items() >= kept.items()
    assert [entry.name for entry in tmp_path.iterdir()] == ["killed"]


def test_signals_end_a_build_within_seconds_at_a_clean_point_and_it_goes_on_to_the_same_bytes(builds, tmp_path):
    path = tmp_path / "stopped"
    for number, shards, code, word in ((signal.SIGTERM, 1, 143, "terminated"), (signal.SIGINT, 3, 130, "interrupted")):
        status, said = builds.run(path, kill_at_shard=shards, number=number)
        assert status == code, said
        assert said.splitlines()[-1] == f"{word}; nothing finished is lost, the same command continues"
        assert "Traceback" not in said
        kept = whole_shards(path)
        assert shards <= num_shards(path) < builds.num_shards
        assert len(kept) == 2 * num_shards(path)  # what is there is whole
        assert not list(path.rglob("*.tmp-*"))
    status, said = builds.run(path)
    assert status == 0, said
    assert f"{len(kept) // 2} of {builds.num_shards} shards are done already" in said
    assert contents(path) == builds.expected
