"""Landlock: from here on this process and its children read what is allowed and write nothing (Linux 5.13)."""

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on all architectures
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many rights over files a version of the interface knows; later ones 16
_NETWORK_SINCE, _SCOPES_SINCE = 4, 6
_BIND_AND_CONNECT, _SOCKETS_AND_SIGNALS = 0b11, 0b11


def version() -> int:
    """The interface's version in this kernel; 0 where there is none."""
    return max(int(_syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)), 0)


def restrict(readable: Iterable[Path], listable: Iterable[Path]) -> None:
    """Allow reading of files, or of all below folders, and listing of folders; refuse every other use of files.

    Args:
        readable: those that are not there are passed over.
        listable: with all folders below.

    Raises:
        OSError: the kernel has no Landlock.
    """
    abi = version()
    attributes = struct.pack(
        "<QQQ",
        (1 << _RIGHTS.get(abi, 16)) - 1,
        _BIND_AND_CONNECT if abi >= _NETWORK_SINCE else 0,
        _SOCKETS_AND_SIGNALS if abi >= _SCOPES_SINCE else 0,
    )
    size = 8 if abi < _NETWORK_SINCE else 16 if abi < _SCOPES_SINCE else 24
    ruleset = _checked(_syscall(_CREATE_RULESET, attributes, size, 0))
    for path in filter(Path.exists, readable):
        _allow(ruleset, path, _READ_FILE | _READ_DIR if path.is_dir() else _READ_FILE)
    for path in listable:
        _allow(ruleset, path, _READ_DIR)
    _checked(_syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    _checked(_syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("<Qi", rights, descriptor), 0))
    os.close(descriptor)


def _syscall(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return int(libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "Landlock")
    return result
