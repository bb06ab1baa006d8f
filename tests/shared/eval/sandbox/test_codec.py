"""What crosses between solver and checker: values as they were, and never anything else from any bytes."""

import array
import collections
import contextlib
import csv
import http
import io
import ipaddress
import json
import math
import os
import pathlib
import re
import socket
import struct
import threading
import time
import types
import urllib.parse
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.eval.sandbox.channel import Channel
from shared.eval.sandbox.codec import Decoder, Encoder, NotPlainError
from shared.eval.sandbox.peer import Peer
from shared.eval.sandbox.seccomp import NUMBERS, build_filter
from shared.eval.sandbox.surroundings import Surroundings
from shared.eval.sandbox.table import Table

ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.binary()
ATOMS |= st.text() | st.complex_numbers(allow_nan=False)
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(ATOMS, inner)
        | st.frozensets(ATOMS)
        | st.sets(ATOMS)
        | st.lists(inner).map(collections.deque)
    ),
    max_leaves=10,
)


def encoded(value, table=None, *, exact=True):
    encoder = Encoder(table or Table(), exact=exact)
    encoder.encode(value)
    return encoder.take()


def all_decoded(data, *, exact=True):
    return Decoder(Table(), data, None, exact=exact).decode()


def decoded(data, *, exact=True):
    (value,) = all_decoded(data, exact=exact)
    return value


class Pair:
    """Two sides: what one sends the other has, and knows again."""

    def __init__(self):
        self.ours, self.theirs = Table(), Table()

    def send(self, value):
        return self._send(self.ours, self.theirs, value)

    def send_back(self, value):
        return self._send(self.theirs, self.ours, value)

    def _send(self, sender, receiver, value):
        first = sender.next_number
        encoder = Encoder(sender, exact=True)
        changed = sender.changed()
        for number in changed:
            encoder.change(number)
        encoder.encode(value)
        sender.agree([*changed, *range(first, sender.next_number)])
        decoder = Decoder(receiver, encoder.take(), None, exact=True)
        (result,) = decoder.decode()
        receiver.agree([*decoder.changed, *range(decoder.first_new, receiver.next_number)])
        assert (sender.next_number, sender.objects.keys()) == (receiver.next_number, receiver.objects.keys())
        return result


@settings(max_examples=60)
@given(VALUES)
def test_values_cross_unchanged(value):
    assert decoded(encoded(value)) == value


def test_types_are_kept():
    value = [1, 1.0, True, 1 + 0j, -0.0, "1", b"1", (1,), bytearray(b"1"), 1 << 64, -(1 << 63), [1, 2], [1.0, 2.0]]
    assert repr(decoded(encoded(value))) == repr(value)


@settings(max_examples=300)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_value_or_refused(data):
    with contextlib.suppress(NotPlainError):
        all_decoded(data)


@settings(max_examples=60)
@given(VALUES, st.data())
def test_a_damaged_value_is_a_value_or_refused(value, data):
    damaged = bytearray(encoded(value))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(NotPlainError):
        all_decoded(bytes(damaged))


class Own(list):
    def push(self, value):
        self.append(value)


OWN = [
    Own([1]),
    Own,
    ValueError("x"),
    len,
    lambda: 1,
    iter([1]),
    {1: 2}.keys(),
    re.compile("a"),
    object(),
    [1, "a", 2.5],
]


@settings(max_examples=200)
@given(st.sampled_from(OWN), st.data())
def test_what_a_program_has_is_damaged_and_becomes_something_or_is_refused(value, data):
    """Proxies and classes are of a peer whose other side is gone."""
    damaged = bytearray(encoded(value, exact=False))
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    one, other = socket.socketpair()
    with one:
        other.close()
        channel, table = Channel(one.fileno()), Table()
        peer = Peer(channel, table, Surroundings([]), exact=True)
        with contextlib.suppress(NotPlainError):
            Decoder(table, bytes(damaged), peer, exact=True).decode()


def test_values_of_the_library_are_kept():
    value = [
        collections.ChainMap({"a": 1}, {"b": [2]}), collections.UserDict(a=1), collections.UserList([1]),
        collections.UserString("a"), types.SimpleNamespace(a=1), array.array("d", [1.5]), slice(1, None),
        NotImplemented, pathlib.PurePosixPath("a/b"), uuid.UUID(int=5), types.MappingProxyType({1: 2}),
        http.HTTPStatus.NOT_FOUND,
        re.I | re.M, urllib.parse.urlsplit("http://a/b"), ipaddress.ip_network("10.0.0.0/8"), time.gmtime(0),
        ValueError,
    ]  # fmt: skip
    back = decoded(encoded(value), exact=False)
    assert [type(v) for v in back] == [type(v) for v in value]
    assert repr(back) == repr(value)
    assert back[-1] is ValueError


