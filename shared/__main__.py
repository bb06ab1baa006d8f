"""Entry point of the `codedistill` command: handles signals before anything slow is imported."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line; a signal that comes while it is still being imported ends it at once, in one line.

    In a locale without UTF-8, names of files would be read as other text: Python then starts again in its UTF-8 mode.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # for child processes too
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for number, status, word in ((signal.SIGINT, 130, b"interrupted\n"), (signal.SIGTERM, 143, b"terminated\n")):

        def leave(signum: int, frame: FrameType | None, status: int = status, word: bytes = word) -> None:
            os.write(2, word)
            os._exit(status)

        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell's background jobs ignore SIGINT
            signal.signal(number, leave)
    from shared.cli import codedistill
    from shared.process import run_cli

    run_cli(codedistill)


if __name__ == "__main__":
    main()
