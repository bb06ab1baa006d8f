"""Several processes under torchrun: they meet within a minute or name who is missing, agree, and notice a death.

Their messages here are small and lie in main memory, so they go through gloo, beside the backend that DDP uses.
"""

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, distributed

from shared.errors import ConfigError, DistillError, PeerEndedError
from shared.process import is_main_process, rank, world_size

JOIN_SECONDS = 45
# accelerate takes any of these (srun sets some) for a distributed run; here only a launcher, which sets all, starts one
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@contextlib.contextmanager
def joined(patience: datetime.timedelta | None = None) -> Iterator[None]:
    """The processes of this run as torch's default group; a single process sets nothing up.

    Args:
        patience: how long the others wait for a process that works on; torch's default if None. They notice a process
            that ends at once.

    Raises:
        ConfigError: fewer processes than `WORLD_SIZE` says came within 45 s.
        PeerEndedError: another process has ended meanwhile.
    """
    if world_size() == 1:
        for name in OF_A_LAUNCHER:
            os.environ.pop(name, None)
        yield
        return
    _join(patience)
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)
        if isinstance(error, DistillError) or not lost:
            raise
        raise PeerEndedError(
            "another process of this run has ended",
            where=f"rank {rank()} of {world_size()}",
            fix="see its own message; the same command continues",
        ) from error
    distributed.destroy_process_group()


def agree(numbers: Sequence[int]) -> list[int]:
    """The numbers that rank 0 gives, on every rank, however many; returns once all ranks have called it."""
    if world_size() == 1:
        return list(numbers)
    count = torch.tensor(len(numbers))
    distributed.broadcast(count, 0)
    agreed = torch.zeros(int(count), dtype=torch.int64)
    if is_main_process():
        agreed = torch.tensor(numbers, dtype=torch.int64)
    distributed.broadcast(agreed, 0)
    wait()
    return agreed.tolist()


def wait() -> None:
    """Return once all ranks have called it."""
    smallest(0)


def smallest(number: int) -> int:
    """The smallest number of all ranks."""
    value = torch.tensor(number, dtype=torch.int64)
    if world_size() > 1:
        distributed.all_reduce(value, distributed.ReduceOp.MIN)
    return int(value)


def on_any(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return -smallest(-int(flag)) == 1


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks of a tensor in main memory."""
    if world_size() > 1:
        values = values.clone()
        distributed.all_reduce(values)
    return values


def gathered(texts: Sequence[str]) -> list[str]:
    """The texts of all ranks, in their order."""
    if world_size() == 1:
        return list(texts)
    parts: list[list[str]] = [[] for _ in range(world_size())]
    distributed.all_gather_object(parts, list(texts))
    return [text for part in parts for text in part]


def _join(patience: datetime.timedelta | None) -> None:
    """Meet at the launcher's address first, where it can be seen who is missing; then connect."""
    everyone = [f"here/{number}" for number in range(world_size())]
    deadline = time.monotonic() + JOIN_SECONDS
    missing = "rank 0, which opens the meeting point"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        is_server = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not is_server:
            _wait_for_server(address, port, deadline)
        server = distributed.TCPStore(
            address,
            port,
            is_master=is_server,
            timeout=datetime.timedelta(seconds=max(deadline - time.monotonic(), 1)),
            wait_for_workers=False,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's server outlives a restart of its ranks
        store = distributed.PrefixStore(f"codedistill/{attempt}", server)
        store.set(everyone[rank()], "here")
        while absent := [number for number, name in enumerate(everyone) if not store.check([name])]:
            missing = "rank " + ", ".join(map(str, absent))
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.05)
    except (RuntimeError, ValueError, KeyError, TimeoutError) as error:
        raise ConfigError(
            "the processes of this run do not come together",
            where=f"rank {rank()}, {os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}",
            expected=f"{world_size()} processes within {JOIN_SECONDS} s (WORLD_SIZE)",
            got=f"no sign of {missing}",
            fix="start all of them with torchrun; or unset RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR",
        ) from error
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=patience)


def _wait_for_server(address: str, port: int, deadline: float) -> None:
    """Return once something listens there; torch's own client would try for longer, and print its C++ stacks.

    Raises:
        TimeoutError: nothing listened until the deadline.
    """
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=5):
            return
        time.sleep(0.1)
    raise TimeoutError
