"""What every sampler is, what each refuses before it samples, and the loop that all of ours share.

Log-probabilities must be those of the sampled policy itself, every answer has its own limit, and finished rows must
not cost anything. Answers are drawn from the plain softmax (no top-k, no top-p, no penalties): anything else would
make the KL estimate meaningless. Weights are read at every call, so an update is never stale.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from c2f_utils.domain.samples import Prompt, Sample, finish, stopped_at
from c2f_utils.errors import C2FError
from c2f_utils.positions import beyond, positions_of
from c2f_utils.rollout import loops
from c2f_utils.rollout.anatomy import unwrapped


class Sampler(Protocol):
    """Anything that answers prompts under per-prompt limits."""

    def __call__(
        self, prompts: Sequence[Prompt], limits: Sequence[int], *, temperature: float, seed: int
    ) -> list[Sample]: ...


class BatchedSampler(ABC):
    """Batched decoding of a causal model (a PEFT wrapper around one is fine); subclasses say what a wave computes.

    Raises C2FError for a tokenizer without EOS and for prompts that leave no room below the model's positions.
    """

    def __init__(self, model: nn.Module, tokenizer, tokens_in_cache: int = 65_536, stop_strings: Sequence[str] = ()):
        self.model, self.causal = model, unwrapped(model)
        self.config, self.tokenizer, self.eos = self.causal.config, tokenizer, eos_ids(tokenizer, self.causal)
        self.tokens_in_cache, self.stop_strings = tokens_in_cache, tuple(stop_strings)

    @abstractmethod
    def open(self, pads: Tensor, length: int, on_gpu: bool) -> loops.Wave:
        """A wave with `pads` [B] columns of left padding and room for `length` columns."""

    @property
    def positions(self) -> int:
        """Tokens of prompt and answer together that this sampler computes rightly."""
        return positions_of(self.config)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Prompt],
        limits: Sequence[int] | int,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Sample]:
        """Answer every prompt; `limits` in tokens, temperature 0 is greedy, the same seed gives the same answers.

        `progress` is called with the answers there are and all of them.
        """
        limits = each_limit(limits, prompts, self.positions)
        device = next(self.causal.parameters()).device
        generator = torch.Generator(device=device).manual_seed(seed)
        samples: list[Sample] = []
        for wave in self._waves(prompts, limits):
            samples += self.answer([prompts[i] for i in wave], [limits[i] for i in wave], temperature, generator)
            if progress:
                progress(len(samples), len(prompts))
        return samples

    def _waves(self, prompts: Sequence[Prompt], limits: Sequence[int]) -> list[list[int]]:
        """Consecutive prompts whose padded cache stays within the budget; a single longer one goes alone."""
        waves: list[list[int]] = [[]]
        width = 0
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            width = max(width, len(prompt.ids) + limit)
            if waves[-1] and width * (len(waves[-1]) + 1) > self.tokens_in_cache:
                waves.append([])
                width = len(prompt.ids) + limit
            waves[-1].append(index)
        return waves if waves[0] else []

    @torch.no_grad()
    def answer(
        self,
        prompts: list[Prompt],
        limits: list[int],
        temperature: float,
        generator: torch.Generator,
        on_gpu: bool | None = None,
    ) -> list[Sample]:
        """Answers of one wave; `on_gpu` chooses the loop (default: where the model is)."""
        device = generator.device
        on_gpu = device.type == "cuda" if on_gpu is None else on_gpu
        start = max(len(p.ids) for p in prompts)
        pads = torch.tensor([start - len(p.ids) for p in prompts], device=device)
        tokens = torch.tensor(
            [[0] * (start - len(p.ids)) + list(p.ids) for p in prompts], device=device
        )  # left-padded [B, S]
        wave = self.open(pads, start + max(limits), on_gpu)
        endings = loops.Endings(limits, self.eos, self.stop_strings, self.tokenizer)
        loop = loops.seldom if on_gpu else loops.stepwise
        known = self.tokenizer, self.eos, self.stop_strings
        ids, logps = loop(wave, tokens, endings, lambda logits: draw(logits, temperature, generator))
        ends = zip(prompts, endings.lengths, endings.stops, limits, strict=True)
        return [
            finish(p, ids[i, :n].tolist(), stop, limit, logps[i, :n].cpu().clone(), *known)
            for i, (p, n, stop, limit) in enumerate(ends)
        ]


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Next tokens [B] and their log-probabilities under the tempered policy; temperature 0 takes the most likely
    token."""
    if temperature == 0:
        logps = logits.log_softmax(-1)
        token = logps.argmax(-1)
    else:
        logps = (logits / temperature).log_softmax(-1)
        # Exponential race: argmax(p / E) with E ~ Exp(1) is a draw from p.
        race = torch.empty_like(logps).exponential_(generator=generator)
        token = (logps - race.log()).argmax(-1)
    return token, logps.gather(-1, token[:, None])[:, 0]


def sample_of(
    prompt: Prompt,
    limit: int,
    ids: list[int],
    logps: Tensor,
    tokenizer,
    eos: frozenset[int],
    stop_strings: Sequence[str] = (),
) -> Sample:
    """The answer in what another engine generated, which may go on behind a stop string: the rest is thrown away.

    `logps` [len(ids)]. Tokens that end neither in EOS nor at the limit end in a stop string that the engine saw.
    """
    ended = ids[-1] in eos
    last = stopped_at(ids[:-1] if ended else ids, tokenizer, stop_strings)
    stop = "string" if last is not None else "eos" if ended else "limit" if len(ids) == limit else "string"
    whole = len(ids) if last is None else last + 1
    return finish(prompt, ids[:whole], stop, limit, logps[:whole], tokenizer, eos, stop_strings)


def cuda_devices(model: nn.Module) -> list[int]:
    """The GPUs whose random numbers sampling from a model may touch."""
    device = next(model.parameters()).device
    return [device.index or 0] if device.type == "cuda" else []


def each_limit(limits: Sequence[int] | int, prompts: Sequence[Prompt], positions: int) -> list[int]:
    """One limit per prompt, in tokens; raises C2FError for an empty prompt and for one that with its limit needs more
    than `positions`."""
    limits = [limits] * len(prompts) if isinstance(limits, int) else list(limits)
    for prompt, limit in zip(prompts, limits, strict=True):
        if not prompt.ids:
            raise C2FError(f"empty prompt {prompt.text[:60]!r}: expected at least one token; drop it from the data")
        if said := beyond(len(prompt.ids), limit, positions):
            raise C2FError(f"{said}; lower the law's maximum, evaluation.max_tokens or data.max_prompt_tokens")
    return limits


def eos_ids(tokenizer, model) -> frozenset[int]:
    """Ids that end an answer, of tokenizer, model config and generation config together; raises C2FError when there
    is none."""
    named = [tokenizer.eos_token_id]
    for config in (model.config, getattr(model, "generation_config", None)):
        ids = getattr(config, "eos_token_id", None)
        named += ids if isinstance(ids, list | tuple) else [ids]
    if not (found := frozenset(named) - {None}):
        raise C2FError(
            "the tokenizer has no EOS token; expected one in tokenizer_config.json (eos_token), or answers could "
            "never end"
        )
    return found
