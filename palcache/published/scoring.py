"""Rewards from token ids, end to end: foundation model, then head, as the published reward model serves them.

The last position of prompt and response is what is scored. This module needs transformers when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from palcache.checkpoints import TrainedHead
from palcache.errors import InputError
from palcache.heads import IdealPointHead
from palcache.tensors import PairBatch


def last_states(folder: Path, ids: Sequence[Sequence[int]], *, device: str = "cpu") -> torch.Tensor:
    """Return the foundation model's last hidden state of each text, (n, d) float32.

    Each text runs alone, so that no padding has any part in it.

    Args:
        folder: a transformers folder.
        ids: token ids of each text.
        device: where the model runs.

    Raises:
        InputError: a text has no tokens.
    """
    from transformers import AutoModel

    if empty := [i for i, text in enumerate(ids) if not len(text)]:
        raise InputError(f"The text {empty[0]} has no tokens; expected at least one.")
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval().to(device)
    states = []
    with torch.no_grad():
        for text in ids:
            out = model(input_ids=torch.tensor([list(text)], device=device))
            states.append(out.last_hidden_state[0, -1].float())
    return torch.stack(states) if states else torch.empty(0, 0)


@torch.no_grad()
def score_states(
    head: TrainedHead, prompts: torch.Tensor, responses: torch.Tensor, mixtures: torch.Tensor
) -> torch.Tensor:
    """Return the reward of each response, (n,).

    Args:
        head: PAL-A or PAL-B.
        prompts: states of the prompts, (n, d); PAL-A does not read them.
        responses: states of the responses, for PAL-A of prompt and response, (n, d).
        mixtures: weights over the prototypes, used as given, (n, k).

    Raises:
        InputError: the head has no ideal points.
    """
    if not isinstance(head.shape, IdealPointHead):
        raise InputError("Only pal-a and pal-b score states against an ideal point; choose a run of one of them.")
    own = torch.arange(len(responses), device=responses.device)
    y = torch.ones(len(responses), device=responses.device)
    batch = PairBatch(prompts, own, responses, own, own, torch.zeros_like(own), y)
    return head.shape.rewards(head.parameters, batch, mixtures=mixtures)[:, 0]


def score_token_ids(
    head: TrainedHead,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    users: Sequence[str] | None = None,
    mixtures: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the reward of each response to its prompt, (n,), for users' own mixtures or for fixed ones.

    Args:
        head: PAL-A or PAL-B.
        folder: the transformers folder of its foundation model.
        prompts: token ids.
        responses: token ids.
        users: whose mixtures, where none are given.
        mixtures: fixed weights over the prototypes, (n, k), used as given.

    Raises:
        InputError: a user is unknown, or neither users nor mixtures are given.
    """
    if mixtures is None:
        if users is None:
            raise InputError("Rewards need users or mixtures; give one of them.")
        number = {user: i for i, user in enumerate(head.users)}
        if unknown := [user for user in users if user not in number]:
            raise InputError(f"The head does not know the user {unknown[0]!r}; give a mixture instead.")
        mixtures = head.mixtures[[number[user] for user in users]]
    if head.shape.joint:
        both = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        states = last_states(folder, both)
        return score_states(head, states, states, mixtures)
    states = last_states(folder, [*prompts, *responses])
    return score_states(head, states[: len(prompts)], states[len(prompts) :], mixtures)
