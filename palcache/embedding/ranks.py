"""Several processes that someone else started: torchrun, or the tasks of a SLURM job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import torch

from palcache.errors import InputError

_LAUNCHERS: Final = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    ("SLURM_ARRAY_TASK_ID", "", "SLURM_ARRAY_TASK_COUNT"),
)


@final
@dataclass(frozen=True, slots=True)
class Rank:
    """One of several processes that run the same command.

    Attributes:
        rank: its number.
        local: its number on its machine; 0 where each has devices of its own.
        world: how many there are.
    """

    rank: int
    local: int
    world: int

    @property
    def device(self) -> str:
        """The device of this process: CUDA devices in turn, else `auto`."""
        count = torch.cuda.device_count()
        return f"cuda:{self.local % count}" if count else "auto"


def find_rank(environment: Mapping[str, str]) -> Rank | None:
    """Return which of several processes this is by the variables of torchrun or SLURM, or None where it is alone.

    Raises:
        InputError: a variable is not a number.
    """
    for names in _LAUNCHERS:
        rank, local, world = (environment.get(name, "") for name in names)
        try:
            if rank and world and int(world) > 1:
                return Rank(int(rank), int(local or 0), int(world))
        except ValueError as error:
            raise InputError(
                f"Got {names[0]} = {rank!r}, {names[1]} = {local!r} and {names[2]} = {world!r}; expected whole numbers, as "
                "torchrun and SLURM set them."
            ) from error
    return None
