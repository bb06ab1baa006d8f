"""`python -m stage2_student`, for launchers such as torchrun."""

from shared.process import run_cli
from stage2_student.cli import student

if __name__ == "__main__":
    run_cli(student)
