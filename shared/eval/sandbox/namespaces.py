"""Namespaces and privileges: a machine with no network, no other process and no files but Python's own (Linux)."""

import ctypes
import os
import platform
import signal
from collections.abc import Iterable
from pathlib import Path

NOBODY = 65534

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)  # fmt: skip
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 4, 24, 38, 47
_AMBIENT_CLEAR_ALL = 4
_MAX_CAPABILITY = 63
_CAPABILITY_VERSION = 0x20080522
# Covered by the new root while it is built, so none of what goes into it may lie below.
_MOUNT_POINTS = ("/mnt", "/srv", "/media", "/var/tmp", "/tmp")


def unshare() -> None:
    """Enter new namespaces, as an ordinary user by way of a user namespace; processes begin with the next child.

    Raises:
        OSError: the kernel or its settings forbid it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    if os.geteuid() == 0 and libc.unshare(flags) == 0:
        return
    user, group = os.geteuid(), os.getegid()
    _check(libc.unshare(flags | _NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)


def change_root(folders: Iterable[Path], hidden: Iterable[Path]) -> None:
    """Leave nothing of the file system but some folders, read-only, with others inside them empty.

    Raises:
        OSError: a mount is refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(source: str | None, target: Path, kind: str | None, flags: int) -> None:
        names = [None if name is None else name.encode() for name in (source, str(target), kind)]
        _check(libc.mount(*names, ctypes.c_ulong(flags), None), f"mount {target}")

    mount(None, Path("/"), None, _REC | _PRIVATE)
    # Under both names where one is a link: libraries are named by either.
    places = sorted({*folders, *(folder.resolve() for folder in folders)})
    root = next(
        path for path in map(Path, _MOUNT_POINTS) if path.is_dir() and not any(p.is_relative_to(path) for p in places)
    )
    mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV)
    for place in places:
        target = root / place.relative_to("/")
        if any(place.is_relative_to(other) for other in places if other != place) and target.is_dir():
            continue
        target.mkdir(parents=True, exist_ok=True)
        mount(str(place), target, None, _BIND)
        inherited = os.statvfs(target).f_flag & (_NOSUID | _NODEV | _NOEXEC)  # may not be taken off
        mount(None, target, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | inherited)
    for folder in hidden:
        mount("tmpfs", root / folder.relative_to("/"), "tmpfs", _RDONLY | _NOSUID | _NODEV)
    os.chdir(root)
    _check(libc.syscall(ctypes.c_long(_PIVOT_ROOT[platform.machine()]), b".", b"."), "pivot_root")
    _check(libc.umount2(b".", _DETACH), "umount")
    os.chdir("/")
    mount(None, Path("/"), None, _REMOUNT | _RDONLY | _NOSUID | _NODEV)


def drop_privileges(*, become_nobody: bool) -> None:
    """Give up all capabilities for good, and the user where asked; nobody may look into this process.

    Raises:
        OSError: it cannot be done.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(_MAX_CAPABILITY + 1):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused where there is none to give up
    libc.prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0)
    if become_nobody:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _check(libc.capset((ctypes.c_uint * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint * 6)()), "capset")
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _check(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; `parent` is 0 outside this process namespace."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it is dead already
        os._exit(1)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)
