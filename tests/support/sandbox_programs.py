# ruff: noqa: E501
"""Programs for the sandbox, honest and hostile, with the verdict that each must get."""

from shared.eval.sandbox.runner import Candidate, run_candidates
from tests.support import sandbox_attacks as attacks
from tests.support import sandbox_crossing as crossing
from tests.support import sandbox_library as library
from tests.support import sandbox_unusual as unusual

TEST = """
def check(candidate):
    assert candidate(1) == 2
    assert candidate(41) == 42
    assert candidate(-1) == 0
"""
HEAD = 'def f(x):\n    """Return x + 1."""\n'


def program(completion, test=TEST, prompt=HEAD, same_process=False):
    return Candidate(prompt=prompt, completion=completion, test=test, entry_point="f", same_process=same_process)


def raising(action):
    """Right if an action that must be refused is refused; wrong otherwise."""
    return f"""    try:
        {action}
    except (OSError, ValueError):
        return x + 1
    return "not refused"
"""


def syscall(name, x86_64, aarch64, *arguments):
    """Calls the kernel past the C library."""
    return f"""    import ctypes, platform
    number = {{"x86_64": {x86_64}, "aarch64": {aarch64}}}[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, {arguments!r}))
    assert result == -1 and ctypes.get_errno() in (1, 38), ({name!r}, result, ctypes.get_errno())
    return x + 1
"""


# Refused, and the program that reports so passes: `not refused` or an assertion would fail it.
REFUSED = {
    "io_uring": syscall("io_uring_setup", 425, 425, 8, 0),
    "memfd": syscall("memfd_create", 319, 279, 0, 0),
    "ptrace": syscall("ptrace", 101, 117, 16, 1, 0, 0),
    "process_vm_writev": syscall("process_vm_writev", 311, 271, 1, 0, 0, 0, 0, 0),
    "inotify": syscall("inotify_init1", 294, 26, 0),
    "System V shared memory": syscall("shmget", 29, 194, 0, 4096, 0o1600),
    "System V messages": syscall("msgget", 68, 186, 0, 0o1600),
    "keys": syscall("keyctl", 250, 219, 0, -3, 0),
    "userfaultfd": syscall("userfaultfd", 323, 282, 0),
    "bpf": syscall("bpf", 321, 280, 0, 0, 0),
    "perf": syscall("perf_event_open", 298, 241, 0, 0, 0, 0, 0),
    "namespaces": syscall("unshare", 272, 97, 0x10000000),
    "mounts": syscall("mount", 165, 40, 0, 0, 0, 0, 0),
    "kill everything": syscall("kill", 62, 129, -1, 9),
    "tgkill": syscall("tgkill", 234, 131, 1, 1, 9),
    "pidfd": syscall("pidfd_open", 434, 434, 1, 0),
    "limits of another process": syscall("prlimit64", 302, 261, 1, 7, 0, 0),
    "limits of its own": raising("import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"),
    "a process by clone": syscall("clone", 56, 220, 17, 0, 0, 0, 0),
    "a process by clone3": syscall("clone3", 435, 435, 0, 0),
    "opening by openat2": syscall("openat2", 437, 437, -100, 0, 0, 0),
    "abstract sockets": raising("import socket; socket.socket(socket.AF_UNIX).bind('\\0name')"),
    "sending to an address": raising("import socket; a, _ = socket.socketpair(); a.sendto(b'x', '\\0name')"),
    "memory of itself": raising("open('/proc/self/mem', 'r+b')"),
    "memory of its parent": raising("import os; open(f'/proc/{os.getppid()}/mem', 'rb')"),
    "shared memory": raising("open('/dev/shm/x', 'xb')"),
    "removing": raising("import os; os.unlink(os.__file__)"),
    "renaming": raising("import os; os.rename(os.__file__, '/tmp/x')"),
    "truncating": raising("import os; os.truncate(os.__file__, 0)"),
    "modes": raising("import os; os.chmod('/', 0o777)"),
    "folders": raising("import os; os.mkdir('/tmp/x')"),
    "times": raising("import os; os.utime(os.__file__)"),
    "signals by fcntl": raising("import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())"),
    "locks": raising("import fcntl; fcntl.flock(0, fcntl.LOCK_EX)"),
    "becoming root": raising("import os; os.setuid(0)"),
    "priorities": raising("import os; os.setpriority(os.PRIO_PROCESS, 0, 19)"),
    "sessions": raising("import os; os.setsid()"),
    "tracing of signals": raising("import signal; signal.pidfd_send_signal(0, 9)"),
}

