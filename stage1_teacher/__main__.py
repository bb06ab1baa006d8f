"""`python -m stage1_teacher`: the same as `codedistill teacher`, for launchers that want a module."""

from shared.process import run_cli
from stage1_teacher.cli import teacher

if __name__ == "__main__":
    run_cli(teacher)
