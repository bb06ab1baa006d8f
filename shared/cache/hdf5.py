"""HDF5 images in memory: a shard's bytes from named arrays, and back. No file is opened here."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from shared.cache.deflate import LEVEL, inflate, pack_chunk
from shared.cache.format import Array
from shared.errors import CacheCorruptError, CacheFormatError

CHUNK_ENTRIES = 1 << 20
GZIP_FILTERS = [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32]
ZSTD = 32_015  # its number in the HDF Group's registry of filters
FILTERS: dict[str, dict[str, object]] = {
    "gzip": {"compression": "gzip", "compression_opts": LEVEL},
    "zstd": {"compression": ZSTD, "compression_opts": (3,)},
}


def to_bytes(arrays: Mapping[str, Array], attributes: Mapping[str, object], filter: str) -> bytes:
    """Encode arrays as an HDF5 file: chunked, shuffle, gzip 4 or zstd 3, fletcher32; equal input gives equal bytes.

    An empty array is stored plain, since HDF5 has no chunk to filter there. Strings become fixed-length attributes.
    """
    with h5py.File("shard", "w", driver="core", backing_store=False, libver=("earliest", "v110")) as file:
        for name, array in arrays.items():
            if array.size:
                _write_chunks(file, name, array, filter)
            else:
                file.create_dataset(name, data=array, track_times=False)
        for key, value in attributes.items():
            file.attrs[key] = np.bytes_(value) if isinstance(value, str) else value
        file.flush()
        image: bytes = file.id.get_file_image()
        return image


def _write_chunks(file: h5py.File, name: str, array: Array, filter: str) -> None:
    """A data set in equal chunks, since HDF5 stores the last one padded to the full length."""
    rows = -(-len(array) // -(-array.size // CHUNK_ENTRIES))
    filters = {"chunks": (rows, *array.shape[1:]), "shuffle": True, "fletcher32": True, **FILTERS[filter]}
    dataset = file.create_dataset(name, shape=array.shape, dtype=array.dtype, track_times=False, **filters)
    if filter != "gzip":
        dataset[...] = array
        return
    for start in range(0, len(array), rows):
        chunk = array[start : start + rows]
        if len(chunk) < rows:
            chunk = np.concatenate([chunk, np.zeros((rows - len(chunk), *array.shape[1:]), array.dtype)])
        dataset.id.write_direct_chunk((start, *[0] * (array.ndim - 1)), pack_chunk(chunk))


def from_bytes(image: bytes, where: object) -> tuple[dict[str, Array], dict[str, object]]:
    """Decode an HDF5 file into its arrays and attributes.

    Raises:
        CacheCorruptError: the bytes are no HDF5 file, or a checksum in it fails; `where` names the file.
        CacheFormatError: it needs a filter that is not installed.
    """
    with _readable(where), h5py.File(h5py.h5f.open_file_image(image)) as file:
        load_filters(file)
        arrays = {name: _read(file[name], image) for name in file}
        attributes = {key: _plain(value) for key, value in file.attrs.items()}
    return arrays, attributes


def read_document_meta(path: Path) -> list[dict[str, Any]]:
    """Read the documents' JSON objects of a shard's file, and nothing else of it.

    Raises:
        CacheCorruptError: the file is not there or no HDF5 file, or a checksum in it fails.
        CacheFormatError: it needs a filter that is not installed.
    """
    with _readable(path), h5py.File(path, "r", locking=False) as file:
        load_filters(file)
        blob, borders = file["doc_meta"][()].tobytes(), file["doc_meta_indptr"][()].tolist()
        return [json.loads(blob[start:stop]) for start, stop in itertools.pairwise(borders)]


def _read(dataset: h5py.Dataset, image: bytes) -> Array:
    """A data set's array. Chunks of our own filters are inflated straight from the image, several times as fast.

    zlib's own checksum in each chunk covers what fletcher32 does.
    """
    properties = dataset.id.get_create_plist()
    if [properties.get_filter(i)[0] for i in range(properties.get_nfilters())] != GZIP_FILTERS:
        array: Array = dataset[()]
        return array
    array = np.empty(dataset.shape, dataset.dtype)
    size, shape = dataset.dtype.itemsize, dataset.chunks
    for number in range(dataset.id.get_num_chunks()):
        chunk = dataset.id.get_chunk_info(number)
        if chunk.filter_mask:
            array = dataset[()]
            break
        planes = np.frombuffer(inflate(image[chunk.byte_offset : chunk.byte_offset + chunk.size - 4]), np.uint8)
        values = np.empty(shape, dataset.dtype)
        interleaved = values.view(np.uint8).reshape(-1, size)
        for place, plane in enumerate(planes.reshape(size, -1)):
            interleaved[:, place] = plane
        first = chunk.chunk_offset[0]
        array[first : first + shape[0]] = values[: len(array) - first]
    return array


@contextlib.contextmanager
def _readable(where: object) -> Iterator[None]:
    """Turn whatever HDF5 meets in damaged bytes into one error."""
    try:
        yield
    except CacheFormatError:
        raise
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, MemoryError) as error:
        raise CacheCorruptError("a shard cannot be read", where=where, got=error, fix="cache verify") from error


def load_filters(file: h5py.File) -> None:
    """Make the filter that a file's data sets need known to HDF5; gzip always is.

    Raises:
        CacheFormatError: it is zstd, and hdf5plugin is not installed.
    """
    for dataset in file.values():
        properties = dataset.id.get_create_plist()
        if ZSTD in (properties.get_filter(i)[0] for i in range(properties.get_nfilters())):
            load_filter("zstd")
            return


def load_filter(filter: str) -> None:
    """Make a filter known to HDF5, by its name.

    Raises:
        CacheFormatError: zstd, and hdf5plugin is not installed.
    """
    if filter != "zstd":
        return
    try:
        import hdf5plugin  # noqa: F401  importing it registers its filters
    except ImportError as error:
        raise CacheFormatError("zstd needs the package hdf5plugin", got=error, fix="pip install hdf5plugin") from error


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.bytes_):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value
