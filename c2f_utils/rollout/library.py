"""Sampling through the library's own forward and cache: right for every causal model that the library computes.

Soft caps, logit scales, query and key norms, layers without positions or with a window, experts and adapters are the
model's own affair: its `forward` is called with a padding mask, position ids and its own kind of cache, and its
logits are sampled. On a GPU the cache is static, so that shapes stay as they are for layers that were compiled
(`models.compile`); there it has not been run yet, on a CPU both caches are tested against each other.
"""

import inspect

import torch
from torch import Tensor, nn

from c2f_utils.domain.samples import Sample
from c2f_utils.errors import C2FError
from c2f_utils.rollout.sampler import BatchedSampler


class LibrarySampler(BatchedSampler):
    """Batched sampling from any `*ForCausalLM` of the library; same arguments as `KVDecoder`.

    Raises C2FError for a model without a cache that rows can leave.
    """

    def answer(self, *arguments, **named) -> list[Sample]:
        training = self.causal.training
        self.causal.eval()  # while it trains with recomputed activations, the library builds no cache
        try:
            return super().answer(*arguments, **named)
        finally:
            self.causal.train(training)

    def open(self, pads: Tensor, length: int, on_gpu: bool) -> "_Wave":
        return _Wave(self.causal, pads, length, static=on_gpu)


class _Wave:
    def __init__(self, causal: nn.Module, pads: Tensor, length: int, static: bool):
        self.causal, self.pads, self.cache = causal, pads, None
        self.columns = torch.arange(length, device=pads.device)
        self.visible = (self.columns[None] >= pads[:, None]).long()  # [B, S+T]
        self.known = inspect.signature(causal.forward).parameters
        self.seen, self.name = 0, "cache_params" if "cache_params" in self.known else "past_key_values"
        if static:
            from transformers import StaticCache

            self.cache = StaticCache(config=causal.config, max_cache_len=length)

    def prefill(self, tokens: Tensor) -> Tensor:
        return self._forward(tokens, (self.columns[: tokens.shape[1]] - self.pads[:, None]).clamp_min(0))

    def __call__(self, token: Tensor, column: int) -> Tensor:
        return self._forward(token[:, None], (column - self.pads)[:, None])

    def keep(self, rows: Tensor) -> None:
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        self.pads, self.visible = self.pads[rows], self.visible[rows]
        self.cache.reorder_cache(rows)

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.seen += tokens.shape[1]
        # What a recurrent layer has read is in its state: its mask is of the new tokens only.
        first = self.seen - tokens.shape[1] if self.name == "cache_params" else 0
        wanted = {"position_ids": positions, self.name: self.cache, "logits_to_keep": 1, "use_cache": True}
        out = self.causal(
            input_ids=tokens,
            attention_mask=self.visible[:, first : self.seen],
            **{name: value for name, value in wanted.items() if name in self.known},
        )
        self.cache = getattr(out, self.name, None)
        if not hasattr(self.cache, "reorder_cache"):
            raise C2FError(
                f"{type(self.causal).__name__} gives no cache whose rows can be dropped ({self.name}); it cannot "
                "be sampled here: choose another base model"
            )
        return out.logits[:, -1].float()
