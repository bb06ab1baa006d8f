"""What a test's text tells: whether another process can judge it, and whether its arguments hang on answers."""

import pytest

from shared.eval.sandbox.needs import Needs


def needs(body, head=""):
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    return Needs(f"{head}\ndef check(candidate):\n{lines}", "f")


@pytest.mark.parametrize(
    ("head", "body", "found"),
    [
        ("from unittest import mock", "mock.patch('os.getcwd')", "mock"),
        ("import os", "os.environ['A'] = 'b'", "os.environ"),
        ("import builtins", "builtins.print = None", "builtins"),
        ("import math", "math.pi = 3", "the math.pi that it sets"),
        ("import os.path as p", "del p.join", "the p.join that it sets"),
        ("import inspect", "inspect.iscoroutinefunction(candidate)", "iscoroutinefunction"),
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


@pytest.mark.parametrize(
    ("body", "back"),
    [
        ("assert candidate(candidate(1)) == 1", True),
        ("a = candidate(1)\nassert candidate(a) == 1", True),
        ("a = f(1)\nb = [a]\nc = b + [1]\nassert candidate(c) == 1", True),
        ("v = []\nfor _ in range(candidate(0)): v = [v]\nassert candidate(v) == 1", True),
        ("v = []\nwhile f(v): v = [v]\nassert candidate(v) == 1", True),
        ("v = []\nv.append(candidate(1))\nassert candidate(v) == 1", True),
        ("v = {}\nv['a'] = candidate(1)\nassert candidate(v) == 1", True),
        ("n = []\ncandidate(n)\nv = 'x' * n[0]\nassert candidate(v) == 1", True),
        ("def run(v, g): return g(v)\nn = run(0, candidate)\nassert run('x' * n, candidate) == 2", True),
        ("assert candidate(key=candidate(1)) == 1", True),
        ("assert candidate(1) == 1\nv = []\nfor _ in range(200): v = [v]\nassert candidate(v) == 200", False),
        ("for n in (1, 200):\n    v = []\n    for _ in range(n): v = [v]\n    assert candidate(v) == n", False),
        ("v = [1]\nassert candidate(v) == 1\nassert candidate(v) == 1", False),
        ("a = candidate(1)\nassert a == 1 and len(a) == 2\nassert candidate('x' * 99) == 1", False),
        ("for v, w in [([1], 2)]: assert candidate(v) == w", False),
    ],
)
def test_whether_answers_go_back(body, back):
    assert needs(body).passes_answers_back is back
