"""At least fifty real kills of `teacher build` at random moments, and a disk that fills up under it."""

import os
import subprocess
import threading
import time

import numpy as np
import pytest

from tests.support.cache_faults import contents, small_disk
from tests.support.teacher_kills import Builds, num_shards, whole_shards

NUM_KILLS = 50


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    return Builds(tmp_path_factory.mktemp("kills"), num_documents=150)


def test_kills_at_random_moments(builds, tmp_path):
    rng = np.random.default_rng()
    number = 0
    while builds.kills < NUM_KILLS:
        builds.kill_and_finish(tmp_path / f"killed-{number}", rng, 12)
        number += 1
        print(f"{builds.kills} kills in {number} caches", flush=True)


def test_a_disk_that_fills_up(builds, tmp_path):
    """Before a build, after its first shards or its last, to the page: one line says so; with room it completes."""
    needed = sum(-(-len(data) // 4096) * 4096 for data in builds.expected.values())
    with small_disk(tmp_path / "disk", 3 * needed) as disk:
        if disk is None:
            pytest.skip("this user may not mount a file system")
        path, ballast = disk / "cache", disk / "ballast"

        def fill(shards, pages):
            while num_shards(path) < shards:
                time.sleep(0.001)
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(free - 4096 * pages, 1))

        statuses = []
        for shards, pages in [
            (0, 0),
            (1, 0),
            (1, 1),
            (7, 2),
            (20, 40),
            *[(builds.num_shards, p) for p in (0, 1, 3, 9, 30)],
        ]:
            filler = threading.Thread(target=fill, args=(shards, pages))
            filler.start()
            status, said = builds.run(path)
            filler.join()
            statuses.append(status)
            if status != 0:
                last = said.splitlines()[-1]
                assert status == 1 and "Traceback" not in said and last.startswith("error: "), said
                assert "No space left on device" in last or "the disk cannot hold the cache" in last, said
            kept = whole_shards(path)
            ballast.unlink()
            status, said = builds.run(path)
            assert status == 0, said
            assert contents(path) == builds.expected
            assert whole_shards(path).items() >= kept.items()
            subprocess.run(["rm", "-r", str(path)], check=True)
        assert statuses.count(1) >= 5, statuses
