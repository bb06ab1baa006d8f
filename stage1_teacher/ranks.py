"""Several processes under torchrun: each labels whole shards of its own, and they wait for each other through gloo."""

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from shared.errors import ConfigError, PeerEndedError
from shared.process import rank, world_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

JOIN_SECONDS = 45
LABELLING = datetime.timedelta(days=30)  # ranks may work that long before they meet again


class Ranks:
    """This process among those of one build; alone, nothing is set up and every call answers at once.

    Raises:
        ConfigError: fewer processes than `WORLD_SIZE` says came within 45 s.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = rank(), world_size()
        self._group: ProcessGroup | None = None
        if self.world_size == 1:
            return
        from torch import distributed

        try:
            distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=JOIN_SECONDS))
            self._group = distributed.new_group(backend="gloo", timeout=LABELLING)
        except (distributed.DistError, RuntimeError, ValueError) as error:
            raise ConfigError(
                "the processes of this build do not come together",
                where=f"rank {self.rank}, {os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}",
                expected=f"{self.world_size} processes within {JOIN_SECONDS} s (WORLD_SIZE)",
                got=str(error).partition("\n")[0],
                fix="start all of them with torchrun; or unset RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR",
            ) from error

    @property
    def leads(self) -> bool:
        """Whether this process claims the cache and writes all but the shards of the others."""
        return self.rank == 0

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """What rank 0 says, on every rank; returns once all have asked.

        Raises:
            PeerEndedError: another rank has ended.
        """
        if self._group is None:
            return list(numbers)
        import torch
        from torch import distributed

        try:
            size = torch.tensor([len(numbers)])
            distributed.broadcast(size, 0, group=self._group)
            said = torch.zeros(int(size), dtype=torch.int64)
            if self.leads:
                said = torch.tensor(numbers, dtype=torch.int64)
            distributed.broadcast(said, 0, group=self._group)
            distributed.barrier(group=self._group)
        except RuntimeError as error:
            raise PeerEndedError(
                "another process of this build has ended",
                where=f"rank {self.rank} of {self.world_size}",
                fix="see its own message; the same command continues",
            ) from error
        return said.tolist()

    def wait(self) -> None:
        """Return once every rank has come here.

        Raises:
            PeerEndedError: another rank has ended.
        """
        self.agree([])

    def close(self) -> None:
        """Leave the others."""
        if self._group is not None:
            from torch import distributed

            self._group = None
            distributed.destroy_process_group()

    def placement(self, device_map: str, gpus_per_teacher: int | None) -> dict[str, Any]:
        """Where this rank's teacher goes, as arguments of `from_pretrained`.

        One process follows `device_map`. Several, or one with `gpus_per_teacher` G, take G devices each (1 by default):
        those from G · local rank on. Without CUDA all run on the CPU.

        Raises:
            ConfigError: fewer devices than the ranks of this machine need.
        """
        import torch

        if self.world_size == 1 and gpus_per_teacher is None:
            return {"device_map": device_map}
        if not torch.cuda.is_available():
            if gpus_per_teacher is not None:
                raise ConfigError("--gpus-per-teacher needs CUDA", got="no CUDA device")
            return {"device_map": "cpu"}
        per_teacher = gpus_per_teacher or 1
        local_rank = int(os.environ["LOCAL_RANK"]) if self.world_size > 1 else 0
        devices = range(local_rank * per_teacher, (local_rank + 1) * per_teacher)
        if devices.stop > torch.cuda.device_count():
            raise ConfigError(
                "too few CUDA devices on this machine",
                where=f"local rank {local_rank}",
                expected=f"devices {devices.start} to {devices.stop - 1}",
                got=torch.cuda.device_count(),
                fix="fewer --nproc-per-node, or a smaller --gpus-per-teacher",
            )
        if per_teacher == 1:
            return {"device_map": {"": devices.start}}
        return {"device_map": "auto", "max_memory": {device: torch.cuda.mem_get_info(device)[0] for device in devices}}


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this build, left again at the end."""
    ranks = Ranks()
    try:
        yield ranks
    finally:
        ranks.close()
