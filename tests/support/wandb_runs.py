"""What W&B recorded offline."""

import json
import struct
import time

from wandb.proto.wandb_internal_pb2 import Record


def wandb_runs(folder):
    """Of each run recorded offline in a folder: its group and the exit code it ended with, by its name."""
    found = {}
    for path in folder.glob("wandb/offline-run-*/run-*.wandb"):
        run, code = None, None
        for record in _finished_records(path):
            run = record.run if record.HasField("run") else run
            code = record.exit.exit_code if record.HasField("exit") else code
        assert run.display_name not in found
        found[run.display_name] = (run.run_group, code)
    return found


def wandb_summary(folder, name):
    """The summary of a run recorded offline, as W&B's own records hold it."""
    for path in folder.glob("wandb/offline-run-*/run-*.wandb"):
        summary, run = {}, None
        for record in _finished_records(path):
            run = record.run if record.HasField("run") else run
            updates = record.summary.update if record.HasField("summary") else []
            summary |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}
        if run.display_name == name:
            return {key: value for key, value in summary.items() if not key.startswith("_")}
    raise AssertionError(name)


def wandb_steps(folder):
    """Of each run recorded offline in a folder, oldest first: its id and the steps of its history."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        steps = [record.history.step.num for record in _records(path) if record.HasField("history")]
        found.append((path.stem.removeprefix("run-"), steps))  # a killed run may have written nothing yet
    return found


def _finished_records(path, patience_seconds=15):
    """The records of a run that has ended: W&B's own process may still be writing when ours is done."""
    deadline = time.monotonic() + patience_seconds
    while True:
        records = list(_records(path))
        if any(record.HasField("exit") for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.1)


def _records(path):
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):  # LevelDB's log: blocks of 32 KiB; checksum, length and kind before each piece
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(whole)
            whole = b""
