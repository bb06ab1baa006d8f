"""HDF5 images in memory: a shard's bytes from named arrays, and back. No file is opened here."""

from collections.abc import Mapping

import h5py
import numpy as np

from shared.cache.layout import Array
from shared.errors import CacheCorruptError

CHUNK_ENTRIES = 1 << 20


def to_bytes(arrays: Mapping[str, Array], attributes: Mapping[str, object]) -> bytes:
    """Encode arrays as an HDF5 file: chunked, shuffle, gzip 4, fletcher32; equal input gives equal bytes.

    An empty array is stored plain, since HDF5 has no chunk to filter there. Strings become fixed-length attributes.
    """
    with h5py.File("shard", "w", driver="core", backing_store=False, libver=("earliest", "v110")) as file:
        for name, array in arrays.items():
            if array.size:
                chunk = (max(1, min(len(array), CHUNK_ENTRIES * len(array) // array.size)), *array.shape[1:])
                filters = {"chunks": chunk, "shuffle": True, "compression": "gzip", "compression_opts": 4}
                file.create_dataset(name, data=array, fletcher32=True, track_times=False, **filters)
            else:
                file.create_dataset(name, data=array, track_times=False)
        for key, value in attributes.items():
            file.attrs[key] = np.bytes_(value) if isinstance(value, str) else value
        file.flush()
        image: bytes = file.id.get_file_image()
        return image


def from_bytes(image: bytes, where: object) -> tuple[dict[str, Array], dict[str, object]]:
    """Decode an HDF5 file into its arrays and attributes.

    Raises:
        CacheCorruptError: the bytes are no HDF5 file, or a checksum in it fails; `where` names the file.
    """
    try:
        with h5py.File(h5py.h5f.open_file_image(image)) as file:
            arrays = {name: file[name][()] for name in file}
            attributes = {key: _plain(value) for key, value in file.attrs.items()}
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CacheCorruptError("a shard cannot be read", where=where, got=error, fix="cache verify") from error
    return arrays, attributes


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.bytes_):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value
