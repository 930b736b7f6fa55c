"""What an answer is paid: its reward, what its length costs, and how one that the limit cut is credited."""

from dataclasses import dataclass

import torch
from torch import Tensor

from c2f_utils.coarse.experience import Experience
from c2f_utils.coarse.ppo import RunningScale
from c2f_utils.domain.samples import Sample
from c2f_utils.settings.config import Coarse


@dataclass
class DualPrice:
    """A price of length that moves until answers are `budget` tokens long on average: a loop closed on the price where
    a law closes it on the limit.

    An answer of L tokens pays price * max(0, (L - budget) / budget); after an iteration
    price <- max(0, price + rate * (mean L - budget) / budget). Our reading of LACONIC (arXiv 2602.14468), of which we
    know a summary. A budget of 0 costs nothing.
    """

    budget: int = 0
    rate: float = 0.1
    price: float = 0.0

    def cost(self, tokens: Tensor) -> Tensor:
        """What answers of these lengths pay, [B]."""
        return self.price * (tokens / self.budget - 1).clamp_min(0) if self.budget else torch.zeros_like(tokens)

    def update(self, tokens: Tensor) -> None:
        """Move the price by the answers' mean length."""
        if self.budget:
            self.price = max(0.0, self.price + self.rate * (float(tokens.mean()) / self.budget - 1))


def overlong(tokens: Tensor, limits: Tensor, buffer: float) -> Tensor:
    """Soft overlong punishment [B], 0 to 1: nothing until the last `buffer` (a share) of the limit, then linear up to 1
    at the limit (Yu et al. 2025, DAPO). The buffer is a share and no number of tokens, so that it follows l(t)."""
    return ((tokens / limits - (1 - buffer)) / buffer).clamp(0, 1)


def length_cost(tokens: Tensor, limits: Tensor, config: Coarse, dual: DualPrice) -> Tensor:
    """What length costs answers (or their prefixes) of these many tokens under these limits, in units of the reward."""
    cost = config.token_price * tokens + dual.cost(tokens)
    return cost + config.overlong * overlong(tokens, limits, config.overlong_buffer) if config.overlong else cost


def shape(e: Experience, config: Coarse, dual: DualPrice, scale: RunningScale, largest: int) -> None:
    """Fill `earned` (in units of the reward), `shaped` (scaled, clipped), `expected` and `trained`.

    `largest` is the largest limit that the law can ask for: an answer that was cut there cannot go on.
    """
    cut = torch.tensor([s.cut for s in e.samples])
    tokens, limits = (torch.tensor(row, dtype=torch.float32) for row in zip(*map(_whole, e.samples), strict=True))
    scores = last_prefixes(e) if config.cut == "average" else e.rewards
    penalty = config.cut_penalty * cut if config.cut == "penalty" else 0.0
    paid = scores - length_cost(tokens, limits, config, dual)
    e.earned = paid - penalty
    if config.reward_scaling == "running":
        paid = paid / scale.update(paid)
    may_go_on = tokens < largest if config.cut == "continue" else torch.full_like(cut, config.cut == "bootstrap")
    e.expected = cut & may_go_on
    # Where the critic says what would have followed, there is no score.
    e.shaped = (paid.clamp(-config.reward_clip, config.reward_clip) - penalty).masked_fill(e.expected, 0.0)
    e.trained = e.mask & ~cut[:, None] if config.cut == "mask" else e.mask


def _whole(sample: Sample) -> tuple[int, int]:
    """Tokens and limit of an answer with what was said of it in earlier iterations."""
    before = len(sample.prompt.forced)
    return before + sample.tokens, before + sample.limit


def last_prefixes(e: Experience) -> Tensor:
    """Rewards [B] in which an answer that was cut gets the mean over the last eighth of its prefixes; our design.

    Where the limit falls within a sentence decides much of what a reward model says of a cut answer, and nothing about
    the answer. What ended by itself keeps its reward, and so does everything where most answers do: there a cut is
    paid no better than it stands, or a policy that can end its answers unlearns it.
    """
    cut = torch.tensor([s.cut for s in e.samples])
    if cut.float().mean() < 0.5:
        return e.rewards
    means = torch.stack([row[-max(1, len(row) // 8) :].mean() for row in e.prefix_rewards])
    return torch.where(cut, means, e.rewards)
