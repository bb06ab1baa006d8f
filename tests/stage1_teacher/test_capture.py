"""Where each process puts its teacher."""

import pytest
import torch

from shared.errors import ConfigError
from stage1_teacher.capture import device_placement
from stage1_teacher.config import TeacherConfig


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
