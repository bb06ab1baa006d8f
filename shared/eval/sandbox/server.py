"""The fork server: a bare, isolated interpreter, which forks two children for each candidate.

Started by `worker.py`, on its socket. It never sees a candidate or a test: it hands the children their sockets. When
its socket ends it ends, and its children with it.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable

from shared.eval.sandbox import checker, event_loop, landlock, namespaces, policy, seccomp, solver

_HIGH = 32  # above all descriptors that children get


def main(control_fd: int, isolation: policy.Isolation, packages: str = "") -> None:
    """Put up the isolation layers, all of them, say so, and serve until the socket ends.

    `packages` is the folder that numpy is in, for tests that use it; empty to do without.
    """
    control = socket.socket(fileno=control_fd)
    try:
        for name in policy.PRELOADED:
            importlib.import_module(name)
        if packages:
            sys.path.insert(0, packages)
            for name in policy.NUMPY:
                importlib.import_module(name)
            sys.path.remove(packages)
        event_loop.install()
        program = _put_up(isolation)
    except (OSError, StopIteration, ImportError) as error:
        control.send(json.dumps({"error": f"{isolation.value}: {error}"}).encode())
        os._exit(1)
    gc.collect()
    gc.freeze()
    control.send(b"{}")
    with contextlib.suppress(ConnectionError):
        while _serve(control, program):
            pass
    os._exit(0)


def _put_up(isolation: policy.Isolation) -> bytes | None:
    """Confine this process. Returns the filter of system calls for its children."""
    if sys.platform == "linux":
        namespaces.die_with(os.getppid())
    if isolation == policy.Isolation.NONE:
        return None
    folders, hidden, files = policy.library_folders(), policy.package_folders(), policy.library_files()
    as_root = os.geteuid() == 0
    if isolation == policy.Isolation.FULL:
        namespaces.unshare()
        _go_on_in_a_child()
        namespaces.change_root(folders, hidden)
    namespaces.drop_privileges(become_nobody=isolation == policy.Isolation.FULL and as_root and os.geteuid() == 0)
    if isolation == policy.Isolation.FULL:
        namespaces.die_with(0)
    landlock.restrict(files, folders)
    return seccomp.build_filter()


def _go_on_in_a_child() -> None:
    """The first process of a process namespace: when it dies, all others in it die."""
    if child := os.fork():
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        os.waitpid(child, 0)
        os._exit(0)
    namespaces.die_with(0)


def _serve(control: socket.socket, program: bytes | None) -> bool:
    """One candidate: fork its children, wait for the word that it is over, end them and say how each ended."""
    message, descriptors, _, _ = socket.recv_fds(control, 64, 2)
    if not message:
        return False
    cpu_seconds = json.loads(message)
    if len(descriptors) == 1:
        children = [_fork(checker.main, descriptors, cpu_seconds, program)]
    else:
        pair = socket.socketpair()
        with pair[0], pair[1]:
            children = [
                _fork(main, [job, end.fileno()], cpu_seconds, program)
                for main, job, end in zip((solver.main, checker.main), descriptors, pair, strict=True)
            ]
    for descriptor in descriptors:
        os.close(descriptor)
    over = control.recv(1)
    statuses = [_end(child) for child in children]
    control.send(json.dumps(statuses).encode())
    return bool(over)


def _fork(main: Callable[..., None], descriptors: list[int], cpu_seconds: int, program: bytes | None) -> int:
    """Start a child that has these descriptors as 3 and 4, none besides but the three on the null device."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        if sys.platform == "linux":
            namespaces.die_with(parent)
        if program is None:
            os.setpgid(0, 0)  # whatever it starts is found again
        moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _HIGH) for descriptor in descriptors]
        places = [os.dup2(descriptor, 3 + i) for i, descriptor in enumerate(moved)]
        os.closerange(3 + len(places), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        policy.limit_resources(cpu_seconds)
        if program is not None:
            seccomp.install(program)
        main(*places)
    finally:
        os._exit(1)


def _end(child: int) -> int:
    """Kill a child and whatever it started. Returns how it had ended, as `subprocess` says it."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
