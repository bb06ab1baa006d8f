"""The system calls that a program may make, by name, as a filter for the kernel (Linux, x86_64 and aarch64)."""

import ctypes
import errno
import platform
import struct

# Each with its numbers on x86_64 and aarch64; `-` where the architecture has no such call.
_TABLE = """
    read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222,
    mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
    ioctl 16 29, pread64 17 67, readv 19 65, writev 20 66, access 21 -, select 23 -, sched_yield 24 124,
    mremap 25 216, madvise 28 233, dup 32 23, dup2 33 -, dup3 292 24, nanosleep 35 101, getpid 39 172, clone 56 220,
    exit 60 93, uname 63 160, fcntl 72 25, getcwd 79 17, readlink 89 -, gettimeofday 96 169, getrlimit 97 163,
    getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177,
    getppid 110 173, getresuid 118 148, getresgid 120 150, sigaltstack 131 132, gettid 186 178, time 201 -,
    futex 202 98, sched_getaffinity 204 123, getdents64 217 61, set_tid_address 218 96, restart_syscall 219 128,
    clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, openat 257 56,
    newfstatat 262 79, readlinkat 267 78, faccessat 269 48, pselect6 270 72, ppoll 271 73, set_robust_list 273 99,
    prlimit64 302 261, getrandom 318 278, statx 332 291, rseq 334 293, clone3 435 435, close_range 436 436,
    openat2 437 437, faccessat2 439 439
"""
NUMBERS: dict[str, tuple[int | None, ...]] = {
    name: tuple(None if number == "-" else int(number) for number in numbers)
    for name, *numbers in map(str.split, _TABLE.split(","))
}
# C libraries go on without these where the kernel does not know them. The filter cannot look into their arguments.
UNKNOWN = ("clone3", "openat2", "close_range", "faccessat2")
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_WRITING = 0o3 | 0o100 | 0o1000 | 0o20000000  # O_ACCMODE, O_CREAT, O_TRUNC, the bit of O_TMPFILE
_THREAD = (0x3D0F00, 0x7D0F00)  # the flags of pthread_create in glibc and musl
_FCNTL = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC: none that sends signals
_IOCTL = (0x5401, 0x5421, 0x5450, 0x5451)  # TCGETS (isatty), FIONBIO, FIONCLEX, FIOCLEX

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def build_filter(machine: str | None = None) -> bytes:
    """The filter as BPF instructions: what is not listed fails with EPERM.

    Args:
        machine: as `platform.machine()` says, which is the default.

    Raises:
        OSError: no table for this architecture.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    column, architecture = _ARCHITECTURES[machine]
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL)]
    program.append((_LOAD, 0, 0, _NUMBER))
    for name, numbers in NUMBERS.items():
        if (number := numbers[column]) is not None:
            rule = _rule(name)
            program += [(_EQUAL, 0, len(rule), number), *rule]
    program.append((_RETURN, 0, 0, _ERRNO | errno.EPERM))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def install(program: bytes) -> None:
    """Put the filter on this process for good.

    Raises:
        OSError: the kernel has no such filters.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    argument = _Program(len(program) // 8, program)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(argument), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def _rule(name: str) -> list[tuple[int, int, int, int]]:
    """What happens to one call; ends in a return on every way."""
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    match name:
        case "open" | "openat":
            flags = _argument(1 if name == "open" else 2)
            return [flags, (_AND, 0, 0, _WRITING), (_EQUAL, 0, 1, 0), allow, refuse]
        case "clone":
            return _one_of(0, _THREAD)
        case "fcntl":
            return _one_of(1, _FCNTL)
        case "ioctl":
            return _one_of(1, _IOCTL)
        case "prlimit64":  # of itself, and only to read: pid and the new limit, both halves, are 0
            rule = []
            for load in (_argument(0), _argument(2), _argument(2, high=True)):
                rule += [load, (_EQUAL, 1, 0, 0), refuse]
            return [*rule, allow]
        case _ if name in UNKNOWN:
            return [(_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    return [allow]


def _one_of(index: int, values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [_argument(index), *tests, (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]


def _argument(index: int, *, high: bool = False) -> tuple[int, int, int, int]:
    return (_LOAD, 0, 0, 16 + 8 * index + 4 * high)