LIAR = """    return Liar()
class Liar({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 2
    def __bool__(self): return True
    def __getattr__(self, name): return self
    __class__ = property(lambda self: int)
"""
FORGED = (
    "struct.pack('<Q', 1) + b'L'",
    'b\'["passed", ""]\\n\'',
    'b\'\\n["passed", ""]\\n\' * 100',
    "struct.pack('<Q', 11) + b'RN' + bytes(4) + b'N' + bytes(4)",  # an answer: None
)
EVERYWHERE = "for d in [*range(64), *range(1000, 1010)]:\n    try: os.write(d, {data})\n    except OSError: pass\n"

# None of these may pass. More than one verdict where the machine decides.
HOSTILE = {
    "ends the test's map": (
        "    raise StopIteration\n",
        "failed",
        "def check(candidate):\n    assert all(map(candidate, [1, 2]))\n",
    ),
    "ends the test's zip": (
        "    raise StopIteration\n",
        "failed",
        "def check(candidate):\n    for got, want in zip(map(candidate, [1]), [2]): assert got == want\n",
    ),
    "an exception whose arguments exit": (
        "    class E(Exception):\n        @property\n        def args(self): raise SystemExit(0)\n    raise E\n",
        "failed",
    ),
    "equal to everything": (LIAR.format(base=""), "failed"),
    "an int equal to everything": (LIAR.format(base="int"), "failed"),
    "a str equal to everything": (LIAR.format(base="str"), "failed"),
    "a list equal to everything": (LIAR.format(base="list"), "failed"),
    **{
        f"forged message {i}": (
            f"    return 0\nimport os, struct\n{EVERYWHERE.format(data=data)}",
            ("failed", "killed"),
        )
        for i, data in enumerate(FORGED)
    },
    "forged messages from a thread": (
        "    return 0\nimport os, struct, threading, time\ndef forge():\n    while True:\n        for d in range(64):\n"
        f"            try: os.write(d, {FORGED[-1]})\n            except OSError: pass\n"
        "threading.Thread(target=forge, daemon=True).start()\ntime.sleep(0.1)\n",
        ("failed", "killed"),
    ),
    "descriptors closed": ("    return 0\nimport os\nos.closerange(0, 64)\n", ("failed", "killed")),
    "descriptors closed in the call": ("    import os\n    os.closerange(0, 64)\n    return x + 1\n", "killed"),
    "descriptors exchanged": (
        "    return x + 1\nimport os\nfor d in range(3, 64):\n    try: os.dup2(1, d)\n    except OSError: pass\n",
        ("killed", "failed", "timed out"),
    ),
    "vanishes in the call": ("    import os\n    os._exit(0)\n", "killed"),
    "vanishes inside the test's except": (
        "    import os\n    os._exit(0)\n",
        "killed",
        "def check(candidate):\n    try: candidate(1)\n    except BaseException: pass\n",
    ),
    "vanishes after the first answer": (
        "    import os, threading\n    threading.Timer(0.05, os._exit, [0]).start()\n    return x + 1\n",
        "killed",
        "def check(candidate):\n    import time\n    assert candidate(1) == 2\n    time.sleep(0.3)\n"
        "    assert candidate(2) == 3\n",
    ),
    "exit at exit": ("    return 0\nimport atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)\n", "failed"),
    "exception hook": ("    return 0\nimport sys, os\nsys.excepthook = lambda *a: os._exit(0)\n1/0\n", "failed"),
    "endless destructor": (
        "    return E()\nclass E:\n    def __del__(self):\n        while True: pass\n",
        ("failed", "timed out"),
    ),
    "answers from frames": (
        "    import sys\n    frame = sys._getframe()\n    while frame:\n        for value in frame.f_locals.values():\n"
        "            if ''.join(reversed('24 ==')) in str(value): return x + 1\n        frame = frame.f_back\n",
        "failed",
    ),
    "answers from all objects": (
        "    import gc\n    found = [o for o in gc.get_objects() if ''.join(reversed('24 ==')) in repr(o)[:10000]]\n"
        "    return x + 1 if found else 0\n",
        "failed",
    ),
    "answers from memory": (
        "    return x + 1 if b'candidate' in open('/proc/self/mem', 'rb').read() else 0\n",
        "failed",
    ),
    "answers from files": (
        "    import os\n    for root, _, files in os.walk('/'):\n        for name in files:\n"
        "            if 'HumanEval' in name or name.endswith('.jsonl'): return x + 1\n    return 0\n",
        "failed",
    ),
    "answers from the environment": (
        "    import os\n    return x + 1 if set(os.environ) - {'PYTHONHASHSEED', 'PATH', 'HOME', 'OMP_NUM_THREADS', "
        "'LC_CTYPE', 'PWD'} else 0\n",
        "failed",
    ),
    "trace function": (
        "    return 0\nimport sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\n",
        "failed",
    ),
    "builtins replaced": (
        "    return 0\nimport builtins, json, os\nfor m in (builtins, json, os):\n    for n in ('all', 'abs', 'sum', "
        "'isinstance', 'dumps', 'write'):\n        if hasattr(m, n): setattr(m, n, lambda *a, **k: True)\n",
        ("failed", "killed", "timed out"),
    ),
    "assertions replaced": ("    return 0\nimport builtins\nbuiltins.AssertionError = Warning\n", "failed"),
    "codec replaced": (
        "    return 0\nimport sys\nfor name, module in list(sys.modules.items()):\n    if 'sandbox' in name:\n"
        "        for n in vars(module).copy():\n            if not n.startswith('__'): setattr(module, n, None)\n",
        ("failed", "killed"),
    ),
    "deep": ("    v = []\n    for _ in range(100000): v = [v]\n    return v\n", ("failed", "killed")),
    "in itself": ("    v = []\n    v.append(v)\n    return v\n", "failed"),
    "a tuple in itself": ("    v = []\n    t = (v,)\n    v.append(t)\n    return t\n", "failed"),
    "huge int": ("    return 1 << (1 << 33)\n", ("failed", "killed", "timed out")),
    "large int": ("    return 1 << 100_000_000\n", "failed"),
    "huge text": ("    return 'x' * (1 << 30)\n", ("failed", "timed out")),
    "huge list": ("    return [None] * (200 << 20)\n", ("failed", "timed out")),
    "many of the same": (
        "    v = [0]\n    for _ in range(120): v = [v, v]\n    return v\n",
        ("failed", "timed out"),
        "def check(candidate):\n    assert str(candidate(1)) == 'x'\n",
    ),
    "memory in steps": ("    v = []\n    while True: v.append(bytearray(1 << 20))\n", ("failed", "timed out")),
    "threads without end": (
        "    import threading, time\n    while True:\n"
        "        threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n",
        ("failed", "killed", "timed out"),
    ),
    "recursion in C": (
        "    import sys\n    sys.setrecursionlimit(10**9)\n    g = lambda n: g(n + 1)\n    return g(0)\n",
        ("failed", "killed", "timed out"),
    ),
    "recursion while loading": ("    return 0\ndef g(): g()\ng()\n", "failed"),
    "signals ignored": (
        "    import signal\n    for s in range(1, 65):\n        try: signal.signal(s, signal.SIG_IGN)\n"
        "        except (OSError, ValueError): pass\n    while True: pass\n",
        "timed out",
    ),
    "sleeps at load": ("    return x + 1\nimport time\ntime.sleep(99)\n", "timed out"),
    "a regular expression without end": ("    import re\n    return re.match('(a+)+$', 'a' * 60 + 'b')\n", "timed out"),
    "an endless iterator": (
        "    import itertools\n    return itertools.count()\n",
        ("failed", "timed out", "killed"),
        "def check(candidate):\n    assert sum(candidate(1)) == 2\n",
    ),
    "an endless length": (
        "    class L(list):\n        def __iter__(self):\n            while True: yield 1\n    return L()\n",
        ("failed", "timed out", "killed"),
    ),
    "an exception that cannot be told": (
        "    class E(Exception):\n        def __str__(self): raise self\n        args = property(__str__)\n    raise E\n",
        ("failed", "killed"),
    ),
    "the test's own exception": (
        "    raise AssertionError\n",
        "failed",
        "def check(candidate):\n    assert candidate(1) == 2\n    assert True\n",
    ),
    "stops iteration": (
        "    raise StopIteration\n",
        "failed",
        "def check(candidate):\n    assert list(map(candidate, [1, 2])) == [2, 3]\n",
    ),
    "never called": ("    return 0\n", "failed", "def check(candidate):\n    pass\n"),
    "an unknown class": ("    class A: pass\n    return A()\n", "failed"),
    "an int with another index": (
        "    class I(int):\n        def __index__(self): return 2\n        __int__ = __index__\n    return I(0)\n",
        "failed",
    ),
    "a str that iterates as another": (
        "    class S(str):\n        def __str__(self): return self\n        def __iter__(self): return iter('2')\n    return S('x')\n",
        "failed",
    ),
    "a pickle that acts": (
        "    class P:\n        def __reduce__(self): import os; return os._exit, (0,)\n    return P()\n",
        "failed",
    ),
    "modules forgotten": ("    return 0\nimport sys\nsys.modules.clear()\n", ("failed", "killed")),
    "a huge exponent": ("    from decimal import Decimal\n    return Decimal('1e999999999')\n", "failed"),
    "a text that cannot be printed": ("    raise ValueError('\\ud800' * 1000)\n", "failed"),
    "a signal to itself": ("    import signal\n    signal.raise_signal(9)\n    return x + 1\n", "failed"),
    "abort": ("    import os\n    os.abort()\n", "killed"),
    "machine code that forks": (
        "    import ctypes, mmap, platform\n    if platform.machine() != 'x86_64': return 0\n"
        "    m = mmap.mmap(-1, 4096, prot=7)\n    m.write(b'\\xb8\\x39\\0\\0\\0\\x0f\\x05\\xc3')\n"
        "    run = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "    return x + 1 if run() >= 0 else 0\n",
        "failed",
    ),
    "32-bit system calls": (
        "    import ctypes, mmap, platform\n    if platform.machine() != 'x86_64': return 0\n"
        "    m = mmap.mmap(-1, 4096, prot=7)\n    m.write(b'\\xb8\\x02\\0\\0\\0\\xcd\\x80\\xc3')\n"
        "    run = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "    return x + 1 if run() >= 0 else 0\n",
        ("failed", "killed"),
    ),
}

