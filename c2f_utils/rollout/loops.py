"""The two decoding loops, from prompts to tokens: they know waves and endings, but no model.

`stepwise` serves the CPU: it asks after every token who has finished, and who has leaves the cache at once. `seldom`
serves GPUs, where each look waits for the device and each new shape is captured or compiled anew: it asks every
`CHECK` steps, what a finished row wrote after its end is cut off, and finished rows leave when half of the rows has
ended.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from c2f_utils.domain.samples import longest_stop, stopped_at

CHECK = 8  # steps between two looks at who has finished
COMPACT = 0.5  # share of live rows at which the others leave the cache
Draw = Callable[[Tensor], tuple[Tensor, Tensor]]  # logits [B, V] to tokens and their log-probabilities, each [B]


class Wave(Protocol):
    """Prompts that are decoded together: the cache and the forward pass on it; float32 logits [B, V] of the last
    position."""

    def prefill(self, tokens: Tensor) -> Tensor:
        """After left-padded prompts [B, S]."""

    def __call__(self, token: Tensor, column: int) -> Tensor:
        """After one more token [B], which stands in cache position `column`."""

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (a mask or numbers)."""


class Endings:
    """Where each answer ends and why."""

    def __init__(self, limits: list[int], eos: frozenset[int], stop_strings: Sequence[str], tokenizer):
        self.limits, self.eos, self.stop_strings, self.tokenizer = limits, eos, stop_strings, tokenizer
        self.lengths: list[int | None] = [None] * len(limits)
        self.stops = ["limit"] * len(limits)
        self.tail = longest_stop(stop_strings)
        self._eos, self._limit = torch.tensor(sorted(eos)), torch.tensor(limits)

    def now(self, chosen: Tensor, alive: Tensor, step: int) -> Tensor:
        """Which of the rows `alive` finish with the token at `step` of `chosen` [B, T]; a mask over `alive`."""
        token = chosen[alive, step]
        ended = torch.isin(token, self._eos.to(token.device))
        finished = ended | (step + 1 >= self._limit.to(token.device)[alive])
        if self.stop_strings:
            texts = self.tokenizer.batch_decode(chosen[alive, max(0, step + 1 - self.tail) : step + 1].tolist())
            stringed = torch.tensor([any(s in text for s in self.stop_strings) for text in texts], device=token.device)
            finished |= (stringed := stringed & ~ended)
            for row in alive[stringed].tolist():
                self.stops[row] = "string"
        if finished.any():
            for row in alive[ended].tolist():
                self.stops[row] = "eos"
            for row in alive[finished].tolist():
                self.lengths[row] = step + 1
        return finished

    def look(self, row: int, ids: list[int], before: int) -> bool:
        """Whether the answer so far, `ids`, is finished; its first `before` tokens were looked at before."""
        end = next((i for i in range(before, len(ids)) if ids[i] in self.eos), None)
        stop = "limit" if end is None else "eos"
        limit = self.limits[row] - 1
        if (end is None and len(ids) > limit) or (end is not None and end > limit):
            end, stop = limit, "limit"
        last = len(ids) if end is None else end + (stop != "eos")
        if (found := stopped_at(ids[:last], self.tokenizer, self.stop_strings, before)) is not None:
            end, stop = found, "string"
        if end is not None:
            self.lengths[row], self.stops[row] = end + 1, stop
        return end is not None


@torch.no_grad()
def stepwise(wave: Wave, tokens: Tensor, endings: Endings, draw: Draw) -> tuple[Tensor, Tensor]:
    """Token ids and log-probabilities [B, T] after left-padded prompts [B, S]; `endings` learns where each row ends."""
    device, (rows, start), longest = tokens.device, tokens.shape, max(endings.limits)
    logits = wave.prefill(tokens)
    alive = torch.arange(rows, device=device)  # original row of each decoded row
    chosen = torch.zeros(rows, longest, dtype=torch.long, device=device)
    logps = torch.zeros(rows, longest, dtype=torch.float32, device=device)
    for step in range(longest):
        token, logp = draw(logits)
        chosen[alive, step], logps[alive, step] = token, logp
        finished = endings.now(chosen, alive, step)
        if finished.any():
            keep = ~finished
            if not keep.any():
                break
            alive, token = alive[keep], token[keep]
            wave.keep(keep)
        logits = wave(token, start + step)
    return chosen, logps


@torch.no_grad()
def seldom(wave: Wave, tokens: Tensor, endings: Endings, draw: Draw) -> tuple[Tensor, Tensor]:
    """Token ids and log-probabilities [B, T] (CPU) after left-padded prompts [B, S]; `endings` learns where each row
    ends."""
    device, (rows, start), longest = tokens.device, tokens.shape, max(endings.limits)
    logits = wave.prefill(tokens)
    chosen = torch.zeros(rows, longest, dtype=torch.long, device=device)
    logps = torch.zeros(rows, longest, dtype=torch.float32, device=device)
    decoded, live, place, before = list(range(rows)), list(range(rows)), torch.arange(rows, device=device), 0
    for step in range(longest):
        token, logp = draw(logits)
        chosen[place, step], logps[place, step] = token, logp
        if (step + 1) % CHECK == 0 or step + 1 == longest:
            first = max(0, before + 1 - endings.tail)
            news = chosen[:, first : step + 1].tolist()
            live = [r for r in live if not endings.look(r, [-1] * first + news[r], before)]
            before = step + 1
            if not live:
                break
            if len(live) <= COMPACT * len(decoded):
                kept = torch.tensor([decoded.index(r) for r in live], device=device)
                wave.keep(kept)
                decoded, place, token = live, place[kept], token[kept]
        logits = wave(token, start + step)
    return chosen.cpu(), logps.cpu()
