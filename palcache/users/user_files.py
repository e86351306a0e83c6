"""Users on disk, beside a head and never in it: who they are, what is known of them, and the prior of new ones.

`users.safetensors` holds the seen users, `adapted_users.safetensors` those who were added to a run later. Both name the
head they belong to by the digest of its file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch

from palcache.errors import MismatchError
from palcache.fingerprints import file_digest
from palcache.tensor_files import pack_texts, read_tensors, require_format, unpack_texts, write_tensors
from palcache.users.posteriors import Gaussian, Posteriors

FORMAT: Final = "palcache-users"
VERSION: Final = 1
SEEN: Final = "users.safetensors"
ADAPTED: Final = "adapted_users.safetensors"


@final
@dataclass(frozen=True, slots=True, eq=False)
class UserTable:
    """u users of a head.

    Attributes:
        users: their ids.
        posteriors: what is known of them.
        counts: comparisons that this rests on, (u,) int64.
        prior: of a new user.
        deviation: posterior standard deviation of each weight, (u, k), by `palcache.users.regions`; None: by the posteriors.
        noise: what the head's margins are divided by in the posteriors' likelihood.
    """

    users: tuple[str, ...]
    posteriors: Posteriors
    counts: torch.Tensor
    prior: Gaussian
    deviation: torch.Tensor | None = None
    noise: float = 1.0

    def updated(self, other: UserTable) -> UserTable:
        """Return these users and those of another table of the same head; the other one wins."""
        theirs = set(other.users)
        kept = torch.tensor([i for i, user in enumerate(self.users) if user not in theirs], dtype=torch.int64)
        mine = self.posteriors.take(kept)
        posteriors = Posteriors(
            torch.cat([mine.mean, other.posteriors.mean]),
            torch.cat([mine.covariance, other.posteriors.covariance]),
            other.posteriors.temperature,
        )
        users = (*(self.users[i] for i in kept.tolist()), *other.users)
        both = self.deviation is not None and other.deviation is not None
        deviation = torch.cat([self.deviation[kept], other.deviation]) if both else None  # type: ignore[index,list-item]
        counts = torch.cat([self.counts[kept], other.counts])
        return UserTable(users, posteriors, counts, other.prior, deviation, other.noise)


def save_users(path: Path, table: UserTable, head_path: Path) -> None:
    """Replace the file at `path` by users of the head in the file `head_path`; the same users give the same bytes."""
    texts, offsets = pack_texts(table.users)
    tensors = {
        "mean": table.posteriors.mean,
        "covariance": table.posteriors.covariance,
        "counts": table.counts,
        "prior.mean": table.prior.mean,
        "prior.covariance": table.prior.covariance,
        "user.id.bytes": texts,
        "user.id.offsets": offsets,
    }
    if table.deviation is not None:
        tensors["deviation"] = table.deviation
    about = {
        "format": FORMAT,
        "version": VERSION,
        "head": file_digest(head_path),
        "temperature": table.posteriors.temperature,
        "noise": table.noise,
    }
    write_tensors(path, tensors, about)


def load_users(path: Path, head_path: Path) -> UserTable | None:
    """Read users that `save_users` wrote; None where there is no such file.

    Raises:
        CacheError: the file is damaged or of another format or version.
        MismatchError: the users belong to another head than the one at `head_path`.
    """
    if not path.is_file():
        return None
    about, tensors = read_tensors(path, "users of a head", "delete it and make it again")
    require_format(path, about, FORMAT, VERSION)
    if about["head"] != file_digest(head_path):
        raise MismatchError(
            f"The users in {path} belong to another head than {head_path}; delete the file, and adapt them again with "
            "palcache adapt --save-users."
        )
    users = unpack_texts(tensors["user.id.bytes"], tensors["user.id.offsets"])
    posteriors = Posteriors(tensors["mean"], tensors["covariance"], float(about["temperature"]))
    prior = Gaussian(tensors["prior.mean"], tensors["prior.covariance"])
    noise = float(about.get("noise", 1.0))
    return UserTable(users, posteriors, tensors["counts"], prior, tensors.get("deviation"), noise)
