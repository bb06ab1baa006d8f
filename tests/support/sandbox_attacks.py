# ruff: noqa: E501
"""Programs that turn the sandbox's own parts, as their process has them, against the checker.

Each is its name, its prompt (where empty the usual one), its completion, its test, and the detail of its verdict, which
is `failed`. The detail shows that the attack reached what refuses it: a row that relies on a part that has been renamed
fails of itself, with another detail.
"""

_PEER = "    import sys, struct\n    peer = next(v for v in sys._getframe(2).f_locals.values() if type(v).__name__ == 'Peer')\n"
# Values as the codec writes them.
_WRITTEN = "import struct\nnumber = lambda v: struct.pack('<cIB', b'i', 1, v)\ntext = lambda v: struct.pack('<cI', b's', len(v)) + v\nnothing = struct.pack('<cI', b'N', 0)\n"
_ENTRY = "    return 0\nimport sys\n"
_SIGNATURE = _ENTRY + "methods = sys.modules['shared.eval.sandbox.proxies'].PROGRAM_METHODS\n"
_CODEC = _ENTRY + "codec = sys.modules['shared.eval.sandbox.codec']\n"
_PLAIN = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(41) == 42\n"
_SIGNED = "import inspect\ndef check(candidate):\n    inspect.signature(candidate)\n    assert candidate(1) == 2\n"
_CALLABLE = "def check(candidate):\n    assert candidate(lambda: 1) == 2\n"
_ENUM = "import enum\nclass C(enum.Enum):\n    A = 1\n\ndef f(x):\n    '''Doc.'''\n"
_BOX = "class Box:\n    def __init__(self, v): self.v = v\n    def get(self): return self.v\n    def __eq__(self, o): return self.v == o.v\n\ndef f(x):\n    '''Doc.'''\n"
ATTACKS = [
    # What a program may ask of the test's objects.
    ("asks for an attribute of the test's function", "", _PEER + "    assert 'attribute' in sys.modules['shared.eval.sandbox.proxies'].PROGRAM_METHODS\n    return peer.call(object.__getattribute__(x, '_number_'), 'attribute', (x, '__globals__'))\n", _CALLABLE, "AttributeError: the test's objects can only be called"),
    ("calls what it was not given", "", _PEER + "    try: peer.call(0, 'call', (1,))\n    except BaseException: pass\n    return peer.call(10 ** 6, 'call', ())\n", _PLAIN, "AttributeError: the test's objects can only be called"),
    # Parts replaced.
    ("patches the table", "", "    return 0\nimport sys\ntable = sys.modules['shared.eval.sandbox.table']\ntable.Table.changed = lambda self: 1 / 0\n", _PLAIN, "the program's answer: ZeroDivisionError: division by zero"),
    ("patches the encoder", "", _CODEC + "codec.Encoder.encode = lambda self, value: self._put(b'?' + bytes(5))\n", _PLAIN, "the program's answer: an unknown operation"),
    ("replaces Peer._send", "", _ENTRY + "p = sys.modules['shared.eval.sandbox.peer'].Peer\no = p._send\np._send = lambda self, how, values: o(self, b'R', [None])\n", "def check(candidate):\n    r = candidate(1)\n    assert r == 2, r\n", "AssertionError: None"),
    ("describes its signature as nonsense", "", _SIGNATURE + "methods['signature'] = lambda v: 5\n", _SIGNED, "TypeError: cannot unpack non-iterable int object"),
    ("exits as its signature is asked for", "", _SIGNATURE + "methods['signature'] = lambda v: sys.exit(0)\n", _SIGNED, "SystemExit: 0"),
    ("the checker's code replaced", "", _ENTRY + "check = sys.modules['shared.eval.sandbox.checker']._Check\ncheck._verdict.__code__ = (lambda *a: None).__code__\n", _PLAIN, "AssertionError"),
    ("a reply of names for classes that are not open", _BOX, _ENTRY + "solver = sys.modules['shared.eval.sandbox.solver']\nsolver._differences = lambda shared, proposed: {n: ['get', '__eq__', '=v', '__init__', 'mro', '__class__', '__hash__'] for n in shared}\n", "def check(candidate):\n    b = Box(3)\n    assert candidate(b) == b.get() == 3, [n for n in ('v', 'mro', '__hash__') if type(vars(Box).get(n)).__module__ == type(candidate).__module__]\n", "AssertionError: ['v', 'mro']"),
    ("a reply that is no JSON", _BOX, _ENTRY + "solver = sys.modules['shared.eval.sandbox.solver']\nsolver._differences = lambda *_: [['x']]\n", "def check(candidate):\n    assert candidate(Box(3)) == 3\n", "the program's answer: malformed data: 'list' object has no attribute 'items'"),
    # Values that no encoder writes.
    ("library function by name from program", "", _CODEC + "codec.Encoder._value = lambda self, value: self._put(codec._SIZED.pack(b'P', 9) + b'os:system')\n", _PLAIN, "the program's answer: malformed data: 'os:system'"),
    ("a library enum unknown", "", _CODEC + "codec._member = lambda value, kind: ['NOPE', 1]\nimport http\nf = lambda x: http.HTTPStatus.OK\n", "import http\ndef check(candidate):\n    assert candidate(1) == 2\n", "the program's answer: malformed data: 'NOPE'"),
    ("an exception of the library that skips tests", "", _CODEC + "codec.class_outline = lambda kind, with_names: ['SkipTest', 'o', True, 1, 'unittest.case:SkipTest']\nclass T(Exception): pass\ndef f(x): raise T\n", "import unittest\ndef check(candidate):\n    try: candidate(1)\n    except unittest.SkipTest: return\n    except BaseException as error: assert False, type(error)\n", "the program's answer: malformed data: no class of exceptions"),
    ("record class of no record", "", _CODEC + "codec.class_outline = lambda kind, with_names: ['Popen', 'o', True, 1, 'subprocess:Popen']\nclass T: pass\nf = lambda x: T()\n", "import subprocess\ndef check(candidate):\n    r = candidate(1)\n    assert r == 2, type(r)\n", "AssertionError: <class 'candidate.Popen'>"),
    ("type name with a null", "", _CODEC + "old = codec.Encoder._value\ncodec.Encoder._value = lambda self, value: old(self, 'a\\0b' if value == 'T' else value)\nclass T: pass\nf = lambda x: T()\n", _PLAIN, "the program's answer: malformed data: type name must not contain null characters"),
    ("a fraction to be computed", "", _CODEC + "from fractions import Fraction\ncodec.Encoder._object = lambda self, value, kind: self._later(b'M', ['1e400000000', 1], value, codec._FIXED[Fraction])\nf = lambda x: [x]\n", _PLAIN, "the program's answer: malformed data: a fraction of something else than integers"),
    ("U op forgets the entry point", "", _CODEC + "import struct\no = codec.Encoder.take\ncodec.Encoder.take = lambda self: struct.pack('<cI6I', b'U', 6, 0, 1, 2, 3, 4, 5) + o(self)\n", "def check(candidate):\n    v = [1]\n    candidate(v)\n    assert candidate(v) == 2, candidate._peer_.table.objects\n", "AssertionError: {}"),
    ("changes objects of the test that it never got", "", _CODEC + "import struct\no = codec.Encoder.take\ncodec.Encoder.take = lambda self: b''.join(struct.pack('<cII', b'C', n, 0) for n in (1, 2)) + o(self)\n", "def check(candidate):\n    w = [1]\n    assert candidate(w) == 0 and w == [] or candidate(w) == 2\n    assert w == [1]\n", "the program's answer: malformed data: 2"),
    # Messages of its own.
    ("numbers without end", "", _PEER + "    peer._channel.send(b'R' + b'\\xff' * 8)\n    return 0\n", _PLAIN, "the program's answer: cut short"),
    ("changes what cannot change", "", _PEER + "    peer._channel.send(b'R' + struct.pack('<cII', b'C', 0, 0) + nothing + number(2))\n    return 0\n" + _WRITTEN, _PLAIN, "the program's answer: malformed data: a change of what cannot change"),
    ("changes a member of the prompt's enumeration by a forged message", _ENUM, _PEER + "    holds = number(1) + text(b'_value_') + number(2)\n    peer._channel.send(b'R' + holds + struct.pack('<cII', b'C', peer.table.number(x), 3) + nothing + nothing)\n" + _WRITTEN, "def check(candidate):\n    candidate(C.A)\n    assert C.A.value == 2\n", "the program's answer: malformed data: a change of what cannot change"),
    ("a returned iterator that answers nonsense", "", "    import sys\n    class I:\n        def __iter__(self): return self\n        def __next__(self):\n            peer = next(v for v in sys._getframe(3).f_locals.values() if hasattr(v, '_channel'))\n            peer._channel.send(b'R?')\n    return I()\n", "def check(candidate):\n    try: list(candidate(1))\n    except Exception: pass\n", "the program's answer: cut short"),
    ("pre-sent answers", "", "    return 0\n" + _WRITTEN + "import sys\nchannel = next(v for v in sys._getframe(2).f_locals.values() if type(v).__name__ == 'Channel')\nchannel.send(b'{}')\nchannel.send(b'R' + nothing + number(1) + number(2))\n", "def check(candidate):\n    assert candidate(1) == 3\n", "the program's answer: malformed data"),
]  # fmt: skip
