"""`python -m shared.eval`: the same as `codedistill eval`, for launchers that want a module."""

from shared.eval.cli import evaluate
from shared.process import run_cli

if __name__ == "__main__":
    run_cli(evaluate)
