"""`python -m stage1_teacher`: the same as `codedistill teacher`, for launchers that want a module."""

from shared.runtime import run_cli
from stage1_teacher.cli import teacher

run_cli(teacher)