EXPECT_ERROR = """
def check(candidate):
    try:
        candidate({argument})
    except {kind} as error:
        assert {condition}
    else:
        assert False
"""
HONEST = {
    "sorts in place": ("    x.sort()\n", "def check(candidate):\n    v = [2, 1]\n    assert candidate(v) is None\n    assert v == [1, 2]\n"),
    "changes a dict, a set, a bytearray and a deque": (
        "    a, b, c, d = x\n    a['k'] = 1; b.discard(1); c.append(3); d.rotate(1)\n",
        "from collections import deque\ndef check(candidate):\n    a, b, c, d = {}, {1, 2}, bytearray(b'a'), deque([1, 2])\n"
        "    candidate((a, b, c, d))\n    assert (a, b, c, d) == ({'k': 1}, {2}, bytearray(b'a\\3'), deque([2, 1]))\n",
    ),
    "nested and shared": (
        "    x[0].append(1)\n    x.append(x[0])\n    return x\n",
        "def check(candidate):\n    v = []\n    w = [v, v]\n    assert candidate(w) is w\n    assert w == [[1], [1], [1]]\n"
        "    assert w[2] is v and w[1] is v\n",
    ),
    "returns its argument": ("    return x\n", "def check(candidate):\n    for v in ([1], (1, [2]), {1: 2}, {3}):\n        assert candidate(v) is v\n"),
    "returns a part": ("    return x[1]\n", "def check(candidate):\n    v = [0, [1]]\n    assert candidate(v) is v[1]\n"),
    "big integers": ("    return x ** 3000\n", "def check(candidate):\n    assert candidate(7) == 7 ** 3000\n    assert candidate(-3) == (-3) ** 3000\n    assert candidate(2**63) == 2**189000\n    assert candidate(-2**63) == 2**189000\n"),
    "complex": ("    return x * 1j\n", "def check(candidate):\n    assert candidate(2) == 2j\n"),
    "special floats": ("    return [float('inf'), -0.0, float('nan')]\n", "def check(candidate):\n    import math\n    a, b, c = candidate(1)\n    assert a == math.inf and math.copysign(1, b) == -1 and c != c\n"),
    "sets": ("    return set(x), frozenset(x)\n", "def check(candidate):\n    assert candidate([1, 1]) == ({1}, frozenset([1]))\n"),
    "no list for a tuple": ("    return (x,)\n", "def check(candidate):\n    assert candidate(1) == (1,)\n    assert candidate(1) != [1]\n    assert type(candidate(1)) is tuple\n"),
    "no int for a bool": ("    return x > 0\n", "def check(candidate):\n    assert candidate(1) is True\n    assert candidate(0) is False\n"),
    "Counter": ("    from collections import Counter\n    return Counter(x)\n", "from collections import Counter\ndef check(candidate):\n    assert candidate('aab') == Counter('aab')\n    assert candidate('aab').most_common(1) == [('a', 2)]\n    assert candidate('')['x'] == 0\n"),
    "defaultdict": ("    from collections import defaultdict\n    d = defaultdict(list)\n    d[x].append(1)\n    return d\n", "def check(candidate):\n    assert candidate(1) == {1: [1]}\n"),
    "ordered": ("    from collections import OrderedDict\n    return OrderedDict(x)\n", "from collections import OrderedDict as O\ndef check(candidate):\n    assert candidate([(1, 2), (3, 4)]) == O([(1, 2), (3, 4)])\n    assert candidate([(3, 4), (1, 2)]) != O([(1, 2), (3, 4)])\n"),
    "named tuple": ("    from collections import namedtuple\n    return namedtuple('P', 'a b')(x, 2)\n", "def check(candidate):\n    assert candidate(1) == (1, 2)\n"),
    "enumeration": ("    import enum\n    return enum.IntEnum('E', 'A B')(x)\n", "def check(candidate):\n    assert candidate(2) == 2\n"),
    "generator": ("    yield from range(x)\n", "def check(candidate):\n    assert list(candidate(3)) == [0, 1, 2]\n    assert list(candidate(0)) == []\n"),
    "endless generator": ("    while True:\n        yield x\n        x += 1\n", "def check(candidate):\n    g, h = candidate(1), candidate(5)\n    assert [next(g), next(h), next(g)] == [1, 5, 2]\n"),
    "generator that raises": ("    yield 1\n    raise KeyError('k')\n", "def check(candidate):\n    g = candidate(0)\n    assert next(g) == 1\n    try:\n        next(g)\n    except KeyError as error:\n        assert error.args == ('k',)\n    else:\n        assert False\n"),
    "map, zip and views": ("    d = {1: 2}\n    return map(str, x), zip(x, x), d.keys(), d.items(), list(d.values())\n", "def check(candidate):\n    m, z, k, i, v = candidate([7])\n    assert (list(m), list(z), k, i, v) == (['7'], [(7, 7)], {1}, {(1, 2)}, [2])\n"),
    "takes a generator": ("    return sum(x)\n", "def check(candidate):\n    assert candidate(i for i in range(4)) == 6\n"),
    "takes a type": ("    return [v for v in x[0] if not isinstance(v, x[1])]\n", "def check(candidate):\n    assert candidate(([1, 'a'], int)) == ['a']\n"),
    "fractions, decimals, dates": ("    from fractions import Fraction as F\n    from decimal import Decimal as D\n    from datetime import date, timedelta\n    return F(1, 3), D('0.10'), date(2020, 2, 28) + timedelta(x)\n", "from fractions import Fraction\nfrom decimal import Decimal\nfrom datetime import date\ndef check(candidate):\n    assert candidate(1) == (Fraction(1, 3), Decimal('0.1'), date(2020, 2, 29))\n"),
    "lone surrogates, NUL and line separators": ("    return x[::-1]\n", "def check(candidate):\n    assert candidate('\\ud800\\0\\u2028') == '\\u2028\\0\\ud800'\n    assert candidate(b'\\xff\\0') == b'\\0\\xff'\n"),
    "an expected exception": ("    raise ValueError('bad', x)\n", EXPECT_ERROR.format(argument="3", kind="ValueError", condition="error.args == ('bad', 3)")),
    "an expected exception by its base": ("    return [][x]\n", EXPECT_ERROR.format(argument="3", kind="LookupError", condition="type(error) is IndexError")),
    "an expected exception of a library": ("    import json\n    return json.loads(x)\n", "import json\n" + EXPECT_ERROR.format(argument="'{'", kind="json.JSONDecodeError", condition="error.pos == 1")),
    "containers of its own classes, and shared": (
        "    from collections import defaultdict, namedtuple\n    P = namedtuple('P', 'a b')\n    d, y = defaultdict(list), [1]\n    d['a'].append(1)\n"
        "    p, q, r = P(1, 2), P(3, 4), P(5, 6)\n    e = defaultdict(tuple)\n    e['k'], e['l']\n    return [d, y, y, p, q, r, q, e]\n",
        "def check(candidate):\n    v = candidate(0)\n    assert v == [{'a': [1]}, [1], [1], (1, 2), (3, 4), (5, 6), (3, 4), {'k': (), 'l': ()}]\n    assert v[1] is v[2]\n",
    ),
    "lazy over a lazy argument": ("    return map(lambda v: 2 * v, x)\n", "def check(candidate):\n    assert list(candidate(iter([1, 2, 3]))) == [2, 4, 6]\n"),
    "generates from a generator": ("    for v in x: yield v + 1\n", "def check(candidate):\n    assert list(candidate(v for v in range(3))) == [1, 2, 3]\n"),
    "a set that it leaves alone": ("    return len(x)\n", "def check(candidate):\n    s = {7, 15, 23, 2}\n    before = list(s)\n    assert candidate(s) == 4\n    assert list(s) == before\n    for e in s: candidate(s)\n"),
    "called from threads": ("    return x + 1\n", "from concurrent.futures import ThreadPoolExecutor\ndef check(candidate):\n    with ThreadPoolExecutor(4) as p:\n        assert list(p.map(candidate, range(300))) == list(range(1, 301))\n"),
    "an exception of its own": ("    class Mine(KeyError): pass\n    raise Mine(x)\n", EXPECT_ERROR.format(argument="3", kind="KeyError", condition="error.args == (3,)")),
    "an exception with odd arguments": ("    return b'\\xff'.decode()\n", EXPECT_ERROR.format(argument="3", kind="UnicodeDecodeError", condition="error.start == 0")),
    "mutates, then raises": ("    x.append(1)\n    raise TypeError\n", "def check(candidate):\n    v = []\n    try: candidate(v)\n    except TypeError: pass\n    assert v == [1]\n"),
    "keywords": ("    return x + 1\n", "def check(candidate):\n    assert candidate(x=1) == 2\n"),
    "state between calls": ("    seen.append(x)\n    return len(seen)\nseen = []\n", "def check(candidate):\n    assert [candidate(1), candidate(1)] == [1, 2]\n"),
    "threads": ("    import concurrent.futures as c\n    with c.ThreadPoolExecutor(4) as pool: return sum(pool.map(abs, x))\n", "def check(candidate):\n    assert candidate([-1, 2]) == 3\n"),
    "many imports": ("    import json, hashlib, sqlite3, decimal, statistics, ctypes, bz2, lzma, zlib, unicodedata, asyncio, csv\n    return hashlib.sha256(b'').hexdigest()[:4] + unicodedata.name('a')[:2]\n", "def check(candidate):\n    assert candidate(0) == 'e3b0LA'\n"),
    "asserts in a helper": ("    return x + 1\n", "def same(a, b):\n    assert a == b\ndef check(candidate):\n    for i in range(5):\n        same(candidate(i), i + 1)\n"),
    "the test names it": ("    return x + 1\n", "def check(_):\n    assert f(1) == 2\n"),
    "many calls": ("    return x + 1\n", "def check(candidate):\n    for i in range(3000):\n        assert candidate(i) == i + 1\n"),
    "a long list": ("    return x[::-1]\n", "def check(candidate):\n    v = list(range(100000))\n    assert candidate(v) == v[::-1]\n"),
}  # fmt: skip
# Prompts of other shapes: `(prompt, completion, test)`.
HONEST_PROMPTS = {
    "no docstring": ("def f(x):\n", "    return x + 1\n", TEST),
    "no docstring, no line end": ("import math\n\n\ndef f(x) -> int:", "\n    return math.floor(x) + 1\n", TEST),
    "tabs": ("def f(x):\n\t'''Doc.'''\n", "\treturn x + 1\n", TEST),
    "a decorated head": ("import functools\n@functools.cache\ndef f(x):\n", "    return x + 1\n", TEST),
    "a method's head": ("class A:\n    def g(self, x):\n", "        return x + 1\nf = A().g\n", TEST),
    "imports and globals": (
        "from typing import List\nimport math\nSTEP = 1\n\ndef f(x: List[int]):\n    '''Doc.'''\n",
        "    return math.floor(x) + STEP\n",
        TEST,
    ),
    "a helper that the test uses": (
        "def g(x):\n    return x - 1\n\ndef f(x):\n    '''Undo g.'''\n",
        "    return x + 1\n",
        "def check(candidate):\n    for i in range(5):\n        assert candidate(g(i)) == i\n",
    ),
    "an exception of the prompt": (
        "class Bad(Exception):\n    pass\n\ndef f(x):\n    '''Doc.'''\n",
        "    raise Bad(x)\n",
        EXPECT_ERROR.format(argument="3", kind="Bad", condition="error.args == (3,)"),
    ),
    "an exception of the prompt that makes its text": (
        "class Bad(Exception):\n    def __init__(self, a, b):\n        self.a = a\n        super().__init__(f'{a} and {b}')\n\ndef f(x):\n    'Doc.'\n",
        "    raise Bad(x, 2)\n",
        EXPECT_ERROR.format(argument="3", kind="Bad", condition="error.args == ('3 and 2',) and error.a == 3"),
    ),
    "a description": ('"""Return x + 1.\nassert f(1) == 2\n"""\n', "def f(x):\n    return x + 1\n", TEST),
    "CRLF": ("def f(x):\r\n    '''Doc.'''\r\n", "    return x + 1\r\n", TEST),
    "string annotations": (
        "from __future__ import annotations\nimport dataclasses\n\ndef f(x: int) -> int:\n    '''Doc.'''\n",
        "    @dataclasses.dataclass\n    class A:\n        x: int\n    return A(x).x + 1\n",
        TEST,
    ),
}
# Right about most, wrong about one thing that its test checks.
DISHONEST = {
    "must not mutate": (
        "    x.append(0)\n    return x[:-1]\n",
        "def check(candidate):\n    v = [1]\n    assert candidate(v) == [1]\n    assert v == [1]\n",
    ),
    "must be a new list": (
        "    return x\n",
        "def check(candidate):\n    v = [1]\n    assert candidate(v) == v and candidate(v) is not v\n",
    ),
    "a list, not a tuple": ("    return [x]\n", "def check(candidate):\n    assert candidate(1) == (1,)\n"),
    "the wrong exception": (
        "    raise KeyError(x)\n",
        "def check(candidate):\n    try: candidate(1)\n    except ValueError: pass\n",
    ),
    "no exception": (
        "    return 1\n",
        EXPECT_ERROR.format(argument="3", kind="ValueError", condition="True"),
    ),
}


