# ruff: noqa: E501
"""Programs about proxies, values of the library and what a program may choose: `(completion, test)` by name; those with
a prompt of their own `(prompt, completion, test)`.
"""

# Right in plain Python.
HONEST = {
    "isgenerator": ("    yield x\n", "import inspect, types\ndef check(candidate):\n    g = candidate(1)\n    assert inspect.isgenerator(g) and isinstance(g, types.GeneratorType) and list(g) == [1]\n"),
    "isfunction": ("    return lambda: x\n", "import inspect, types\ndef check(candidate):\n    g = candidate(1)\n    assert isinstance(g, types.FunctionType) and g() == 1\n"),
    "nan identity": ("    return list(x)\n", "def check(candidate):\n    nan = float('nan')\n    assert candidate([1.0, nan]) == [1.0, nan]\n"),
    "math.nan": ("    import math\n    return [math.nan]\n", "import math\ndef check(candidate):\n    assert candidate(1) == [math.nan]\n"),
    "sentinel": ("    return x\n", "def check(candidate):\n    s = object()\n    assert candidate(s) is s\n"),
    "stringio arg": ("    return x.read().split()\n", "import io\ndef check(candidate):\n    assert candidate(io.StringIO('a b')) == ['a', 'b']\n"),
    "exception class arg": ("    try: raise x('v')\n    except x as e: return type(e).__name__\n", "def check(candidate):\n    assert candidate(ValueError) == 'ValueError'\n"),
    "class arg": ("    return isinstance({}, x)\n", "import collections\ndef check(candidate):\n    assert candidate(collections.OrderedDict) is False\n"),
    "library function arg": ("    return x(4) if callable(x) else 0\n", "import math\ndef check(candidate):\n    assert candidate(math.sqrt) == 2.0\n"),
    "ChainMap": ("    from collections import ChainMap\n    return ChainMap({'a': 1}, {'b': x})\n", "from collections import ChainMap\ndef check(candidate):\n    c = candidate(2)\n    assert c == ChainMap({'a': 1}, {'b': 2}) and c['b'] == 2 and c == {'a': 1, 'b': 2}\n"),
    "array": ("    from array import array\n    return array('i', [1, x])\n", "from array import array\ndef check(candidate):\n    assert candidate(2) == array('i', [1, 2])\n"),
    "UserDict": ("    from collections import UserDict\n    return UserDict(a=x)\n", "from collections import UserDict\ndef check(candidate):\n    assert candidate(2) == {'a': 2}\n"),
    "namespace": ("    from types import SimpleNamespace as S\n    return S(a=x)\n", "from types import SimpleNamespace as S\ndef check(candidate):\n    assert candidate(2) == S(a=2) and candidate(2).a == 2\n"),
    "path": ("    from pathlib import PurePosixPath as S\n    return S('a') / x\n", "from pathlib import PurePosixPath as S\ndef check(candidate):\n    assert candidate('b') == S('a/b')\n"),
    "uuid": ("    import uuid\n    return uuid.UUID(int=x)\n", "import uuid\ndef check(candidate):\n    assert candidate(5) == uuid.UUID(int=5)\n"),
    "slice": ("    return slice(x, 2)\n", "def check(candidate):\n    assert candidate(5) == slice(5, 2)\n"),
    "mappingproxy": ("    import types\n    return types.MappingProxyType({'a': x})\n", "def check(candidate):\n    assert candidate(5) == {'a': 5}\n"),
    "HTTPStatus": ("    from http import HTTPStatus\n    return HTTPStatus(x)\n", "from http import HTTPStatus\ndef check(candidate):\n    assert candidate(404) is HTTPStatus.NOT_FOUND and candidate(404).name == 'NOT_FOUND'\n"),
    "parse result": ("    from urllib.parse import urlparse\n    return urlparse(x)\n", "def check(candidate):\n    assert candidate('http://a/b').netloc == 'a'\n"),
    "recursion limit": ("    return 0 if x == 0 else 1 + f(x - 1)\n", "import sys\ndef check(candidate):\n    sys.setrecursionlimit(5000)\n    assert candidate(2000) == 2000\n"),
    "type name": ("    class Stack: pass\n    return Stack()\n", "def check(candidate):\n    assert type(candidate(1)).__name__ == 'Stack'\n"),
    "a missing key of a class of its own": ("    class T(dict):\n        def __missing__(self, k): return k\n    return T()\n", "def check(candidate):\n    assert candidate(1)[5] == 5\n"),
    "gen finally on close": ("    try: yield x\n    finally: LOG.append(1)\nLOG = []\ndef g(): pass\n", "def check(candidate):\n    g = candidate(1); next(g); g.close()\n    assert list(g) == []\n"),
    "a tree that grows by missing keys": ("    class T(dict):\n        def __missing__(self, k):\n            self[k] = T()\n            return self[k]\n    return T()\n", "def check(candidate):\n    t = candidate(1)\n    t['a']['b'] = 5\n    assert t == {'a': {'b': 5}}\n"),
    "int enum of completion": ("    import enum\n    class C(enum.IntEnum):\n        A = 5\n    return C.A\n", "def check(candidate):\n    assert candidate(1) == 5\n"),
    "intflag": ("    import re\n    return re.I | re.M\n", "import re\ndef check(candidate):\n    assert candidate(1) == re.I | re.M\n"),
    "stringio written": ("    print('hi', file=x)\n    x.write('!')\n", "import io\ndef check(candidate):\n    s = io.StringIO()\n    candidate(s)\n    assert s.getvalue() == 'hi\\n!'\n"),
    "stringio closed": ("    with x: return list(x)\n", "import io\ndef check(candidate):\n    s = io.StringIO('a\\nb')\n    assert candidate(s) == ['a\\n', 'b'] and s.closed\n"),
    "bytesio iter": ("    return next(x)\n", "import io\ndef check(candidate):\n    s = io.BytesIO(b'a\\nb')\n    assert candidate(s) == b'a\\n' and s.read() == b'b'\n"),
    "set changed": ("    x.add(9); x.discard(1)\n", "def check(candidate):\n    s = {1, 2}\n    candidate(s)\n    assert s == {2, 9}\n"),
    "array changed": ("    x.append(9); x[0] = 7\n", "from array import array\ndef check(candidate):\n    s = array('q', [1, 2])\n    candidate(s)\n    assert s == array('q', [7, 2, 9])\n"),
    "equal but other": ("    x[0] = True\n", "def check(candidate):\n    s = [1]\n    candidate(s)\n    assert s[0] is True\n"),
    "callable class instance": ("    class C:\n        def __init__(self): self.n = 0\n        def __call__(self): self.n += 1; return self.n\n    return C()\n", "def check(candidate):\n    c = candidate(1); c(); c()\n    assert c.n == 2\n"),
    "partial": ("    import functools\n    return functools.partial(pow, x)\n", "def check(candidate):\n    p = candidate(2)\n    assert p(3) == 8 and p.args == (2,)\n"),
    "function attribute counted": ("    f.calls += 1\n    return x\nf.calls = 0\n", "def check(candidate):\n    candidate(1); candidate(2)\n    assert candidate.calls == 2\n"),
    "signature of a returned function": ("    def g(a, b=x, *, c): return a\n    return g\n", "import inspect\ndef check(candidate):\n    assert str(inspect.signature(candidate(3))) == '(a, b=3, *, c)'\n"),
}  # fmt: skip
HONEST_PROMPTS = {
    "async gen": ("async def f(x):\n    '''Doc.'''\n", "    for i in range(x): yield i\n", "import asyncio\ndef check(candidate):\n    async def main(): return [v async for v in candidate(3)]\n    assert asyncio.run(main()) == [0, 1, 2]\n"),
    "namedtuple other name": ("from collections import namedtuple\nPoint = namedtuple('P', 'x y')\n\ndef f(x):\n    '''Doc.'''\n", "    return Point(x, 2)\n", "def check(candidate):\n    assert candidate(5).x == 5 and candidate(5) == (5, 2)\n"),
    "nested class": ("from dataclasses import dataclass\nclass Outer:\n    @dataclass\n    class In:\n        x: int\n\ndef f(x):\n    '''Doc.'''\n", "    return Outer.In(x)\n", "def check(candidate):\n    assert candidate(5) == Outer.In(5)\n"),
    "setattr of instance": ("class S: pass\n\ndef f(x):\n    '''Doc.'''\n", "    x.v = [x.v]\n    x.w = 1\n", "def check(candidate):\n    s = S(); s.v = 1\n    candidate(s)\n    assert s.v == [1] and s.w == 1\n"),
    "an async stand-in": ("async def f(x):\n    '''Doc.'''\n", "    return x + 1\n", "import asyncio\ndef check(candidate):\n    async def main(): return await asyncio.gather(candidate(1), candidate(2))\n    assert asyncio.run(main()) == [2, 3]\n"),
}  # fmt: skip
# None may pass, and none may choose an error: plain Python fails them, or their process ends.
HOSTILE = {
    "dies in a function that it returned": ("    import os\n    return lambda: os._exit(0)\n", "def check(candidate):\n    g = candidate(1)\n    try: g()\n    except Exception: pass\n"),
    "too deep an answer of a function that it returned": ("    def g():\n        v = []\n        for _ in range(200): v = [v]\n        return v\n    return g\n", "def check(candidate):\n    g = candidate(1)\n    try: g()\n    except Exception: pass\n    else: assert False\n"),
    "ends the test's map by a function that it returned": ("    def g(v): raise StopIteration\n    return g\n", "def check(candidate):\n    assert all(map(candidate(1), [1, 2]))\n"),
    "ends as soon as it is loaded": ("    return 0\nimport os, threading, time\nthreading.Thread(target=lambda: (time.sleep(0.0005), os._exit(0))).start()\n", "def check(candidate):\n    assert candidate(1) == 2\n"),
    "builtin entry, described": ("    return 0\nf = len\n", "import inspect\ndef check(candidate):\n    assert candidate(1) == 2\n"),
    "entry property raises": ("    return 0\nclass C:\n    @property\n    def __annotations__(self): 1/0\n    def __call__(self, x): return 0\nf = C()\n", "import inspect\ndef check(candidate):\n    assert candidate(1) == 2\n"),
    "leaves a local of the test unset": ("    return []\n", "def check(candidate):\n    for v in candidate(3): last = v\n    assert last == 2\n"),
    "leaves a global of the test unset": ("    return []\n", "for_all = 1\ndef check(candidate):\n    global last\n    for v in candidate(3): last = v\n    assert last == 2\n"),
    "an answer decides how deep the next argument is": ("    return 400 if x == 0 else 1\n", "def check(candidate):\n    v = []\n    for _ in range(candidate(0)): v = [v]\n    assert candidate(v) == 2\n"),
    "a word in a string": ("    return 0\n", "def check(candidate):\n    assert candidate('mocking') == 2\n"),
    "a copy of what stays with the program": ("    import re\n    return re.compile('x') if x == 1 else 0\n", "import copy\ndef check(candidate):\n    assert candidate(copy.copy(candidate(1))) == 2\n"),
    "dies as an attribute is read": ("    class T:\n        @property\n        def y(self):\n            import os; os._exit(0)\n    return T()\n", "def check(candidate):\n    assert not hasattr(candidate(1), 'z')\n    try: candidate(1).y\n    except BaseException: pass\n"),
    "ends as an object of it is given up": ("    import os\n    class D:\n        def __del__(self): os._exit(0)\n    return D()\n", "def check(candidate):\n    d = candidate(1)\n    del d\n    try: r = candidate(2)\n    except BaseException: r = 0\n    assert r == 3\n"),
    "callback called with a proxy equal": ("    class T:\n        def __eq__(s, o): return True\n    return x(T())\n", "def check(candidate):\n    assert candidate(lambda v: v == 5) is True\n"),
    "answers decide depth by helper": ("    return 400 if x == 0 else 1\n", "def run(v, c): return c(v)\ndef check(candidate):\n    v = []\n    n = run(0, candidate)\n    while n > 0:\n        v = [v]; n -= 1\n    assert run(v, candidate) == 2\n"),
    "a written-back number decides how deep the next argument is": ("    if isinstance(x, list): x.append(300)\n    return 1\n", "def check(candidate):\n    n = []\n    candidate(n)\n    v = []\n    for _ in range(n[0]): v = [v]\n    assert candidate(v) == 2\n"),
    "dict subclass lies": ("    class T(dict):\n        def __missing__(self, k): return 2\n        def __eq__(s, o): return True\n    return T()\n", "def check(candidate):\n    assert candidate(1) == {1: 2}\n"),
    "namespace of proxies": ("    from types import SimpleNamespace as S\n    class A:\n        __eq__ = lambda *_: True\n    return S(a=A())\n", "from types import SimpleNamespace as S\ndef check(candidate):\n    assert candidate(1) == S(a=2)\n"),
    "user list over a proxy": ("    from collections import UserList\n    class B:\n        __eq__ = lambda *_: True\n    u = UserList(); u.data = B()\n    return u\n", "def check(candidate):\n    assert candidate(1) == [2]\n"),
    "a callable object is no function": ("    class C:\n        def __call__(self): return 2\n    return C()\n", "import types\ndef check(candidate):\n    assert isinstance(candidate(1), types.FunctionType)\n"),
    "a stream at an absurd place": ("    x.seek(10 ** 15)\n", "import io\ndef check(candidate):\n    s = io.StringIO('abc')\n    candidate(s)\n    s.write('d')\n    assert s.getvalue() == 'abcd'\n"),
    "a state of random that overflows": ("    import random\n    random.getstate = lambda: (3, (2 ** 80,) * 625, None)\n    return 1\n", "import random\ndef check(candidate):\n    random.seed(1)\n    assert candidate(1) == 2\n"),
    "swallows the callback's assertion": ("    try: x(0)\n    except BaseException: pass\n    return 1\n", "def check(candidate):\n    seen = []\n    def cb(v):\n        seen.append(v)\n        assert v == 1\n    candidate(cb)\n    assert seen == [1]\n"),
    "an annotation that fails": ("    return 1\nf.__annotations__ = {'x': 5, 5: 6}\n", "import inspect\ndef check(candidate):\n    assert candidate(1) == 2\n"),
    "sends out of band": ("    import socket\n    a, b = socket.socketpair()\n    try: a.send(b'x', socket.MSG_OOB)\n    except OSError: return 0\n    return 2\n", "def check(candidate):\n    assert candidate(1) == 2\n"),
    "peeks": ("    import socket\n    a, b = socket.socketpair()\n    a.send(b'x')\n    try: b.recv(1, socket.MSG_PEEK)\n    except OSError: return 0\n    return 2\n", "def check(candidate):\n    assert candidate(1) == 2\n"),
    "datagrams": ("    import socket\n    try: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n    except OSError: return 0\n    return 2\n", "def check(candidate):\n    assert candidate(1) == 2\n"),
}  # fmt: skip
HOSTILE_PROMPTS = {
    "enum member's value rewritten": ("import enum\nclass C(enum.Enum):\n    A = 1\n    B = 2\n\ndef f(x):\n    '''Doc.'''\n", "    C.A._value_ = 2\n    return C.A\n", "def check(candidate):\n    c = C.A\n    assert candidate(c).value == 1 and C.A.value == 1 and candidate(1) is C.B\n"),
}  # fmt: skip
# The test's own need: `error`, whatever the program.
NOT_JUDGED = {
    "module attribute patched": ("    import math\n    return math.pi\n", "import math\ndef check(candidate):\n    math.pi = 3\n    assert candidate(1) == 3\n"),
    "callback result cannot cross": ("    return x('ab').group()\n", "import re\ndef check(candidate):\n    assert candidate(lambda v: re.match('a', v)) == 'a'\n"),
    "argument of returned function cannot cross": ("    return lambda r: r.random() < 1\n", "import random\ndef check(candidate):\n    assert candidate(1)(random.Random(1))\n"),
}  # fmt: skip
