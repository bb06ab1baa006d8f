"""The child process of `limited.py`: take a job from stdin, give up what it can, run the test, report the verdict.

Run by path with the standard library alone; it imports nothing of this project. Usage: checker.py VERDICT_FD.
"""

import ctypes
import json
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000


def _isolate() -> bool:
    """Die with the parent, and go on in a child that has no network and sees no process but its own.

    Returns:
        Whether it does; the kernel may forbid user namespaces.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWPID) != 0:
        return False
    if child := os.fork():
        os.waitpid(child, 0)
        os._exit(0)
    # The first process of a process namespace: when it dies, everything it started dies.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return True


def _limit(limits: dict[str, int]) -> None:
    """Set resource limits, by name, at most at the hard limits already there."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


def _run(job: dict[str, str]) -> tuple[str, str]:
    """Run the whole test against the program; anything it raises, SystemExit included, is a failure."""
    # Not "__main__": generated code often ends in a main guard that reads stdin.
    namespace: dict[str, object] = {"__name__": "candidate"}
    try:
        exec(compile(job["program"], "<program>", "exec"), namespace)
        candidate = namespace[job["entry_point"]]
        exec(compile(job["test"], "<test>", "exec"), namespace)
        namespace["check"](candidate)  # type: ignore[operator]
    except BaseException as error:
        try:
            return "failed", f"{type(error).__name__}: {error}"[:200]
        except BaseException:  # an exception whose text cannot be made
            return "failed", "an exception without a readable text"
    return "passed", ""


def main() -> None:
    """Run one job. No verdict is written unless the test ran to its end or raised."""
    verdict_fd = int(sys.argv[1])
    job = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    token, dumps, write, leave = job.pop("token"), json.dumps, os.write, os._exit
    isolated = _isolate()
    _limit(job.pop("limits"))
    verdict, detail = _run(job)
    write(verdict_fd, dumps([token, verdict, detail, isolated]).encode())
    leave(0)


if __name__ == "__main__":
    main()
