"""The self-check before any work: sampler, trainer and the model's own forward must agree on real prompts.

A sampler that leaves out a part of a model raises no error: it makes fluent answers with the wrong probabilities, and
PPO on these learns from noise. So a few answers are made, greedy and at T = 1, and each is read again by the model's
plain forward, alone, unpadded and without a cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.positions import positions_of
from c2f_utils.rollout.anatomy import unwrapped
from c2f_utils.rollout.sampler import Sampler
from c2f_utils.weights import first_line

PROMPTS, TOKENS = 4, 32  # answers of each kind, and their limit
EXACT = 1e-4  # nats: the largest error of any token in float32
# Nats per token: the mean error beside bfloat16 or float16 weights, where logits of 16 are 0.06 apart and every order
# of summation rounds anew. Measured on a GPU with 7B weights: 0.04 (our decoder), 0.07 (continuous batching).
ROUNDED = 0.1


@dataclass(frozen=True)
class Agreement:
    """How far sampler and trainer are from the model's own forward; errors in nats (largest, or mean where rounded)."""

    model: str
    sampler: str
    dtype: str
    answers: int  # greedy ones
    greedy: int  # of them: every token the most likely one, up to the tolerance
    tokens: int
    sampler_error: float
    trainer_error: float | None

    @property
    def tolerance(self) -> float:
        return EXACT if self.dtype == "float32" else ROUNDED

    @property
    def holds(self) -> bool:
        errors = (self.sampler_error, self.trainer_error or 0.0)
        return self.greedy == self.answers and all(error <= self.tolerance for error in errors)

    def __str__(self) -> str:
        trainer = "" if self.trainer_error is None else f", trainer {self.trainer_error:.2g}"
        return (
            f"{self.model} ({self.dtype}) through {self.sampler}: {self.greedy} of {self.answers} greedy answers are "
            f"the model's own; log-probability errors over {self.tokens} tokens: sampler {self.sampler_error:.2g}"
            f"{trainer} nats (at most {self.tolerance:g})"
        )


def measure(
    model: nn.Module,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    score: Callable[[list[Sample]], Tensor] | None = None,
    tokens: int = TOKENS,
) -> Agreement:
    """Compare on `prompts`; `score` gives the trainer's log-probabilities [N] at T = 1 of all tokens of answers."""
    positions = getattr(sampler, "positions", positions_of(unwrapped(model).config))
    limits = [max(1, min(tokens, positions - len(p.ids))) for p in prompts]
    drawn = [sampler(prompts, limits, temperature=t, seed=0) for t in (0.0, 1.0)]
    answers = [*drawn[0], *drawn[1]]
    read = [_own_logps(model, s) for s in answers]
    own = [full.gather(-1, torch.tensor(s.sampled)[:, None])[:, 0] for full, s in zip(read, answers, strict=True)]
    dtype = str(next(unwrapped(model).parameters()).dtype).removeprefix("torch.")
    exact = dtype == "float32"
    # Between two tokens as likely as each other either is the greedy one.
    slack = EXACT if exact else 10 * ROUNDED
    behind = [float((read[i].max(-1).values - own[i]).max()) for i in range(len(prompts))]
    flat = torch.cat(own)
    return Agreement(
        model=type(unwrapped(model)).__name__,
        sampler=type(sampler).__name__,
        dtype=dtype,
        answers=len(prompts),
        greedy=sum(gap <= slack for gap in behind),
        tokens=len(flat),
        sampler_error=_error(torch.cat([s.logps.cpu() for s in answers]) - flat, exact),
        trainer_error=None if score is None else _error(score(answers).detach().cpu() - flat, exact),
    )


def agree(model: nn.Module, sampler: Sampler, prompts: Sequence[Prompt], score=None) -> Agreement | None:
    """`measure` on prompts of different lengths; raises C2FError with the numbers when they do not agree.

    Prompts that no model could answer are left to whoever refuses them by number; without any other: None.
    """
    config = unwrapped(model).config.get_text_config()
    positions = getattr(sampler, "positions", positions_of(config))
    fit = [p for p in prompts if 0 < len(p.ids) < positions and max(p.ids) < config.vocab_size]
    if not fit:
        return None
    by_length = sorted(fit, key=lambda p: len(p.ids))
    some = [by_length[i * (len(by_length) - 1) // max(1, PROMPTS - 1)] for i in range(min(PROMPTS, len(by_length)))]
    try:
        found = measure(model, sampler, some, score)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise C2FError(
            f"self-check failed: {type(unwrapped(model)).__name__} through {type(sampler).__name__}: "
            f"{type(error).__name__}: {first_line(error)}; set coarse.engine to 'library', or choose another base "
            "model"
        ) from error
    if not found.holds:
        raise C2FError(
            f"self-check failed: {found}; training would learn from wrong probabilities: set coarse.engine to "
            "'library', or choose another base model"
        )
    return found


@torch.no_grad()
def _own_logps(model: nn.Module, sample: Sample) -> Tensor:
    """Log-probabilities [T, V] of every next token along an answer, from the plain forward; float32, CPU."""
    causal = unwrapped(model)
    training, device = causal.training, next(causal.parameters()).device
    causal.eval()
    try:
        ids = torch.tensor([[*sample.prompt.ids, *sample.sampled]], device=device)
        logits = causal(input_ids=ids, use_cache=False).logits[0, len(sample.prompt.ids) - 1 : -1]
    finally:
        causal.train(training)
    return logits.float().log_softmax(-1).cpu()


def _error(difference: Tensor, exact: bool) -> float:
    # A NaN agrees with nothing, and `max` would pass it on only on some devices.
    difference = difference.abs().nan_to_num(nan=float("inf"))
    return float(difference.max() if exact else difference.mean())