def honest_rows():
    """Of each its name, itself and the verdicts that are right."""
    honest = HONEST | crossing.HONEST | library.HONEST
    prompts = HONEST_PROMPTS | crossing.HONEST_PROMPTS | library.HONEST_PROMPTS
    not_judged = crossing.NOT_JUDGED | library.NOT_JUDGED
    rows = [(name, program(body, test), ["passed"]) for name, (body, test) in honest.items()]
    rows += [(name, program(body, test, head), ["passed"]) for name, (head, body, test) in prompts.items()]
    rows += [(name, program(body, test), ["error"]) for name, (body, test) in not_judged.items()]
    rows += _unusual_rows(unusual.HONEST)
    dishonest = DISHONEST | crossing.DISHONEST
    return rows + [(name, program(body, test), ["failed"]) for name, (body, test) in dishonest.items()]


def hostile_rows(*, slow):
    """The same of hostile ones, those that may take until their deadline or the others.

    Args:
        slow: which of the two.
    """
    rows = [(name, program(body), ["passed"]) for name, body in REFUSED.items()]
    for name, (body, right, *test) in HOSTILE.items():
        rows.append((name, program(body, *test), [right] if isinstance(right, str) else list(right)))
    not_passed = ["failed", "killed"]
    hostile, prompts = crossing.HOSTILE | library.HOSTILE, crossing.HOSTILE_PROMPTS | library.HOSTILE_PROMPTS
    rows += [(name, program(body, test), not_passed) for name, (body, test) in hostile.items()]
    rows += [(name, program(body, test, head), not_passed) for name, (head, body, test) in prompts.items()]
    rows += _unusual_rows(unusual.HOSTILE)
    return [row for row in rows if ("timed out" in row[2]) == slow]


def attack_rows():
    """Of each attack by the sandbox's own parts its name, itself and the detail of its verdict, which is `failed`."""
    return [(name, program(body, test, head or HEAD), detail) for name, head, body, test, detail in attacks.ATTACKS]


def _unusual_rows(rows):
    return [(name, program(body, test, head or HEAD), right.split(", ")) for name, right, head, body, test in rows]


def wrong(rows, sandbox, timeout_seconds, workers=None):
    """Rows `(name, candidate, right verdicts)` whose verdict is another."""
    verdicts = run_candidates(
        [c for _, c, _ in rows], sandbox=sandbox, timeout_seconds=timeout_seconds, workers=workers
    )
    return [(name, v) for (name, _, right), v in zip(rows, verdicts, strict=True) if v.verdict not in right]
