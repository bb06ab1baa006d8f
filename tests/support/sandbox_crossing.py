# ruff: noqa: E501
"""Programs about what crosses between test and program: identity, proxies, classes of the prompt, shared state.

`(completion, test)` by name; those with a prompt of their own `(prompt, completion, test)`.
"""

HONEST = {
    # What lives on between calls, and what a call leaves on the program's side.
    "an output list registered first": ("    global SINK\n    if isinstance(x, list): SINK = x\n    else: SINK.append(x)\n", "def check(candidate):\n    out = []\n    candidate(out)\n    candidate(1); candidate(2)\n    assert out == [1, 2]\n"),
    "a registry by identity": ("    return KEPT.setdefault(x, [x])\nKEPT = {}\n", "def check(candidate):\n    a, b = candidate(1), candidate(2)\n    assert candidate(1) is a and candidate(2) is b and a is not b\n    a.append(5)\n    assert candidate(1) == [1, 5]\n"),
    "a test changes what it was given": ("    if x is None: return len(KEPT)\n    return KEPT\nKEPT = []\n", "def check(candidate):\n    kept = candidate(0)\n    kept += [1, 2]\n    assert candidate(None) == 2\n    kept.clear()\n    assert candidate(None) == 0\n"),
    "objects told apart by identity": ("    if any(x is v for v in SEEN): return True\n    SEEN.append(x)\n    return False\nSEEN = []\n", "def check(candidate):\n    a, b = [1], [1]\n    assert [candidate(a), candidate(b), candidate(a), candidate(b)] == [False, False, True, True]\n"),
    "deep answers go back in": ("    if isinstance(x, list): return x[0] if x else 0\n    v = []\n    for _ in range(x): v = [v]\n    return v\n", "def check(candidate):\n    v = candidate(149)\n    for _ in range(149): v = candidate(v)\n    assert v == []\n"),
    "many short lists": ("    x.append(len(x))\n    return x\n", "def check(candidate):\n    for i in range(1500):\n        v = [i]\n        assert candidate(v) is v and v == [i, 1]\n"),
    "a container of itself": ("    x.append(x)\n    return x\n", "def check(candidate):\n    v = [1]\n    assert candidate(v) is v and v[1] is v\n"),
    # What stays with the program.
    "a function as the answer": ("    def add(y, *, z=0): return x + y + z\n    return add\n", "def check(candidate):\n    add = candidate(1)\n    assert callable(add) and add.__name__ == 'add' and add(2, z=3) == 6\n    assert list(map(candidate(5), [1, 2])) == [6, 7]\n"),
    "a closure with state": ("    def count():\n        nonlocal x\n        x += 1\n        return x\n    return count\n", "def check(candidate):\n    c, d = candidate(0), candidate(10)\n    assert [c(), c(), d(), c()] == [1, 2, 11, 3]\n"),
    "a generator that is sent to": ("    total = x\n    while True:\n        v = yield total\n        total += v or 0\n", "def check(candidate):\n    g = candidate(1)\n    assert next(g) == 1 and g.send(5) == 6\n    g.close()\n    assert list(g) == []\n"),
    "a generator that is thrown into": ("    try: yield x\n    except ValueError as error: yield error.args[0]\n", "def check(candidate):\n    g = candidate(1)\n    assert next(g) == 1 and g.throw(ValueError('v')) == 'v'\n"),
    "an object of its own class": ("    class Stack:\n        def __init__(self): self.items = []\n        def push(self, v): self.items.append(v); return self\n        def __len__(self): return len(self.items)\n        def __getitem__(self, i): return self.items[i]\n    return Stack()\n", "def check(candidate):\n    s = candidate(0)\n    s.push(3).push(4)\n    assert len(s) == 2 and s[-1] == 4 and s.items == [3, 4] and list(s) == [3, 4]\n    s.items = [9]\n    assert s[0] == 9\n"),
    "a class as the answer": ("    class P:\n        def __init__(self, v): self.v = v\n        def twice(self): return 2 * self.v\n    return P\n", "def check(candidate):\n    P = candidate(0)\n    assert P(4).twice() == 8\n"),
    "a coroutine function": ("    import asyncio\n    async def work():\n        await asyncio.sleep(0.001)\n        return x + 1\n    return work()\n", "import asyncio\ndef check(candidate):\n    assert asyncio.run(candidate(1)) == 2\n"),
    "takes a function": ("    return [x(v) for v in (1, 2)]\n", "def check(candidate):\n    seen = []\n    assert candidate(lambda v: seen.append(v) or v * 3) == [3, 6]\n    assert seen == [1, 2]\n    assert candidate(str) == ['1', '2']\n"),
    "keeps a function for later": ("    if callable(x): FUNCTIONS.append(x)\n    else: return [g(x) for g in FUNCTIONS]\nFUNCTIONS = []\n", "def check(candidate):\n    candidate(lambda v: v + 1)\n    candidate(lambda v: v * 2)\n    for _ in range(3): assert candidate(5) == [6, 10]\n"),
    "takes an endless iterator": ("    import itertools\n    return list(itertools.islice(x, 3))\n", "import itertools\ndef check(candidate):\n    c = itertools.count(1)\n    assert candidate(c) == [1, 2, 3] and next(c) == 4\n"),
    "an exception out of the test's function": ("    try: x(1)\n    except KeyError as error: return error.args[0]\n", "def check(candidate):\n    def bad(v): raise KeyError(v + 1)\n    assert candidate(bad) == 2\n"),
    # Containers and values of the library.
    "a missing key of a defaultdict": ("    from collections import defaultdict\n    d = defaultdict(lambda: [x])\n    return d\n", "def check(candidate):\n    d = candidate(7)\n    assert d[1] == [7] and d == {1: [7]}\n"),
    "zones and folds": ("    import datetime as t\n    from zoneinfo import ZoneInfo\n    u = t.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo('Europe/Berlin'))\n    return u, t.time(1, 2, tzinfo=t.timezone(t.timedelta(hours=x), 'X'))\n", "import datetime as t\nfrom zoneinfo import ZoneInfo\ndef check(candidate):\n    u, v = candidate(2)\n    assert u.utcoffset() == t.timedelta(hours=1) and u.fold == 1 and u.tzinfo is ZoneInfo('Europe/Berlin')\n    assert v.utcoffset() == t.timedelta(hours=2) and v.tzname() == 'X'\n"),
    "an exception group with notes and a cause": ("    try:\n        raise KeyError('inner')\n    except KeyError as inner:\n        error = ExceptionGroup('g', [ValueError(1), TypeError('t')])\n        error.add_note('a note')\n        raise error from inner\n", "def check(candidate):\n    try: candidate(1)\n    except ExceptionGroup as error:\n        assert type(error.__cause__) is KeyError and error.__notes__ == ['a note']\n        assert [(type(e), e.args) for e in error.exceptions] == [(ValueError, (1,)), (TypeError, ('t',))]\n    else: assert False\n"),
    "integers beyond 4,300 digits": ("    return 10 ** x + 7\n", "def check(candidate):\n    assert candidate(9000) == 10 ** 9000 + 7\n    assert candidate(5000).bit_length() == (10 ** 5000 + 7).bit_length()\n"),
    "an event loop inside": ("    import asyncio\n    async def one(v):\n        await asyncio.sleep(0.001)\n        return await asyncio.to_thread(lambda: v * 2)\n    async def both(): return await asyncio.gather(*map(one, x))\n    return asyncio.run(both())\n", "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n"),
    # State that test and program share.
    "prints": ("    print('got', x)\n    import sys\n    sys.stderr.write('e')\n    return x\n", "import contextlib, io\ndef check(candidate):\n    out, err = io.StringIO(), io.StringIO()\n    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n        candidate(1)\n        candidate(2)\n    assert (out.getvalue(), err.getvalue()) == ('got 1\\ngot 2\\n', 'ee')\n"),
    "reads": ("    return input() + input(x)\n", "import io, sys\ndef check(candidate):\n    sys.stdin = io.StringIO('a\\nb\\nc\\nd\\n')\n    assert candidate('?') == 'ab' and candidate('?') == 'cd'\n"),
    "draws": ("    import random\n    return random.random(), random.sample(range(100), x)\n", "import random\ndef check(candidate):\n    random.seed(42)\n    drawn = candidate(3)\n    after = random.random()\n    random.seed(42)\n    assert drawn == (random.random(), random.sample(range(100), 3)) and after == random.random()\n"),
    "computes in the test's precision": ("    from decimal import Decimal\n    return Decimal(1) / Decimal(x)\n", "import decimal\ndef check(candidate):\n    decimal.getcontext().prec = 5\n    assert str(candidate(3)) == '0.33333'\n    with decimal.localcontext() as context:\n        context.prec = 2\n        assert str(candidate(3)) == '0.33'\n    assert str(candidate(7)) == '0.14286'\n"),
    "is looked at": ("    return x\nf.__doc__ = 'Text.'\n", "import inspect\ndef check(candidate):\n    assert candidate.__doc__ == 'Text.' and candidate.__name__ == 'f'\n    assert str(inspect.signature(candidate)) == '(x)'\n    assert candidate(1) == 1\n"),
    "its cache is asked": ("    return CALLS.append(x) or x\nCALLS = []\nimport functools\nf = functools.lru_cache(f)\n", "def check(candidate):\n    candidate(1), candidate(1), candidate(2)\n    assert candidate.cache_info()[:2] == (1, 2)\n"),
}  # fmt: skip
HONEST_PROMPTS = {
    "classes of the prompt": (
        "import enum\nfrom collections import namedtuple\nfrom dataclasses import dataclass\nPoint = namedtuple('Point', 'x y')\n\n\n"
        "class Color(enum.Enum):\n    RED = 1\n    BLUE = 2\n\n\n@dataclass\nclass Node:\n    value: int\n    next: 'Node' = None\n\n\n"
        "class Stack(list):\n    __slots__ = ('name',)\n\n\ndef f(x):\n    '''Doc.'''\n",
        "    if isinstance(x, Node):\n        x.value += 1\n        return x.next\n    if isinstance(x, Color): return Color.BLUE if x is Color.RED else Color.RED\n"
        "    if isinstance(x, Point): return x._replace(y=9)\n    s = Stack([x])\n    s.name = 'n'\n    return s\n",
        "def check(candidate):\n    tail = Node(2)\n    head = Node(1, tail)\n    assert candidate(head) is tail and head == Node(2, Node(2))\n"
        "    assert candidate(tail) is None and tail.value == 3\n    tail.next = head\n    assert candidate(tail) is head and tail.value == 4\n"
        "    assert candidate(Color.RED) is Color.BLUE\n    p = candidate(Point(1, 2))\n    assert p == Point(1, 9) and p.y == 9 and type(p) is Point\n"
        "    s = candidate(4)\n    assert type(s) is Stack and s == [4] and s.name == 'n'\n    s.append(5)\n",
    ),
    "a slotted and frozen dataclass": (
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True, slots=True)\nclass P:\n    x: int\n    tags: tuple = ()\n\n\ndef f(x):\n    '''Doc.'''\n",
        "    return {P(x, ('a',)): [P(x)]}\n",
        "def check(candidate):\n    assert candidate(3) == {P(3, ('a',)): [P(3)]}\n",
    ),
}
# Right about most, wrong about one thing that its test checks: `failed`, never `error`.
DISHONEST = {
    "a mutable default": ("    return g(x)\ndef g(x, acc=[]):\n    acc.append(x)\n    return acc\n", "def check(candidate):\n    first = candidate(1)\n    candidate(2)\n    assert first == [1]\n"),
    "an argument kept and emptied": ("    KEPT.append(x)\n    for v in KEPT[:-1]: v.clear()\n    return sum(x)\nKEPT = []\n", "def check(candidate):\n    a = [1, 2]\n    assert candidate(a) == 3 and candidate([5]) == 5\n    assert a == [1, 2]\n"),
    "a cache that hands out its own list": ("    return g(x)\nimport functools\n@functools.lru_cache\ndef g(x): return list(range(x))\n", "def check(candidate):\n    a = candidate(3)\n    a.append(9)\n    assert candidate(3) == [0, 1, 2]\n"),
    "a nested part that is shared": ("    ROW.append(x)\n    return {'row': ROW}\nROW = []\n", "def check(candidate):\n    a = candidate(1)\n    candidate(2)\n    assert a == {'row': [1]}\n"),
    "a function that empties its argument later": ("    return lambda: x.clear()\n", "def check(candidate):\n    a = [1]\n    candidate(a)()\n    assert a == [1]\n"),
    "an answer too deep": ("    v = []\n    for _ in range(151): v = [v]\n    return v\n", "def check(candidate):\n    assert candidate(1) == 1\n"),
    "deeper and deeper through the test": ("    v = ()\n    for _ in range(148): v = (v,)\n    return v\n", "def check(candidate):\n    assert candidate((((candidate(1),),),)) == 1\n    assert candidate([list(candidate(1))]) == 1\n"),
    "too large through the test": ("    return 'A' * ((64 << 20) - 100)\n", "def check(candidate):\n    assert candidate(candidate(1) + 'x' * 100) == 1\n"),
}  # fmt: skip
# Proxies, classes, written-back objects and crossing state, used to pass or to force an error.
_ALL = "    class All:\n        __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda *_: True\n        __hash__ = lambda self: 0\n        __add__ = __sub__ = __abs__ = __radd__ = __rsub__ = lambda *_: All()\n"
_PLAIN = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(41) == 42\n"
_POINT = "from dataclasses import dataclass\n\n\n@dataclass\nclass Point:\n    x: int\n\n\ndef f(x):\n    '''Doc.'''\n"
HOSTILE = {
    "equal to all": (_ALL + "    return All()\n", _PLAIN),
    "near all": (_ALL + "    return All()\n", "def check(candidate):\n    assert abs(candidate(1) - 2) < 1e-6\n"),
    "among all": (_ALL + "    return All()\n", "def check(candidate):\n    assert candidate(1) in (2, 3)\n"),
    "a list of equals": (_ALL + "    return [All()]\n", "def check(candidate):\n    assert candidate(1) == [2]\n"),
    "a key equal to all": (_ALL + "    return {All(): 1}\n", "def check(candidate):\n    assert candidate(1) == {2: 1}\n"),
    "a proxy as its own class": (_ALL + "    All.__class__ = int\n    return All()\n", "def check(candidate):\n    assert isinstance(candidate(1), int)\n"),
    "empties what is expected": ("    x.clear()\n    return True\n", "def check(candidate):\n    want = [1, 2]\n    assert candidate(want) and len(want) == 2\n"),
    "the globals of the test's function": ("    return x.__globals__['check'].__code__.co_consts\n", "def check(candidate):\n    assert candidate(lambda: 1) == 2\n"),
    "describes itself as nonsense": ("    return x\nf.__signature__ = 5\nf.__doc__ = 5\n", "import inspect\ndef check(candidate):\n    assert candidate.__doc__ is None and candidate(1) == 2\n"),
    "writes a verdict": ("    import os\n    for d in range(3, 9):\n        try: os.write(d, b'[\"passed\", \"\"]\\n')\n        except OSError: pass\n    return 0\n", _PLAIN),
    "prints without end": ("    for _ in range(20): print('x' * 1000000)\n    return 0\n", "import io, contextlib\ndef check(candidate):\n    with contextlib.redirect_stdout(io.StringIO()): assert candidate(1) == 2\n"),
    "a state of random that breaks": ("    import random\n    random.getstate = lambda: 'x'\n    return 0\n", "import random\ndef check(candidate):\n    random.seed(1)\n    assert candidate(1) == 2\n"),
    "a state that cannot be taken": ("    import random\n    random.getstate = lambda: 1 / 0\n    return 2\n", "import random\ndef check(candidate):\n    random.seed(1)\n    assert candidate(1) == 2\n"),
    "a stream that lies": ("    import sys, io\n    sys.stdin = io.StringIO('x' * 100)\n    sys.stdin.seek(90)\n    return 0\n", "import io, sys\ndef check(candidate):\n    sys.stdin = io.StringIO('ab')\n    assert candidate(1) == 2\n"),
    "an exception that forges": ("    class E(BaseException):\n        def __reduce__(self): return (eval, ('1',))\n    raise E\n", _PLAIN),
    "an iterator that answers later": ("    KEPT.append(x)\n    return (v for v in KEPT)\nKEPT = []\n", "def check(candidate):\n    first = candidate(1)\n    candidate(2)\n    assert list(first) == [1]\n"),
    "calls without end": ("    return x()\n", "def check(candidate):\n    def again(): return candidate(again)\n    assert candidate(again) == 2\n"),
    "a returned function that dies": ("    import os\n    return lambda: os._exit(0)\n", "def check(candidate):\n    g = candidate(1)\n    try: g()\n    except Exception: pass\n"),
    "leaves a name of the test unset": ("    return []\n", "def check(candidate):\n    for v in candidate(1): last = v\n    assert last == 2\n"),
    "fails where the test has a word in a string": ("    return x\n", "def check(candidate):\n    assert candidate('mock os.environ') == 'other', 'mock.patch'\n"),
}  # fmt: skip
# The prompt's classes, made anew by the program so that they are equal to all; the checker has its own.
HOSTILE_PROMPTS = {
    "another class of the same name": (
        _POINT,
        "    return Point(x)\nclass Point:\n    def __init__(self, x): self.x = x\n    __eq__ = lambda *_: True\n",
        "def check(candidate):\n    assert candidate(1) == Point(2)\n",
    ),
    "an attribute that is equal to all": (
        _POINT,
        _ALL + "    return Point(All())\n",
        "def check(candidate):\n    assert candidate(1) == Point(2)\n",
    ),
    "methods put into an instance": (
        _POINT,
        "    p = Point(1)\n    p.__dict__['__eq__'] = p.__dict__['__class__'] = 5\n    return p\n",
        "def check(candidate):\n    assert candidate(1) == Point(2)\n",
    ),
    "a member that is none": (
        "import enum\n\n\nclass C(enum.Enum):\n    A = 1\n\n\ndef f(x):\n    '''Doc.'''\n",
        "    m = object.__new__(C)\n    m._value_ = 7\n    return m\n",
        "def check(candidate):\n    assert candidate(1) is C.A\n",
    ),
}
# What a test does to its own process and cannot be judged elsewhere: `error`, with the reason.
NOT_JUDGED = {
    "a patched module": ("    import os\n    return os.getcwd()\n", "from unittest import mock\ndef check(candidate):\n    with mock.patch('os.getcwd', return_value='/x'):\n        assert candidate(1) == '/x'\n"),
    "contains all": (_ALL + "    return All()\n", "def check(candidate):\n    assert 5 in candidate(2)\n"),
    "an instance of the test's class": ("    return x.v\n", "class A:\n    v = 1\ndef check(candidate):\n    assert candidate(A()) == 1\n"),
}  # fmt: skip
