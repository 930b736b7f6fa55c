"""Decode-time counterpart of the residue merge: sample from instruct + c (coarse - base) in logit space.

The three models run side by side on the same tokens (proxy-tuning, Liu et al. 2024); nothing is merged, and every
token costs three forward passes and three key/value caches. A comparison, not a way to serve.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from c2f_utils.rollout.choice import choose
from c2f_utils.rollout.sampler import BatchedSampler


class ProxyDecoder(BatchedSampler):
    """A sampler whose logits are combined from three models of one layout; `longest` as `choose` takes it."""

    def __init__(
        self,
        instruct: nn.Module,
        coarse: nn.Module,
        base: nn.Module,
        tokenizer,
        coefficient: float,
        stop_strings: Sequence[str] = (),
        longest: int = 0,
    ):
        super().__init__(instruct, tokenizer, stop_strings=stop_strings)
        self.coefficient = coefficient
        self.parts = [choose(model, tokenizer, longest=longest) for model in (instruct, coarse, base)]

    @property
    def positions(self) -> int:
        """What all three can tell the places of."""
        return min(part.positions for part in self.parts)

    def open(self, pads: Tensor, length: int, on_gpu: bool) -> "_Wave":
        return _Wave([part.open(pads, length, on_gpu) for part in self.parts], self.coefficient)


class _Wave:
    def __init__(self, waves: list, coefficient: float):
        self.waves, self.coefficient = waves, coefficient

    def prefill(self, tokens: Tensor) -> Tensor:
        return self._combined(*(wave.prefill(tokens) for wave in self.waves))

    def __call__(self, token: Tensor, column: int) -> Tensor:
        return self._combined(*(wave(token, column) for wave in self.waves))

    def keep(self, rows: Tensor) -> None:
        for wave in self.waves:
            wave.keep(rows)

    def _combined(self, instruct: Tensor, coarse: Tensor, base: Tensor) -> Tensor:
        return instruct + self.coefficient * (coarse - base)
