"""Kernels: how instruct, base and coarse become fine, one flat piece at a time.

A kernel is a pure function of a `Piece` (float32 views of at most `BLOCK` elements of one tensor) and the tensor's
coefficient c. Whatever needs the whole tensor (norms, thresholds) comes from a statistics pass before it, so a merge
never holds a tensor in memory, and a result cannot depend on how the tensor was cut. Only separate multiplications
and additions are used: fused ones round differently in the vector body and in the tail of a loop, and then chunk size
would change bytes. On the CPU comparisons and masks are numpy's, several times faster there than torch's; elsewhere
they are torch's on the device that the piece is on.

Names: d_k = coarse_k - base (residues), d_I = instruct - base, r = sum_k weight_k d_k.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from c2f_utils.merge import random_bits

# Elements. Small enough for the processor's caches, large enough that two workers seldom wait for each other's
# interpreter time between two operations.
BLOCK = 1 << 17

Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class Threshold:
    """Keep |d| > value; of |d| == value keep those whose 32-bit word of an evenly spread sequence is below `tie_cut`,
    so that the density is met.
    """

    value: float
    tie_cut: int
    density: float  # realised share, for the report


@dataclass(frozen=True)
class Statistics:
    """What the pass before the kernel found: `gram[i][j]` = <d_i, d_j> over the tensor (0 is d_I, then residues);
    thresholds alike, and `scales`: the norm of each delta over that of its part beyond the threshold.
    """

    gram: tuple[tuple[float, ...], ...] = ()
    thresholds: tuple[Threshold, ...] = ()
    count: int = 0
    scales: tuple[float, ...] = ()


class Piece:
    """What a kernel sees: lazily converted float32 views, all flat and equally long.

    `instruct`, `base`, `coarse` (the first coarse model), `residues`, `residue` (their weighted sum),
    `instruct_residue`; `weights`, `stats`, `name`, `start` (offset of the first element), `shape` (of the whole
    tensor). Kernels must not write into them.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        start: int,
        read: Callable[[str], Tensor],
        weights: tuple[float, ...],
        stats: Statistics | None = None,
        seed: int = 0,
    ) -> None:
        self.name, self.shape, self.start, self._read = name, shape, start, read
        self.weights, self.stats, self.seed = weights, stats, seed

    @cached_property
    def instruct(self) -> Tensor:
        return self._read("instruct")

    @cached_property
    def base(self) -> Tensor:
        return self._read("base")

    @cached_property
    def coarse(self) -> Tensor:
        return self._read("coarse.0")

    @cached_property
    def instruct_residue(self) -> Tensor:
        return self._read("delta.instruct")

    @cached_property
    def residues(self) -> tuple[Tensor, ...]:
        return tuple(self._read(f"delta.coarse.{k}") for k in range(len(self.weights)))

    @cached_property
    def residue(self) -> Tensor:
        return self.total(self.residues)

    def total(self, parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        """Weighted sum of one part per coarse model."""
        sum_ = None
        for weight, part in zip(self.weights, parts, strict=True):
            term = part if weight == 1.0 else part * weight
            sum_ = term if sum_ is None else sum_ + term
        return sum_

    def chosen(self, purpose: str, share: float) -> np.ndarray | Tensor:
        """Whether an element is chosen, each with probability `share`, decided by seed, tensor, purpose and position
        only.
        """
        keep = random_bits.chosen(self.seed, f"{self.name}|{purpose}", self.start, self.instruct.numel(), share)
        return beside(self.instruct, keep)

    def uniform(self, purpose: str = "") -> Tensor:
        """One random float32 in [0, 1) per element, for operators of one's own."""
        bits = random_bits.bits(self.seed, f"{self.name}|{purpose}", self.start, self.instruct.numel(), 32)
        return torch.from_numpy((bits >> 8).astype(np.float32) * np.float32(2.0**-24)).to(self.instruct.device)

    def trimmed(self, part: Tensor, index: int) -> Tensor:
        """A new tensor of the part's largest magnitudes; `index` 0 is d_I, k+1 the residue of coarse model k."""
        threshold = self.stats.thresholds[index]
        size = abs(numbers(part))
        keep = size > threshold.value
        if threshold.tie_cut:
            words = random_bits.spread(self.seed, f"{self.name}|tie:{index}", self.start, part.numel())
            keep |= (size == threshold.value) & beside(part, words < threshold.tie_cut)
        return masked(part, keep)


def numbers(part: Tensor) -> np.ndarray | Tensor:
    """What to compare and mask with: a numpy view of the part, or the part itself where it is not on the CPU."""
    return part.numpy() if on_cpu(part) else part


def on_cpu(part: Tensor) -> bool:
    return part.device.type == "cpu"


def beside(part: Tensor, values: np.ndarray) -> np.ndarray | Tensor:
    """Values of the CPU where the part's `numbers` are."""
    return values if on_cpu(part) else torch.from_numpy(values).to(part.device)


def masked(part: Tensor, keep: np.ndarray | Tensor) -> Tensor:
    """The part where kept, else zero; a product with the mask is many times faster here than a selection."""
    return torch.as_tensor(numbers(part) * keep)


def residue(piece: Piece, c: float) -> Tensor:
    return (c * piece.residue).add_(piece.instruct)


def lerp(piece: Piece, c: float) -> Tensor:
    return ((1.0 - c) * piece.instruct).add_(c * piece.coarse)


def slerp(piece: Piece, c: float) -> Tensor:
    """Spherical interpolation of the task vectors d_I and r over the whole tensor (WARP); linear when they are
    parallel or one is zero.
    """
    a, b = slerp_weights(piece.stats.gram, piece.weights, c)
    return (a * piece.instruct_residue).add_(b * piece.residue).add_(piece.base)


def slerp_weights(gram: tuple[tuple[float, ...], ...], weights: tuple[float, ...], c: float) -> tuple[float, float]:
    """Factors of d_I and r: sin((1-c)t)/sin t and sin(ct)/sin t with t the angle between them."""
    aa, bb, ab = moments(gram, weights)
    if aa <= 0 or bb <= 0:
        return 1.0 - c, c
    cosine = max(-1.0, min(1.0, ab / math.sqrt(aa) / math.sqrt(bb)))
    if 1.0 - cosine * cosine <= 1e-14:  # parallel or opposite: the sphere's path is undefined or a straight line
        return 1.0 - c, c
    angle = math.acos(cosine)
    return math.sin((1.0 - c) * angle) / math.sin(angle), math.sin(c * angle) / math.sin(angle)


def moments(gram: tuple[tuple[float, ...], ...], weights: tuple[float, ...]) -> tuple[float, float, float]:
    """<d_I, d_I>, <r, r> and <d_I, r> from the Gram matrix of d_I and the single residues."""
    bb = math.fsum(wi * wj * gram[i + 1][j + 1] for i, wi in enumerate(weights) for j, wj in enumerate(weights))
    return gram[0][0], max(bb, 0.0), math.fsum(w * gram[0][k + 1] for k, w in enumerate(weights))


def trim(piece: Piece, c: float, density: float, scope: str) -> Tensor:
    parts = [piece.trimmed(part, k + 1) for k, part in enumerate(piece.residues)]
    return (c * piece.total(parts)).add_(piece.instruct)


def dare(piece: Piece, c: float, density: float, seed: int) -> Tensor:
    """Drop and rescale: each element kept with probability `density` and divided by it, so that the expectation stays
    (Yu et al. 2024).
    """
    share = max(1, round(density * 2**16)) / 2**16  # what 16 random bits can decide; divided by alike
    parts = [masked(part, piece.chosen(f"dare:{seed}:{k}", share)) for k, part in enumerate(piece.residues)]
    return (c / share * piece.total(parts)).add_(piece.instruct)


def ties(piece: Piece, c: float, density: float, scope: str) -> Tensor:
    """Trim, elect a sign, average those that agree, over d_I with weight 1 and d_k with weight c * weight_k (Yadav et
    al. 2023).
    """
    parts = [piece.trimmed(part, k) for k, part in enumerate((piece.instruct_residue, *piece.residues))]
    weights = (1.0, *(c * weight for weight in piece.weights))
    votes = [part if weight == 1.0 else part.mul_(weight) for part, weight in zip(parts, weights, strict=True)]
    total = votes[0].clone()
    for vote in votes[1:]:
        total.add_(vote)
    plus = numbers(total) >= 0  # elected where the votes cancel, too
    above, below = torch.zeros_like(total), torch.zeros_like(total)
    for vote, weight in zip(votes, weights, strict=True):
        values = numbers(vote)
        agrees = ((values > 0) == plus) & (values != 0)
        values *= agrees  # and so the vote
        above.add_(vote)
        below.add_(torch.as_tensor(agrees * np.float32(weight)))
    below.add_(torch.eq(below, 0.0, out=total))  # where nothing agrees the mean is 0
    return above.div_(below).add_(piece.base)


def dots(piece: Piece, c: float, density: float, instruct: float, scope: str) -> Tensor:
    """The largest of d_I and of d_k, each with the norm of the whole and a coefficient of its own (after DoTS, arXiv
    2605.00610; there one norm spans all tensors, here that is scope "global").
    """
    deltas, factors = (piece.instruct_residue, *piece.residues), (instruct, *(c * weight for weight in piece.weights))
    merged = piece.base.clone()
    for index, (delta, factor) in enumerate(zip(deltas, factors, strict=True)):
        merged.add_(piece.trimmed(delta, index).mul_(factor * piece.stats.scales[index]))
    return merged


def orthogonal(piece: Piece, c: float) -> Tensor:
    """Add only what is new: r without its projection on d_I, over the whole tensor."""
    aa, _, ab = moments(piece.stats.gram, piece.weights)
    share = ab / aa if aa > 0 else 0.0
    return (-share * piece.instruct_residue).add_(piece.residue).mul_(c).add_(piece.instruct)


def tsv(piece: Piece, c: float, rank: float) -> Tensor:
    """Task singular vectors of d_I (weight 1) and d_k (weight c * weight_k): keep the leading `rank` share of each,
    make them orthogonal across tasks, recombine (TSV-Merge, Gargiulo et al. 2024; the weights are ours). `rank` 0
    means one share per task: 1/(tasks)."""
    deltas = (piece.instruct_residue, *piece.residues)
    weights = (1.0, *(c * weight for weight in piece.weights))
    size = min(piece.shape)
    keep = max(1, int(size * (rank or 1.0 / len(deltas))))
    lefts, values, rights = [], [], []
    for delta, weight in zip(deltas, weights, strict=True):
        u, s, vh = torch.linalg.svd(delta.reshape(piece.shape), full_matrices=False)
        # Directions without energy are arbitrary; orthogonalised with the others they would turn those.
        rank_here = min(keep, int((s > 1e-6 * s[0]).sum())) if s.numel() else 0
        lefts.append(u[:, :rank_here].clone())
        values.append(weight * s[:rank_here])
        rights.append(vh[:rank_here].clone())
    merged = (_polar(torch.cat(lefts, dim=1)) * torch.cat(values)) @ _polar(torch.cat(rights, dim=0))
    return piece.base + merged.reshape(-1)


def _polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh
