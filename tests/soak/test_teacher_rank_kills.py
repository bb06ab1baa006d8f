"""`teacher build` in two processes under torchrun, of which one or all are killed at random moments."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from shared.process import own_command
from tests.support.cache_faults import contents
from tests.support.teacher_kills import Builds, num_shards, whole_shards

NUM_KILLS = 12


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    return Builds(tmp_path_factory.mktemp("rank-kills"), num_documents=150)


def launch(builds, path, log):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = builds.environment | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    command = [*launcher, "--no-python", *own_command(*builds.command, str(path))]
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def test_killed_ranks_and_jobs_end_in_the_same_cache(builds, tmp_path):
    rng = np.random.default_rng()
    kills = number = 0
    while kills < NUM_KILLS:
        path, status = tmp_path / f"killed-{number}", None
        number += 1
        while status != 0:
            kept = whole_shards(path) if path.exists() else {}
            target = int(rng.integers(len(kept) // 2, builds.num_shards + 1))
            with builds.log.open("w") as log:
                process = launch(builds, path, log)
                while process.poll() is None and (not path.exists() or num_shards(path) < target):
                    time.sleep(0.002)
                time.sleep(rng.random() * 0.05)
                workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
                if process.poll() is None and workers:
                    kills += 1
                    if rng.random() < 0.5:
                        os.kill(int(rng.choice(workers.split())), signal.SIGKILL)
                    else:
                        os.killpg(process.pid, signal.SIGKILL)
                        for worker in workers.split():
                            os.kill(int(worker), signal.SIGKILL)
                status = process.wait(timeout=120)
            assert whole_shards(path).items() >= kept.items(), builds.log.read_text()
        assert contents(path) == builds.expected
    print(f"{kills} kills in {number} caches")


def test_sigterm_ends_all_ranks_and_the_same_command_continues(builds, tmp_path):
    path = tmp_path / "cache"
    with builds.log.open("w") as log:
        process = launch(builds, path, log)
        while process.poll() is None and (not path.exists() or num_shards(path) < 2):
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) != 0
        left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout
        assert left == ""
        assert launch(builds, path, log).wait(timeout=300) == 0
    assert contents(path) == builds.expected
