"""What crosses between solver and checker: values as they were, and never anything else from any bytes."""

import collections
import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.eval.sandbox.seccomp import NUMBERS, build_filter
from shared.eval.sandbox.values import MAX_DEPTH, Decoder, Encoder, NotPlainError

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


def encoded(value, **options):
    encoder = Encoder(exact=True, **options)
    encoder.encode(value)
    return encoder.take()


@settings(max_examples=60)
@given(VALUES)
def test_values_cross_unchanged(value):
    assert Decoder(encoded(value)).decode() == value


def test_types_are_kept():
    value = [1, 1.0, True, 1 + 0j, -0.0, "1", b"1", (1,), bytearray(b"1"), 1 << 64, -(1 << 63), [1, 2], [1.0, 2.0]]
    assert repr(Decoder(encoded(value)).decode()) == repr(value)


@settings(max_examples=300)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_value_or_refused(data):
    with contextlib.suppress(NotPlainError):
        Decoder(data).decode()


@settings(max_examples=60)
@given(VALUES, st.data())
def test_a_damaged_value_is_a_value_or_refused(value, data):
    damaged = bytearray(encoded(value))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(NotPlainError):
        Decoder(bytes(damaged)).decode()


def test_identity_is_kept():
    shared = [1]
    value = {"a": shared, "b": (shared, shared)}
    back = Decoder(encoded(value)).decode()
    assert back["a"] is back["b"][0] is back["b"][1]


def test_counts_and_depths_that_lie_are_refused_at_once():
    deep = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(NotPlainError):
        encoded(deep)
    nested = struct.pack("<ccI", b"l", b"m", 1) * 100_000
    for data in (nested, struct.pack("<ccI", b"l", b"q", 1 << 31), struct.pack("<cI", b"s", 1 << 31)):
        with pytest.raises(NotPlainError):
            Decoder(data).decode()


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
