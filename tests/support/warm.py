"""Commands in processes of their own that fork from one in which torch and transformers are imported already.

They are killed, signalled and awaited as any process; only the seconds of the imports are saved. What a variable
decides at import (OMP_NUM_THREADS, HF_HOME) is what it was when the first command started.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["stage1_teacher.build", "stage2_student.train", "transformers.models.starcoder2.modeling_starcoder2"]
)


class Command:
    """A `codedistill` command that runs; the methods are those of `subprocess.Popen`, all it prints is kept as text."""

    def __init__(self, *arguments, env):
        self._printed = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self._printed]
        self._process = FORKS.Process(target=_command, args=(list(map(str, arguments)), dict(env), names))
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple(file.read() for file in self._printed)


def run(*arguments, env, timeout=None):
    """Run a command to its end, as `subprocess.run` does."""
    command = Command(*arguments, env=env)
    try:
        printed = command.communicate(timeout)
    finally:
        command.send_signal(signal.SIGKILL)
    return subprocess.CompletedProcess(arguments, command.returncode, *printed)


def _command(arguments, environment, printed):
    from shared.__main__ import main

    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(printed, start=1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["codedistill", *arguments]
    main()
