"""The child that runs a generated program and answers calls of its entry point. Nothing that it says is a verdict."""

import json
import os
import random
import sys
import types
from typing import Any

from shared.eval.sandbox.channel import Channel, read_all
from shared.eval.sandbox.values import Decoder, Encoder, is_mutable


def main(job_fd: int, calls_fd: int) -> None:
    """Load the program, then answer calls until the checker is gone."""
    job = json.loads(read_all(job_fd))
    os.close(job_fd)
    random.seed(0)
    channel = Channel(calls_fd)
    try:
        function = load(job["program"])[job["entry_point"]]
    except BaseException as error:
        channel.send(b"E" + _described(error))
        os._exit(0)
    channel.send(b"L")
    held = [function]  # and after it the iterators that it returned
    while (request := channel.receive()) is not None:
        channel.send(_answer(held, request))
    os._exit(0)


def load(program: str) -> dict[str, Any]:
    """Run a program as a module, not as `__main__`: generated code often ends in a main guard that reads stdin."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _answer(held: list[Any], request: bytes) -> bytes:
    """The reply to a call, or to the wish for an iterator's next item.

    It says how that ended, whether arguments changed, what they hold now if so, then the outcome.
    """
    decoder = Decoder(request)
    which, arguments, keywords = decoder.decode()
    shared = decoder.objects
    before = _state(which, arguments, keywords)
    try:
        outcome, how = (next(held[which]) if which else held[0](*arguments, **keywords)), b"R"
    except BaseException as error:
        outcome, how = _outline(error), b"X"
    try:
        encoder = Encoder(shared, exact=False, iterators=held)
        changed = _state(which, arguments, keywords) != before
        if changed:
            for value in filter(is_mutable, shared):
                encoder.contents(value)
        encoder.encode(outcome)
    except BaseException as error:  # of what it returned or left behind, too
        return b"U" + _described(error)
    return how + (b"C" if changed else b"S") + encoder.take()


def _state(*what: Any) -> bytes:
    encoder = Encoder(exact=False, opaque=True)
    encoder.encode(what)
    return encoder.take()


def _outline(error: BaseException) -> tuple[Any, ...]:
    """An exception as its classes' modules and names, its arguments or its text, and its attributes."""
    names = [(kind.__module__, kind.__qualname__) for kind in type(error).__mro__]
    try:
        _, arguments, *state = tuple(error.__reduce__())
        found = names, error.args, arguments, state[0] if state else {}
        Encoder(exact=False).encode(found)
        return found
    except BaseException:  # whatever its own methods do
        text = _described(error).decode("utf-8", "replace")
        return names, (text,), (text,), {}


def _described(error: BaseException) -> bytes:
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = "an exception without a readable text"
    return text[:500].encode("utf-8", "replace")
