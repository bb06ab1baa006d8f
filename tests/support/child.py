"""Commands in processes of their own, for tests that exchange a package or a Python."""

import os
import subprocess

from shared.process import own_command


def run(*command, **environment):
    """Run a command to its end; gives what it printed."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def codedistill(*arguments):
    return run(*own_command(*arguments), WANDB_MODE="disabled")