def test_a_test_names_functions_of_the_library_and_a_program_does_not():
    data = encoded([os.system, json.loads, csv.DictReader])
    assert decoded(data, exact=False) == [os.system, json.loads, csv.DictReader]
    with pytest.raises(NotPlainError):
        decoded(data)
    for name in (b"os:system", b"unittest.mock:ANY", b"builtins:eval", b"eval"):
        with pytest.raises(NotPlainError):
            decoded(b"P" + struct.pack("<I", len(name)) + name)


def test_nans_are_told_apart_by_identity():
    one, other = float("nan"), float("nan")
    a, b, c, d = decoded(encoded([one, one, other, math.nan]))
    assert a is b and a is not c and d is math.nan and all(map(math.isnan, (a, c, d)))


@pytest.mark.parametrize("make", [io.StringIO, io.BytesIO])
def test_streams_in_memory_keep_content_and_place(make):
    pair = Pair()
    text = "ab\n\u20ac" if make is io.StringIO else b"ab\n\xff"
    ours = make(text)
    ours.read(1)
    theirs = pair.send(ours)
    assert (theirs.tell(), theirs.getvalue(), theirs.read(1)) == (1, text, text[1:2])
    theirs.seek(0)
    theirs.truncate()
    theirs.write(text * 2)
    assert pair.send_back(theirs) is ours and ours.getvalue() == text * 2
    theirs.close()
    pair.send_back(theirs)
    assert ours.closed


def test_a_change_to_something_equal_is_one():
    pair = Pair()
    ours = [1, 0.0, "a"]
    theirs = pair.send(ours)
    theirs[:2] = [True, -0.0]
    pair.send_back(theirs)
    assert repr(ours) == "[True, -0.0, 'a']"


def test_identity_is_kept():
    shared = [1]
    value = {"a": shared, "b": (shared, shared)}
    back = decoded(encoded(value))
    assert back["a"] is back["b"][0] is back["b"][1]


@settings(max_examples=60)
@given(st.lists(VALUES, min_size=1, max_size=4), st.data())
def test_what_one_side_changes_the_other_has_and_what_has_crossed_keeps_its_identity(values, data):
    pair = Pair()
    ours = list(values)
    theirs = pair.send(ours)
    assert theirs == ours
    for _ in range(3):
        here, there, send = data.draw(
            st.sampled_from([(ours, theirs, pair.send), (theirs, ours, pair.send_back)]), label="who changes"
        )
        here.append(data.draw(VALUES))
        if len(here) > 1:
            here[0], here[-1] = here[-1], here[0]
        assert send(here) is there
        assert ours == theirs
        compound = [i for i, value in enumerate(ours) if isinstance(value, list | tuple | dict | set | frozenset)]
        for i in compound:
            for j in compound:
                assert (ours[i] is ours[j]) == (theirs[i] is theirs[j])


def test_an_unsent_message_leaves_no_numbers_behind():
    table = Table()
    with pytest.raises(NotPlainError):
        encoded([[1], threading.Lock()], table)
    table.forget_from(0)
    assert (table.next_number, table.objects) == (0, {})


def test_what_only_the_table_refers_to_can_be_given_up():
    table = Table()
    held = [[1], (2,)]
    table.add("the entry point")
    encoded([held, [3]], table)
    assert len(table.objects) == 6
    lone = table.unreferenced()
    assert [table.objects[number] for number in lone] == [[held, [3]]]
    table.forget(lone)
    assert [table.objects[number] for number in table.unreferenced()] == [[3]]
    assert table.next_number == 6


@pytest.mark.parametrize("make", [lambda v: [v], lambda v: (v,), lambda v: {0: v}, lambda v: ValueError(v)])
def test_depth_has_no_limit(make):
    value = 7
    for _ in range(5_000):
        value = make(value)
    back = decoded(encoded(value))
    for _ in range(5_000):
        back = back.args[0] if isinstance(back, ValueError) else back[0]
    assert back == 7


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<cI", b"Q", 1 << 31),
        struct.pack("<cI", b"s", 1 << 31),
        struct.pack("<cBI", b"M", 0, 1),
        struct.pack("<cBI", b"O", 99, 0),
        struct.pack("<cII", b"C", 7, 0),
        struct.pack("<cI", b"r", 7),
    ],
)
def test_counts_and_numbers_that_lie_are_refused(data):
    with pytest.raises(NotPlainError):
        decoded(data)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filters_are_whole(machine):
    """Every jump lands inside the program, and every way ends in a return."""
    program = [struct.unpack("<HBBI", part) for part in zip_bytes(build_filter(machine))]
    for at, (code, true, false, _) in enumerate(program):
        if code == 0x15:
            assert at + 1 + max(true, false) < len(program)
    assert program[-1] == (0x06, 0, 0, 0x00050001)
    assert len({numbers[machine == "aarch64"] for numbers in NUMBERS.values()} - {None}) == sum(
        numbers[machine == "aarch64"] is not None for numbers in NUMBERS.values()
    )


def zip_bytes(data):
    return [data[i : i + 8] for i in range(0, len(data), 8)]


def test_other_architectures_have_no_filter():
    with pytest.raises(OSError, match="riscv64"):
        build_filter("riscv64")
