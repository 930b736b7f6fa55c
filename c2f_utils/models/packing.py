"""Micro-batches under a token budget, so that memory stays flat while answers grow."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2f_utils.domain.samples import Sample


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group indices so that (count x longest) stays within `budget` tokens; a longer single sequence goes alone.

    Longest first: neighbours in length share a group, so little is padding. The grouping changes no gradient (losses
    are sums).
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for index in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences and the places where answer tokens are predicted; a row's padding is seen by none of
    its tokens."""

    ids: Tensor  # [B, T] prompt + answer
    rows: Tensor  # [N] row of each answer token
    columns: Tensor  # [N] column of the state before it
    targets: Tensor  # [N] the answer token
    last: Tensor  # [B] column of the last real token
    lengths: list[int]  # answer tokens of each row; sum = N

    def split(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat [N] result into one tensor per row."""
        return list(flat.split(self.lengths))


def collate(samples: Sequence[Sample], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Build a batch from unpadded samples; raises ValueError for an answer without tokens."""
    if any(not s.ids for s in samples):
        raise ValueError("a sample has no answer tokens; expected at least one (EOS counts)")
    sequences = [torch.tensor([*s.prompt.ids, *s.ids]) for s in samples]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_id)
    lengths = [len(s.ids) for s in samples]
    rows = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths))
    columns = torch.cat([torch.arange(n) + len(s.prompt.ids) - 1 for s, n in zip(samples, lengths, strict=True)])
    targets = torch.tensor([token for s in samples for token in s.ids])
    last = torch.tensor([len(s) - 1 for s in sequences])
    return Batch(ids.to(device), rows.to(device), columns.to(device), targets.to(device), last.to(device), lengths)
