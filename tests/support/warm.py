"""Commands in processes of their own that fork from one in which torch and transformers are imported already.

They are killed, signalled and awaited as any process; only the seconds of the imports are saved. What a variable
decides at import (OMP_NUM_THREADS, HF_HOME) is what `Forks` was given.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from shared.process import own_command

MAIN = "from shared.__main__ import main; main()"
TORCHRUN = "from torch.distributed.run import main; main()"
CONTEXT = multiprocessing.get_context("forkserver")


class Forks:
    """A process that imports torch and transformers in an environment when its first command starts."""

    def __init__(self, environment):
        self.environment, self._server = dict(environment), forkserver.ForkServer()
        self._server.set_forkserver_preload(
            ["stage1_teacher.build", "stage2_student.train", "transformers.models.starcoder2.modeling_starcoder2"]
        )

    def start(self, process):
        connect = mock.patch.object(forkserver, "connect_to_new_process", self._server.connect_to_new_process)
        with connect, mock.patch.dict(os.environ, self.environment, clear=True):
            process.start()

    def stop(self):
        self._server._stop()


OURS = Forks(os.environ)


class Command:
    """A `codedistill` command that runs, or another program; the methods are those of `subprocess.Popen`.

    All it prints is kept as text, or appended to a file, `log`.
    """

    def __init__(self, *arguments, env, program=MAIN, forks=OURS, log=None):
        self._folder = tempfile.TemporaryDirectory()
        names = [str(log or Path(self._folder.name, name)) for name in ("stdout", "stderr")]
        self._printed = list(map(Path, names))
        self._process = CONTEXT.Process(target=_command, args=(program, list(map(str, arguments)), dict(env), names))
        forks.start(self._process)
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple(file.read_text() for file in self._printed)


def run(*arguments, timeout=None, **options):
    """Run a command to its end, as `subprocess.run` does."""
    command = Command(*arguments, **options)
    try:
        printed = command.communicate(timeout)
    finally:
        command.kill()
    return subprocess.CompletedProcess(arguments, command.returncode, *printed)


def run_ranks(num_processes, *arguments, env, timeout=None):
    """Run a command to its end in processes that meet without a launcher: their exit codes, and all they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = map(str, range(num_processes))
    commands = [Command(*arguments, env={**env, **meeting, "RANK": rank, "LOCAL_RANK": rank}) for rank in ranks]
    try:
        said = [command.communicate(timeout)[1] for command in commands]
    finally:
        for command in commands:
            command.kill()
    return [command.returncode for command in commands], "".join(said)


def fork_students(patch):
    """Have the experiments of this process fork their students."""

    def popen(command, *, env, stdout, **_):
        return Command(*command[len(own_command()) :], env=env, log=stdout.name)

    double = SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    patch.setattr("stage2_student.experiments.runner.subprocess", double)


def _command(program, arguments, environment, printed):
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(printed, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["codedistill", *arguments]
    exec(program, {"__name__": "__main__"})
