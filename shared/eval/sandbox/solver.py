"""The child that runs a generated program and answers calls of its entry point. Nothing that it says is a verdict."""

import json
import os
import random
import sys
import types
from typing import Any

from shared.eval.sandbox.channel import Channel, read_all
from shared.eval.sandbox.classes import resolved
from shared.eval.sandbox.exceptions import described
from shared.eval.sandbox.peer import Peer
from shared.eval.sandbox.proxies import PROGRAM_METHODS, make_proxy
from shared.eval.sandbox.surroundings import ProgramSurroundings
from shared.eval.sandbox.values import Table

LOADED, NOT_LOADED = b"L", b"E"


def main(job_fd: int, calls_fd: int) -> None:
    """Load the program, then answer calls until the checker is gone."""
    job = json.loads(read_all(job_fd))
    os.close(job_fd)
    random.seed(0)
    channel = Channel(calls_fd)
    try:
        namespace = load(job["program"])
        function = namespace[job["entry_point"]]
    except BaseException as error:
        channel.send(NOT_LOADED + described(error).encode("utf-8", "replace"))
        os._exit(0)
    channel.send(LOADED)
    agreed = json.loads(channel.receive() or b"null")
    if agreed:
        table = Table(resolved(agreed["classes"], namespace), namespace)
        table.exported.add(table.add(function))
        surroundings = ProgramSurroundings(agreed["surroundings"])
        peer = Peer(channel, table, methods=PROGRAM_METHODS, proxy=make_proxy, surroundings=surroundings, exact=False)
        peer.serve()
    os._exit(0)


def load(program: str) -> dict[str, Any]:
    """Run a program as a module, not as `__main__`: generated code often ends in a main guard that reads stdin."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__
