"""The logit cache: format, writer, reader; needs numpy and h5py only. `FORMAT.md` is the normative text.

`Cache` and `CacheWriter` are loaded when they are first asked for, so that the command line's help loads neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.cache.reader import Cache as Cache
    from shared.cache.writer import CacheWriter as CacheWriter

__all__ = ["Cache", "CacheWriter"]
_HOMES = {"Cache": "shared.cache.reader", "CacheWriter": "shared.cache.writer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
