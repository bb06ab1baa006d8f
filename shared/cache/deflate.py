"""Chunks for HDF5's filters shuffle, gzip and fletcher32, each byte plane deflated in the way that suits it.

Any HDF5 reads the result. HDF5's own filter has one strategy for a whole chunk; with one per plane a cache of K = 50 is
7 % smaller and inflates in three quarters of the time: the low bytes of ids are noise and stored as they are, and for
codes and the high bytes of ids Huffman's code alone beats the chance matches that zlib finds in them.

Huffman's code takes zlib-ng half of zlib's time. ISA-L inflates in two fifths of it, and deflates what is nearly noise
in a fifth of zlib-ng's. Where either package is missing, zlib does the same work.
"""

import contextlib
import importlib
import zlib
from types import ModuleType

import numpy as np

from shared.cache.format import Array

inflater: ModuleType = zlib
deflater: ModuleType = zlib
LEVEL, MEMORY_LEVEL = 4, 9
COMPRESSOR = f"zlib {zlib.ZLIB_RUNTIME_VERSION}"
with contextlib.suppress(ImportError):
    deflater = importlib.import_module("zlib_ng.zlib_ng")
    COMPRESSOR = f"zlib-ng {deflater.ZLIBNG_VERSION}"
WAYS = [(deflater, LEVEL, zlib.Z_HUFFMAN_ONLY), (deflater, LEVEL, zlib.Z_DEFAULT_STRATEGY)]
with contextlib.suppress(ImportError):
    inflater = importlib.import_module("isal.isal_zlib")
    COMPRESSOR += f", ISA-L {importlib.import_module('isal').ISAL_VERSION}"
    WAYS.insert(0, (inflater, 1, zlib.Z_DEFAULT_STRATEGY))
COMPRESSOR += f", memory level {MEMORY_LEVEL}"  # it decides the bytes of gzip

inflate = inflater.decompress
STORED = (deflater, 0, zlib.Z_DEFAULT_STRATEGY)
WORTHWHILE = 0.97
SAMPLE_BYTES = 1 << 13  # of a plane, by which its encoding is chosen
WORDS = 1 << 14


def pack_chunk(values: Array) -> bytes:
    """Shuffle, deflate and checksum one chunk's values, as `write_direct_chunk` takes them."""
    planes = np.ascontiguousarray(values.reshape(-1).view(np.uint8).reshape(-1, values.itemsize).T)
    adler32 = deflater.adler32(planes.data.cast("B")).to_bytes(4, "big")
    data = b"".join([b"\x78\x01", *(_deflate(plane.data) for plane in planes), _END, adler32])
    return data + fletcher32(data).to_bytes(4, "little")


def fletcher32(data: bytes) -> int:
    """HDF5's checksum: the sum of the big-endian 16-bit words and that of their running sums, modulo 65,535."""
    # Modulo 65,535 a word is 256 times the one of its bytes in the other order.
    words = np.frombuffer(data + b"\0" if len(data) % 2 else data, "<u2")
    places = np.arange(WORDS, 0, -1.0)
    total = running = 0
    for start in range(0, len(words), WORDS):
        block = words[start : start + WORDS].astype(np.float64)  # its sums stay below 2^53
        block_total = int(block.sum())
        running += len(block) * total + int(block @ places[-len(block) :])
        total += block_total
    # HDF5 folds carries back in, which leaves 65,535 instead of 0 unless all words are 0.
    return ((256 * running - 1) % 65_535 + 1) << 16 | (256 * total - 1) % 65_535 + 1 if total else 0


def _deflate(plane: memoryview) -> bytes:
    """A plane up to a byte's end, in the encoding that makes its beginning smallest, the fastest of equal ones.

    It is stored as it is, which reads fastest, where that saves less than 3 %.
    """
    sample = plane[:SAMPLE_BYTES]
    samples = [_encode(sample, *way) for way in WAYS]
    best = min(range(len(WAYS)), key=lambda way: len(samples[way]))
    if len(samples[best]) >= WORTHWHILE * len(sample):
        return _encode(plane, *STORED)
    return samples[best] if len(sample) == len(plane) else _encode(plane, *WAYS[best])


def _encode(plane: memoryview, compressor: ModuleType, level: int, strategy: int) -> bytes:
    encoder = compressor.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, MEMORY_LEVEL, strategy)
    encoded: bytes = encoder.compress(plane) + encoder.flush(zlib.Z_SYNC_FLUSH)
    return encoded


_END = deflater.compressobj(wbits=-zlib.MAX_WBITS).flush()  # an empty last block
