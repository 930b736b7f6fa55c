"""The mathematics of PPO with a critic: pure functions on padded arrays, no state.

Arrays are [B, T]: B answers, T = longest answer; `mask` is True on real tokens. V(s_t) is the value *before* token t.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def pad(rows: list[Tensor], fill: float = 0.0) -> Tensor:
    """Stack 1-D tensors of different length into [B, T]."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def token_mask(lengths: list[int]) -> Tensor:
    """[B, T] bool, True on the first `lengths[i]` tokens of row i."""
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def kl_k1(logp: Tensor, reference: Tensor) -> Tensor:
    """Unbiased per-token estimate log p - log q, in nats; may be negative token by token (Schulman 2020)."""
    return logp - reference


def kl_k3(logp: Tensor, reference: Tensor) -> Tensor:
    """Non-negative per-token estimate r - 1 - log r with r = q/p, in nats, for logging (Schulman 2020)."""
    log_ratio = (reference - logp).clamp(-20, 20)
    return log_ratio.exp() - 1 - log_ratio


def gae(
    rewards: Tensor, values: Tensor, final_values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> Tensor:
    """Generalised advantage estimates [B, T] (Schulman et al. 2016), zero outside the mask.

    final_values [B] is V after the last token: 0 where the answer truly ended, the critic's value where the limit
    cut it and the cut is bootstrapped (Pardo et al. 2018). `lam` is one number or one per row [B].
    """
    lengths = mask.sum(1)
    lam = torch.as_tensor(lam, dtype=values.dtype).expand(len(values))
    following = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], 1)
    following[torch.arange(len(values)), lengths - 1] = final_values
    deltas = (rewards + gamma * following - values) * mask
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(final_values)
    for t in reversed(range(values.shape[1])):
        running = deltas[:, t] + gamma * lam * running * mask[:, t]
        advantages[:, t] = running
    return advantages * mask


def adaptive_lambda(limit: int, alpha: float) -> float:
    """lambda = clamp(1 - 1/(alpha l), 0.95, 1): the horizon grows with the limit (VAPO; its alpha is 0.05)."""
    return min(1.0, max(0.95, 1.0 - 1.0 / (alpha * limit)))


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit variance over all real tokens of the batch, zero elsewhere."""
    count = mask.sum().clamp_min(1)
    mean = (values * mask).sum() / count
    variance = (((values - mean) ** 2) * mask).sum() / count
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float, high: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate per token [N] (Schulman et al. 2017), the ratio, and where the clip was active.

    `high` is the clip of ratios above 1 where it is another one (clip-higher, Yu et al. 2025); 0: the same.
    """
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + (high or clip))
    return torch.maximum(unclipped, clipped), ratio.detach(), (clipped > unclipped).detach()


def importance_weights(old_logp: Tensor, sampler_logp: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Weights min(pi_old / pi_sampler, cap) of tokens that another engine than the trainer drew, and where the cap
    acts; cap 0 gives ones.

    Truncated importance sampling (Ionides 2008), per token as in IMPALA (Espeholt et al. 2018): biased where the cap
    acts, of bounded variance. Times the clip's own ratio pi / pi_old they are pi / pi_sampler.
    """
    ratio = (old_logp - sampler_logp).clamp(-20, 20).exp() if cap else torch.ones_like(old_logp)
    cap = cap or float("inf")
    return ratio.clamp(max=cap), ratio > cap


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half squared error per token [N]; with clip > 0 the larger of plain and clipped error (units of the return)."""
    plain = (values - returns) ** 2
    if not clip:
        return 0.5 * plain
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(plain, (clipped - returns) ** 2)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns) over real tokens; None when the returns do not vary."""
    values, returns = values[mask].double(), returns[mask].double()
    variance = returns.var(unbiased=False)
    if len(returns) < 2 or variance < 1e-12:
        return None
    return float(1 - (returns - values).var(unbiased=False) / variance)


@dataclass
class KLController:
    """Coefficient of the KL price; with a target it follows the *per-token* KL (after Ziegler et al. 2019).

    Per token and not summed, because the summed KL grows with the limit and would tighten the leash for a reason
    that is not drift.
    """

    coefficient: float
    target: float = 0.0

    def update(self, kl_per_token: float) -> None:
        """Multiply the coefficient by 1 + clip(KL / target - 1, -0.2, 0.2); KL in nats per token, target 0 keeps it
        fixed."""
        if self.target:
            self.coefficient *= 1.0 + min(0.2, max(-0.2, kl_per_token / self.target - 1.0))


@dataclass
class RunningScale:
    """Mean square of the reward over iterations; rewards are divided by its root, the mean is not shifted (PPO-max,
    MOSS 2023)."""

    square: float = 0.0
    count: int = 0

    def update(self, rewards: Tensor) -> float:
        """Take in a batch [B] and return the root mean square so far, in the unit of the rewards."""
        self.count += len(rewards)
        self.square += (float((rewards**2).mean()) - self.square) * len(rewards) / self.count
        return max(1e-6, self.square**0.5)
