"""Decode-time counterpart of the residue merge: sample from instruct + c (coarse - base) in logit space.

The three models run side by side on the same tokens (proxy-tuning, Liu et al. 2024); nothing is merged, and every
token costs three forward passes and three key/value caches. A comparison, not a way to serve.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from c2f_utils.rollout.decoder import KVDecoder


class ProxyDecoder(KVDecoder):
    """A decoder whose logits are combined from three models of one layout."""

    def __init__(
        self,
        instruct: nn.Module,
        coarse: nn.Module,
        base: nn.Module,
        tokenizer,
        coefficient: float,
        stop_strings: Sequence[str] = (),
    ):
        super().__init__(instruct, tokenizer, stop_strings=stop_strings)
        self.coefficient = coefficient
        self.others = [KVDecoder(model, tokenizer) for model in (coarse, base)]

    def _stack(self) -> list:
        """The layers of all three models, one after the other, each with its own cache."""
        return [layer for decoder in (super(), *self.others) for layer in decoder._stack()]

    def _forward(self, layers: list, *inputs) -> Tensor:
        depth = len(layers) // 3
        instruct = super()._forward(layers[:depth], *inputs)
        coarse, base = (
            decoder._forward(layers[(i + 1) * depth : (i + 2) * depth], *inputs)
            for i, decoder in enumerate(self.others)
        )
        return instruct + self.coefficient * (coarse - base)
