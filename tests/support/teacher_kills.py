"""`teacher build` through the command line with a tiny StarCoder2, killed at random moments of its work."""

import json
import os
import signal
import time

from click.testing import CliRunner

from shared.cache.format import SHARD_PATTERN
from shared.cache.manifest import read_pair
from shared.cli import codedistill
from tests.support import warm
from tests.support.cache_faults import contents
from tests.support.hub_contents import mbpp_row, starcoder2


class Builds:
    """Builds of one cache; an uninterrupted one, in this process, says what the bytes must be."""

    def __init__(self, folder, *, num_documents):
        self.log, self.kills = folder / "log", 0
        teacher, dataset = folder / "teacher", folder / "rows.jsonl"
        teacher.mkdir()
        starcoder2(teacher)
        rows = [
            {"prompt": f"# {row['text']}", "completion": f"\n{row['code']}"}
            for row in map(mbpp_row, range(num_documents))
        ]
        dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ["teacher", "build", "--teacher", str(teacher), "--dataset", str(dataset), "--top-k", "8"]
        options += ["--dtype", "float32", "--shard-tokens", "150", "--batch-tokens", "100", "--out"]
        self.environment = os.environ | {"WANDB_MODE": "disabled"}
        result = CliRunner(env=self.environment).invoke(codedistill, [*options, str(folder / "whole")])
        assert result.exit_code == 0, result.output
        self.command = options
        self.expected = contents(folder / "whole")
        self.num_shards = num_shards(folder / "whole")

    def run(self, path, *, kill_at_shard=None, seconds=0.0, number=signal.SIGKILL):
        """One build, sent a signal so many seconds after there are so many shards; its exit status and what it said."""
        self.log.write_text("")
        process = warm.Command(*self.command, path, env=self.environment, log=self.log)
        while process.poll() is None and not (_locks(path, process.pid) and kill_at_shard is not None):
            time.sleep(0.01)
        while process.poll() is None and num_shards(path) < kill_at_shard:
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(number)
        return process.wait(timeout=20), self.log.read_text()

    def kill_and_finish(self, path, rng, num_kills):
        """Builds killed at random moments until one gets through; the shards that were whole stay as they are."""
        status, target = -9, 0
        for left in reversed(range(num_kills + 1)):
            kept = whole_shards(path)
            # Somewhere in the next few shards, a moment after one appears; near the end anywhere in finishing.
            target += int(rng.integers(0, 2 * self.num_shards // num_kills))
            seconds = 10 ** rng.uniform(-3, 0.5 if target >= self.num_shards else -1)
            status, said = self.run(path, kill_at_shard=min(target, self.num_shards) if left else None, seconds=seconds)
            assert whole_shards(path).items() >= kept.items() and "Traceback" not in said, said
            self.kills += status == -9
            if status != -9:
                break
        assert status == 0, said
        assert contents(path) == self.expected


def num_shards(path):
    return len(list(path.glob("shard-*.h5")))


def whole_shards(path):
    """The files of shards that verify, by what changes when a file is written again."""
    found = {}
    for file in path.glob("shard-*.h5"):
        if read_pair(path, int(SHARD_PATTERN.fullmatch(file.name)[1])) is not None:
            for part in (file, file.with_suffix(".json")):
                found[part] = (part.stat().st_ino, part.stat().st_mtime_ns)
    return found


def _locks(path, pid):
    try:
        return json.loads((path / "lock.json").read_text())["pid"] == pid
    except (OSError, ValueError):
        return False
