"""What a test's text tells: whether another process can judge it, and which names it binds and reads."""

import pytest

from shared.eval.sandbox.needs import Needs


def needs(body, head=""):
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    return Needs(f"{head}\ndef check(candidate):\n{lines}")


@pytest.mark.parametrize(
    ("head", "body", "found"),
    [
        ("from unittest import mock", "mock.patch('os.getcwd')", "mock"),
        ("import os", "os.environ['A'] = 'b'", "os.environ"),
        ("import builtins", "builtins.print = None", "builtins"),
        ("import math", "math.pi = 3", "the math.pi that it sets"),
        ("import os.path as p", "del p.join", "the p.join that it sets"),
        ("import inspect", "inspect.getsource(candidate)", "getsource"),
        ("import gc, warnings", "gc.collect()\nwarnings.simplefilter('error')", ""),
        ("import sys, io", "sys.stdin = io.StringIO()", ""),
        ("import math", "candidate('mock os.environ warnings. gc.')  # builtins", ""),
        ("import math", "assert candidate(4) == math.gcd(8, 4)", ""),
        ("", "x = A()\nx.pi = 3", ""),
    ],
)
def test_what_needs_one_process(head, body, found):
    assert needs(body, head).one_process == found


def test_names_that_a_test_binds():
    body = "for a, (b, *c) in d:\n    with e as g, h: [i for i in j if (k := i)]\n"
    body += "try: pass\nexcept E as l: import m.n, o as p"
    assert needs(body).bound == {"check", "candidate", *"abcgiklmp"}
    assert needs(body).read == set("dehijE")
