"""The root command: lazy, fast to answer, with help for every subcommand."""

import subprocess
import sys

import pytest

from tests.support.commands import COMMANDS

HEAVY = ("torch", "transformers", "datasets", "wandb", "h5py", "numpy")
PROBE = f"""
import sys
sys.argv = ["codedistill", *sys.argv[1:]]
from shared.__main__ import main
try:
    main()
finally:
    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def run(*arguments):
    return subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_answers_without_heavy_imports(command):
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: codedistill {command}")
    assert done.stderr.strip() == "[]"


def test_an_unknown_command_is_a_usage_error():
    done = run("train")
    assert done.returncode == 2
    assert "No such command 'train'" in done.stderr


def test_the_student_side_imports_no_teacher_code():
    code = (
        "import sys, stage2_student.train, stage2_student.export, shared.eval.fidelity.measure\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'stage1_teacher']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_cache_is_read_with_numpy_and_h5py_alone():
    code = (
        "import sys, shared.cache.reader, shared.cache.verify, shared.cache.info\n"
        "assert not {'torch', 'transformers', 'click', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
