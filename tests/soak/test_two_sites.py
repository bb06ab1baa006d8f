"""Two sites that share no network: one labels and pushes, the other trains straight from the URL.

Each site is a network namespace with a link of its own to the Hub and none to the other. Needs root and `ip netns`.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from shared.files import read_json, sha256_file
from tests.support.eval_models import save_model
from tests.support.loopback_hub import OWNER, TOKEN, Hub

ADDRESS = "10.77.0.1"
URL = f"hf://datasets/{OWNER}/labels"
PROGRAM = "from shared.__main__ import main; main()"
STUDENT_PROGRAM = "import sys; sys.modules['stage1_teacher'] = None; " + PROGRAM
TRAIN = ["student", "train", "--preset", "tiny", "--set", "max_steps=12", "--set", "save_steps=2"]


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def sites():
    """Two namespaces, each with a link to this machine's `ADDRESS`."""
    names = ["distill-teacher", "distill-student"]
    if os.geteuid() != 0 or any(ip("netns", "add", name).returncode for name in names):
        pytest.skip("network namespaces need root and `ip netns`")
    try:
        ip("address", "add", f"{ADDRESS}/32", "dev", "lo")
        for number, name in enumerate(names, 1):
            here, there = f"distill{number}", f"distill{number}s"
            for words in (
                ("link", "add", here, "type", "veth", "peer", "name", there),
                ("link", "set", there, "netns", name),
                ("address", "add", f"10.77.{number}.1/24", "dev", here),
                ("link", "set", here, "up"),
                ("-n", name, "address", "add", f"10.77.{number}.2/24", "dev", there),
                ("-n", name, "link", "set", there, "up"),
                ("-n", name, "link", "set", "lo", "up"),
                ("-n", name, "route", "add", f"{ADDRESS}/32", "via", f"10.77.{number}.1"),
            ):
                done = ip(*words)
                assert done.returncode == 0, (words, done.stderr)
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)
        ip("address", "delete", f"{ADDRESS}/32", "dev", "lo")


def at(site, environment, *words, program=PROGRAM):
    """Start a command at a site."""
    command = ["ip", "netns", "exec", site, sys.executable, "-c", program, *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def done(process):
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def test_a_student_is_trained_where_the_teacher_never_was(sites, tmp_path):
    teacher_site, student_site = sites
    teacher, rows, cache = tmp_path / "teacher", tmp_path / "rows.jsonl", tmp_path / "cache"
    save_model(teacher)
    rows.write_text("".join(json.dumps({"text": f"x{i} = {i} * {i + 1}\n" * 20}) + "\n" for i in range(60)))
    quiet = {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    with Hub(ADDRESS) as hub:
        environment = hub.environment(tmp_path / "home", HF_TOKEN=TOKEN, **quiet)
        build = ["teacher", "build", "--teacher", teacher, "--dataset", rows, "--top-k", "8", "--shard-tokens", "2000"]
        done(at(teacher_site, environment, *build, "--out", cache))
        assert f"{OWNER}/labels" in done(at(teacher_site, environment, "cache", "push", cache, URL))

        far = hub.environment(tmp_path / "far", **quiet)
        local = ["--local-cache", tmp_path / "local"]
        killed = at(
            student_site, far, *TRAIN, "--cache", URL, *local, "--out", tmp_path / "run", program=STUDENT_PROGRAM
        )
        while killed.poll() is None and not (tmp_path / "run" / "checkpoint-4").exists():
            time.sleep(0.02)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        fetched = [path for _, path in hub.requests if ".h5" in path]
        done(at(student_site, far, *TRAIN, "--cache", URL, *local, "--out", tmp_path / "run", program=STUDENT_PROGRAM))
        again = [path for _, path in hub.requests if ".h5" in path]
        assert len(fetched) > 1 and len(again) == len(set(again))

        alone = subprocess.run(
            ["ip", "netns", "exec", student_site, "ping", "-c1", "-W1", "10.77.1.2"], capture_output=True
        )
        assert alone.returncode != 0  # the sites do not reach each other
    done(at(student_site, far, *TRAIN, "--cache", cache, "--out", tmp_path / "near"))
    assert sha256_file(tmp_path / "run" / "model.safetensors") == sha256_file(tmp_path / "near" / "model.safetensors")
    record = read_json(tmp_path / "run" / "run.json")
    assert URL in json.dumps(record["caches"]) + json.dumps(record["cache_paths"])
