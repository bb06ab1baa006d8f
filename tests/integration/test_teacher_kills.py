"""`teacher build` killed once; `make soak` kills it more often."""

from cache_faults import contents
from teacher_kills import Builds, num_shards, whole_shards


def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path):
    builds = Builds(tmp_path, num_documents=40)
    path = tmp_path / "killed"
    status, said = builds.run(path, kill_at_shard=3)
    assert status == -9, said
    assert 3 <= num_shards(path) < builds.num_shards
    kept = whole_shards(path)
    assert len(kept) >= 4
    status, said = builds.run(path)
    assert status == 0, said
    assert f"{len(kept) // 2} of {builds.num_shards} shards are done already" in said
    assert contents(path) == builds.expected
    assert whole_shards(path).items() >= kept.items()
