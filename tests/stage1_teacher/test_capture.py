"""Where each process puts its teacher, and the memory that its batches leave behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.errors import ConfigError
from stage1_teacher.capture import KERNEL_CACHES, device_placement
from stage1_teacher.config import TeacherConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launched(monkeypatch):
    """Make this process one of several, on a machine with so many CUDA devices."""

    def launch(local_rank, num_devices):
        variables = {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 4, "MASTER_ADDR": "localhost"}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_devices > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 + device, 200))

    return launch


def test_one_process_follows_the_device_map():
    assert device_placement(TeacherConfig(device_map="cuda:1")) == {"device_map": "cuda:1"}


def test_each_process_takes_devices_of_its_own(launched):
    launched(1, num_devices=4)
    assert device_placement(TeacherConfig()) == {"device_map": {"": 1}}
    pair = {"device_map": "auto", "max_memory": {2: 102, 3: 103}}
    assert device_placement(TeacherConfig(gpus_per_teacher=2)) == pair
    with pytest.raises(ConfigError, match=r"too few CUDA devices.*local rank 1; expected: devices 3 to 5; got: 4"):
        device_placement(TeacherConfig(gpus_per_teacher=3))


def test_without_cuda_all_run_on_the_cpu(launched):
    launched(3, num_devices=0)
    assert device_placement(TeacherConfig()) == {"device_map": "cpu"}
    with pytest.raises(ConfigError, match="--gpus-per-teacher needs CUDA"):
        device_placement(TeacherConfig(gpus_per_teacher=1))


LABELS_NEW_SHAPES = """
import random, sys, torch
from stage1_teacher.capture import load_teacher
from stage1_teacher.config import TeacherConfig
from stage1_teacher.request import find_teacher

def anonymous_bytes():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

config = TeacherConfig(teacher=sys.argv[1], dataset="none", dtype="bfloat16", device_map="cpu")
source = load_teacher(config, find_teacher(config))
shapes = random.Random(0).sample([(B, T) for B in range(1, 9) for T in range(16, 129)], 160)
for number, shape in enumerate(shapes, start=1):
    ids_BT = torch.zeros(shape, dtype=torch.int64)
    for _ in source.chunks(ids_BT, torch.ones(shape, dtype=torch.bool)):
        pass
    if number in (40, 160):
        print(anonymous_bytes())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's figures of a process")
def test_batches_of_new_shapes_leave_little_in_memory(teacher):
    environment = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    command = [sys.executable, "-c", LABELS_NEW_SHAPES, str(teacher)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    after_40, after_160 = map(int, done.stdout.split()[-2:])
    assert after_160 - after_40 < 64 << 20
