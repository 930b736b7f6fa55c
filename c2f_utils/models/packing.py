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


def collate(
    samples: Sequence[Sample], pad_id: int, device: torch.device | str = "cpu", *, sampled: bool = False
) -> Batch:
    """Build a batch from unpadded samples, of the tokens that the policy `sampled` or of the answers that they are;
    raises ValueError for an answer without tokens."""
    answers = [s.sampled if sampled else s.ids for s in samples]
    if not all(answers):
        raise ValueError("a sample has no answer tokens; expected at least one (EOS counts)")
    sequences = [torch.tensor([*s.prompt.ids, *ids]) for s, ids in zip(samples, answers, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_id)
    lengths = [len(ids) for ids in answers]
    rows = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths))
    columns = torch.cat([torch.arange(n) + len(s.prompt.ids) - 1 for s, n in zip(samples, lengths, strict=True)])
    targets = torch.tensor([token for ids in answers for token in ids])
    last = torch.tensor([len(s) - 1 for s in sequences])
    return Batch(ids.to(device), rows.to(device), columns.to(device), targets.to(device), last.to(device), lengths)
