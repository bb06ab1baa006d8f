"""The child that runs a generated program and answers calls of its entry point. Nothing that it says is a verdict."""

import contextlib
import os
import random
import sys
import types
from json import dumps, loads  # bound before a program replaces them
from typing import Any

from shared.eval.sandbox import prompt
from shared.eval.sandbox.channel import Channel, GoneError, read_all
from shared.eval.sandbox.exceptions import described
from shared.eval.sandbox.peer import Peer
from shared.eval.sandbox.surroundings import SolverSurroundings
from shared.eval.sandbox.table import Table


def main(job_fd: int, calls_fd: int) -> None:
    """Load the program, then answer calls until the checker is gone.

    The checker sends what the prompt defines and which surroundings cross. The answer is the names under which the
    program's classes differ from the prompt's, or why the program did not load.
    """
    job = loads(read_all(job_fd))
    os.close(job_fd)
    random.seed(0)
    if "numpy" in sys.modules:  # for tests only
        for name in [name for name in sys.modules if name.partition(".")[0] == "numpy"]:
            del sys.modules[name]
    channel = Channel(calls_fd)
    allow_frames_below()
    try:
        namespace = load(job["program"])
        function = namespace[job["entry_point"]]
        failure = None
    except BaseException as error:
        failure = described(error)
    with contextlib.suppress(GoneError):
        proposed = loads(channel.receive())
        if failure is not None:
            channel.send(dumps(failure).encode())
            os._exit(0)
        shared = prompt.resolved(proposed["checksums"], namespace)
        channel.send(dumps(_differences(shared, proposed["checksums"])).encode())
        table = Table([function, *shared.values()])
        table.exported.add(0)
        Peer(channel, table, SolverSurroundings(proposed["surroundings"]), exact=False).serve()
    os._exit(0)


def load(program: str) -> dict[str, Any]:
    """Run a program as a module, not as `__main__`: generated code often ends in a main guard that reads stdin."""
    module = types.ModuleType(prompt.MODULE)
    sys.modules[prompt.MODULE] = module
    exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def allow_frames_below() -> None:
    """Have programs and tests recurse as deep as in plain Python, whatever has called them here."""
    frame, depth = sys._getframe(), 10  # a few for a call to come
    while frame := frame.f_back:  # type: ignore[assignment]
        depth += 1
    sys.setrecursionlimit(sys.getrecursionlimit() + depth)


def _differences(shared: dict[str, Any], proposed: dict[str, dict[str, int]]) -> dict[str, list[str]]:
    """Of what both sides have, the names under which a class here has something else than the prompt alone gives it."""
    return {
        name: [inner for inner, checksum in prompt.checksums(value).items() if proposed[name].get(inner) != checksum]
        if isinstance(value, type) else []
        for name, value in shared.items()
    }  # fmt: skip
