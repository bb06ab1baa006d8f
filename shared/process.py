"""This process: its rank under a launcher, its messages, its exit codes."""

import os
import signal
import sys
from typing import Any, NoReturn

from shared.errors import DistillError, PeerEndedError


def rank() -> int:
    """This process's rank under a launcher such as torchrun; 0 otherwise. Slurm variables alone do not count."""
    return int(os.environ["RANK"]) if _launched() else 0


def world_size() -> int:
    """The number of processes under a launcher such as torchrun; 1 otherwise."""
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def local_rank() -> int:
    """This process's number on its machine under a launcher such as torchrun; 0 otherwise."""
    return int(os.environ["LOCAL_RANK"]) if _launched() else 0


def is_main_process() -> bool:
    """Whether this process writes what its job shares: rank 0."""
    return rank() == 0


def _launched() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def log(message: str) -> None:
    """One line to standard error; other ranks than 0 stay silent."""
    if is_main_process():
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


LESS_MEMORY = (
    "in training --batch-tokens auto, a smaller per_device_train_batch_size or gradient_checkpointing=true; "
    "in evaluation a smaller --batch-size or --batch-tokens, fewer tokens or --dtype bfloat16; nothing finished is lost"
)


def first_sentence(error: Exception) -> str:
    """Of torch's message, which goes on for a paragraph where memory runs out."""
    return str(error).partition(". ")[0].partition("\n")[0]


class Terminated(BaseException):
    """SIGTERM arrived; raised in the main thread so that `finally` blocks run."""


def own_command(*arguments: str) -> list[str]:
    """A `codedistill` command to be run as a child; no module of the working directory stands in for one of ours."""
    return [sys.executable, "-P", "-m", "shared", *arguments]


def run_cli(command: Any) -> NoReturn:
    """Run a click command as a program: 0 done, 1 domain error, 2 usage, 130 and 143 after SIGINT and SIGTERM."""
    import click

    def terminate(signum: int, frame: object) -> NoReturn:
        raise Terminated

    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # torch's older name, which a user may have set
        # Batches of many shapes would leave holes in a GPU's memory; read when torch first uses one.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        value = command.main(standalone_mode=False)
        code = value if isinstance(value, int) else 0  # click returns the code of `Exit` instead of raising it
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        log("interrupted; nothing finished is lost, the same command continues")
        code = 130
    except Terminated:
        log("terminated; nothing finished is lost, the same command continues")
        code = 143
    except PeerEndedError as error:
        log(f"error: {error}")
        code = 1
    except DistillError as error:  # from whichever rank it comes
        sys.stderr.write(f"error: {error.for_terminal() if sys.stderr.isatty() else error}\n")
        code = 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:  # a path that cannot be read or written, a full disk
        if error.filename is None:
            raise
        log(f"error: {error.strerror}; where: {error.filename}; fix: check the path, the rights and the free space")
        code = 1
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which nothing here imports
            raise
        # From whichever rank it comes.
        sys.stderr.write(f"error: the device has too little memory; got: {first_sentence(error)}; fix: {LESS_MEMORY}\n")
        code = 1
    sys.exit(code)
