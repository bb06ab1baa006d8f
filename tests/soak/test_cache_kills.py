"""At least fifty real kills of `teacher build` at random moments, and a disk that fills up under it."""

import subprocess

import numpy as np
import pytest
from cache_faults import contents, small_disk
from teacher_kills import Builds, whole_shards

NUM_KILLS = 50


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    return Builds(tmp_path_factory.mktemp("kills"), num_documents=150)


def test_kills_at_random_moments(builds, tmp_path):
    rng = np.random.default_rng()
    number = 0
    while builds.kills < NUM_KILLS:
        builds.kill_until_done(tmp_path / f"killed-{number}", rng)
        number += 1
    print(f"{builds.kills} kills in {number} caches")


def test_a_disk_that_fills_up(builds, tmp_path):
    """Whatever does not fit any more, one line says so; with room the same command completes."""
    size = sum(map(len, builds.expected.values()))
    with small_disk(tmp_path / "disk", 2 * size + (1 << 20)) as disk:
        if disk is None:
            pytest.skip("this user may not mount a file system")
        path, ballast = disk / "cache", disk / "ballast"
        for share in (0, 0.01, 0.2, 0.5, 0.8, 0.95):
            with ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)) == 4096:
                    pass
            ballast.open("r+b").truncate(max(ballast.stat().st_size - int(share * 1.2 * size), 0))
            status, said = builds.run(path)
            if status != 0:
                last = said.splitlines()[-1]
                assert status == 1 and "Traceback" not in said, said
                assert "No space left on device" in last and last.startswith("error: "), said
            kept = whole_shards(path)
            ballast.unlink()
            status, said = builds.run(path)
            assert status == 0, said
            assert contents(path) == builds.expected
            assert whole_shards(path).items() >= kept.items()
            subprocess.run(["rm", "-r", str(path)], check=True)
