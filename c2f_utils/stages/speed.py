"""How fast does this machine answer and read with this base model? A probe of some seconds, for estimates of time."""

from collections.abc import Callable
from time import perf_counter

import torch
from torch import nn

from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.models.packing import collate
from c2f_utils.rollout.anatomy import trunk_of
from c2f_utils.rollout.sampler import Sampler
from c2f_utils.runs.work import Speeds
from c2f_utils.stages import data
from c2f_utils.stages.inputs import Inputs

SECONDS = 4.0  # after which neither of the two measurements grows any further
TOKENS = 64  # of an answer, at most
PAIRS = 64  # whose mean length stands for all


def probe(inputs: Inputs, model: nn.Module, sampler: Sampler, prompts: list[Prompt]) -> Speeds:
    """Measure with batches that grow up to those of training: `coarse.prompts` answers, and
    `coarse.tokens_per_micro_batch` tokens read at once."""
    coarse, device = inputs.settings.coarse, next(model.parameters()).device
    samples: list[Sample] = []

    def answer(count: int) -> int:
        batch = [prompts[i % len(prompts)] for i in range(count)]
        samples[:] = sampler(batch, [min(TOKENS, 4 * count)] * count, temperature=1.0, seed=count)
        return sum(len(s.sampled) for s in samples)

    @torch.no_grad()
    def read(count: int) -> int:
        batch = collate([samples[i % len(samples)] for i in range(count)], inputs.tokenizer.pad_token_id, device)
        trunk_of(model)(input_ids=batch.ids, use_cache=False)
        return batch.ids.numel()

    generated = _rate(answer, coarse.prompts, device)
    longest = max(s.positions for s in samples)
    return Speeds(
        generated,
        _rate(read, max(1, coarse.tokens_per_micro_batch // longest), device),
        sum(len(p.ids) for p in prompts) / len(prompts),
        _pair_tokens(inputs),
    )


def _rate(work: Callable[[int], int], largest: int, device: torch.device) -> float:
    """Tokens per second of the last of ever larger batches; the first ones warm up."""
    count, began = 1, perf_counter()
    while True:
        start = perf_counter()
        tokens = work(count)
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent = perf_counter() - start
        if count == largest or perf_counter() - began + 4 * spent > SECONDS:
            return tokens / spent
        count = min(largest, 4 * count)


def _pair_tokens(inputs: Inputs) -> float:
    settings = inputs.settings
    few = {"pairs": PAIRS, "held_out_pairs": 1, "base_share": 0.0}
    settings = settings.model_copy(update={"reward": settings.reward.model_copy(update=few)})
    if settings.embedded:
        pairs = [p.tokens for p in data.embedded_pairs(settings, None, inputs.tokenizer, PAIRS, settings.seed)]
    else:
        pairs = [p.tokens for p in data.hub_pairs(settings, inputs.tokenizer)[0]]
    return sum(len(chosen) + len(rejected) for chosen, rejected in pairs) / len(pairs)
