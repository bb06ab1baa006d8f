"""Chunks that are packed here are what HDF5's own filters read, and damage to them is found."""

import zlib

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache import hdf5
from shared.cache.deflate import fletcher32, pack_chunk

KINDS = {
    "zeros": lambda rng, n: np.zeros(n),
    "noise": lambda rng, n: rng.integers(0, 2**15, n),
    "skewed": lambda rng, n: np.minimum(rng.geometric(0.2, n), 99),
    "repeats": lambda rng, n: np.arange(n) % 7,
}


def read_back(image, name):
    with h5py.File(h5py.h5f.open_file_image(image)) as file:
        return file[name][()]


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from(["u1", "<u2", "<i2", "<u4", "<f2", "<f4", "<i8"]),
    size=st.one_of(st.integers(1, 9), st.integers(10, 5000)),
    columns=st.integers(0, 4),
    chunk=st.integers(1, 3000),
    seed=st.integers(0, 99),
)
def test_hdf5_reads_every_array(kind, dtype, size, columns, chunk, seed):
    """Of HDF5's three filters only fletcher32 could fail to notice wrong bytes, and it is checked, too."""
    array = KINDS[kind](np.random.default_rng(seed), size * max(columns, 1)).astype(dtype)
    if columns:
        array = array.reshape(size, columns)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(hdf5, "CHUNK_ENTRIES", max(chunk, columns))
        image = hdf5.to_bytes({"a": array}, {}, "gzip")
    found = read_back(image, "a")
    assert found.dtype == array.dtype and np.array_equal(found, array)


@pytest.mark.parametrize(
    "data", [b"\0", b"\0" * 9, b"\xff\xff", b"\xff\xff" * 70_001, b"\x80\0\x7f\xff", bytes(range(256)) * 999, b"abc"]
)
def test_fletcher32_is_hdf5s(data):
    """Its remainders of 0 included: HDF5 itself checks the sum when it reads."""
    with h5py.File("x", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("a", shape=len(data), dtype="u1", chunks=(len(data),), fletcher32=True)
        dataset.id.write_direct_chunk((0,), data + fletcher32(data).to_bytes(4, "little"))
        assert dataset[()].tobytes() == data
        dataset.id.write_direct_chunk((0,), data + (fletcher32(data) ^ 1).to_bytes(4, "little"))
        file.flush()
        image = file.id.get_file_image()
    with pytest.raises(OSError, match="filter returned failure"):
        read_back(image, "a")


def test_noise_is_stored_and_the_rest_is_smaller_than_hdf5_makes_it():
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 256, 20_000), np.minimum(rng.geometric(0.05, 20_000), 255)
    packed = pack_chunk((high << 8 | low).astype(np.uint16))
    assert low.astype(np.uint8).tobytes() in packed
    hdf5s = zlib.compress(low.astype(np.uint8).tobytes() + high.astype(np.uint8).tobytes(), 4)
    assert len(packed) < 0.97 * len(hdf5s)
