"""Coarse RLHF: PPO with a critic straight on a base model, while a law moves the output-length limit.

Question: what does reinforcement learning without supervised fine-tuning give as the limit grows? Inputs: a base model, a reward, prompts, a
law. Outputs: the Coarse Actor, one metrics row per iteration, an evaluation curve at a fixed limit. The loop is five verbs, each
callable alone: `collect -> judge -> credit -> improve -> advance`. Simplified: one answer per prompt, one process, constant learning
rates. Log-probabilities recorded while decoding serve as the old policy: the first ratio is 1 up to float rounding (it is measured).
A trainer from a library is not used because none is left that has a critic: TRL removed its PPO after 1.10.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from c2f_utils import checkpoints, ppo
from c2f_utils.config import Coarse
from c2f_utils.errors import C2FError
from c2f_utils.limits import Law, Signals
from c2f_utils.models import ActorCritic
from c2f_utils.packing import collate, pack
from c2f_utils.redundancy import rep_n, repeated_spans
from c2f_utils.rewards import RewardFunction
from c2f_utils.rollout import Prompt, Sample, Sampler


@dataclass
class Experience:
    """One iteration's data; the verbs fill it from top to bottom. Arrays are [B, T], padded, on the CPU."""

    samples: list[Sample]
    limit: int
    rewards: Tensor | None = None  # [B] as the reward function gave them
    prefix_rewards: list[Tensor] | None = None  # per answer, after each token
    mask: Tensor | None = None
    logps: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    final_values: Tensor | None = None  # [B]
    shaped: Tensor | None = None  # [B] reward after price, penalty, scaling and clip
    advantages: Tensor | None = None
    returns: Tensor | None = None


@dataclass
class RunningScale:
    """Mean square of the reward over iterations; rewards are divided by its root, the mean is not shifted."""

    square: float = 0.0
    count: int = 0

    def update(self, rewards: Tensor) -> float:
        self.count += len(rewards)
        self.square += (float((rewards**2).mean()) - self.square) * len(rewards) / self.count
        return max(1e-6, self.square**0.5)


class CoarseTrainer:
    """PPO under a moving limit; iterate over it for one metrics row per iteration.

    `reward` is any callable from samples to [B] rewards; if it has `prefix_scores`, laws may use the tail return. `evaluate(actor)` gives
    a metrics dictionary at a fixed limit. `folder` receives checkpoints; a trainer built on a folder with checkpoints continues.
    Raises C2FError before training when the law's largest limit does not fit the model, or prompts are missing.
    """

    def __init__(
        self,
        policy: ActorCritic,
        reward: RewardFunction,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        law: Law,
        config: Coarse,
        *,
        seed: int,
        pad_id: int,
        folder=None,
        evaluate: Callable[[nn.Module], dict] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.policy, self.reward, self.sampler, self.prompts = policy, reward, sampler, list(prompts)
        self.law, self.config, self.seed, self.pad_id, self.folder = law, config, seed, pad_id, folder
        self.evaluate, self.stop = evaluate, stop
        self._refuse_impossible()
        self.iteration = 0
        self.rollout_tokens = 0
        self.kl = ppo.KLController(config.kl_coefficient, config.kl_target)
        self.scale = RunningScale()
        self.history: list[dict] = []
        self.curve: list[dict] = []
        self.optimiser = torch.optim.AdamW(self._groups(), eps=1e-5, weight_decay=0.0, fused=True)
        if folder is not None:
            checkpoints.resume(self, folder)

    def _refuse_impossible(self) -> None:
        if not self.prompts:
            raise C2FError("there are no prompts to train on; check data.preferences and data.max_prompt_tokens")
        config = self.policy.actor.config
        positions = min(config.max_position_embeddings, getattr(config, "sliding_window", None) or config.max_position_embeddings)
        longest = max(len(p.ids) for p in self.prompts)
        if longest + self.law.largest > positions:
            raise C2FError(
                f"the law's largest limit {self.law.largest} plus the longest prompt of {longest} tokens is beyond the model's {positions} positions; "
                "lower the law's maximum or data.max_prompt_tokens"
            )

    def _groups(self) -> list[dict]:
        named = self.policy.trainable()
        critic = [p for n, p in named.items() if n.startswith("critic.")]
        actor = [p for n, p in named.items() if not n.startswith("critic.")]
        return [{"params": actor, "lr": self.config.actor_learning_rate}, {"params": critic, "lr": self.config.critic_learning_rate}]

    def __iter__(self) -> Iterator[dict]:
        """Run until `config.iterations` or a stop request, yielding each iteration's metrics; the state is saved on the way."""
        if self.evaluate and not self.curve:
            self._measure()
        while self.iteration < self.config.iterations and not self.stop():
            yield self.step()
        if self.folder is not None and self.history and self.iteration % self.config.checkpoint_every:
            checkpoints.save(self, self.folder)  # asked to stop between two checkpoints

    def step(self) -> dict:
        """One iteration: the five verbs in order."""
        began = perf_counter()
        experience = self.credit(self.judge(self.collect()))
        stats = self.improve(experience)
        return self.advance(experience, stats, began)

    # --- the five verbs ----------------------------------------------------------------------------------------------

    def collect(self) -> Experience:
        """Answer the next prompts, each under the limit that the law draws for it."""
        rng = random.Random(f"{self.seed}-{self.iteration}")
        limits = self.law.draw(self.config.prompts, rng)
        samples = self.sampler(self._next_prompts(), limits, temperature=self.config.temperature, seed=rng.getrandbits(62))
        return Experience(samples, self.law.limit)

    @torch.no_grad()
    def judge(self, e: Experience) -> Experience:
        """Rewards, reference log-probabilities and values of every answer."""
        if hasattr(self.reward, "prefix_scores"):
            e.prefix_rewards = self.reward.prefix_scores(e.samples)
            e.rewards = torch.stack([row[-1] for row in e.prefix_rewards])
        else:
            e.rewards = torch.as_tensor(self.reward(e.samples), dtype=torch.float32).cpu()
        self._refuse_non_finite(e.rewards, "reward", e.samples)
        reference, values, final = [None] * len(e.samples), [None] * len(e.samples), torch.zeros(len(e.samples))
        for group in self._packed(e.samples):
            batch = self._collate([e.samples[i] for i in group])
            rows = batch.split(self.policy.reference_logps(batch, self.config.temperature).cpu())
            critic = batch.split(self.policy(batch, self.config.temperature, actor=False)[2].cpu())
            for index, r, v in zip(group, rows, critic, strict=True):
                reference[index], values[index] = r, v
            if self.config.cut == "bootstrap":
                final[group] = self.policy.final_values(batch).cpu()
        e.mask = ppo.token_mask([s.tokens for s in e.samples])
        e.logps, e.reference, e.values = ppo.pad([s.logps for s in e.samples]), ppo.pad(reference), ppo.pad(values)
        e.final_values = final
        return e

    def credit(self, e: Experience) -> Experience:
        """Shape the reward, add the KL price per token, estimate advantages and value targets."""
        c = self.config
        cut = torch.tensor([s.cut for s in e.samples])
        tokens = torch.tensor([float(s.tokens) for s in e.samples])
        shaped = e.rewards - c.token_price * tokens
        if c.reward_scaling == "running":
            shaped = shaped / self.scale.update(shaped)
        shaped = shaped.clamp(-c.reward_clip, c.reward_clip)
        if c.cut == "penalty":
            shaped = shaped - c.cut_penalty * cut
        bootstrapped = cut if c.cut == "bootstrap" else torch.zeros_like(cut)
        # A bootstrapped cut gets no score: the critic says what would have followed.
        e.shaped = shaped.masked_fill(bootstrapped, 0.0)
        rewards = -self.kl.coefficient * ppo.kl_k1(e.logps, e.reference) * e.mask
        rewards[torch.arange(len(tokens)), tokens.long() - 1] += e.shaped
        final = e.final_values * bootstrapped
        lam = ppo.adaptive_lambda(e.limit, c.lambda_alpha) if c.lambda_policy == "adaptive" else c.lambda_policy
        advantages = ppo.gae(rewards, e.values, final, e.mask, c.discount, lam)
        targets = advantages if c.lambda_critic == lam else ppo.gae(rewards, e.values, final, e.mask, c.discount, c.lambda_critic)
        e.returns = targets + e.values * e.mask
        e.advantages = ppo.whiten(advantages, e.mask)
        return e

    def improve(self, e: Experience) -> dict[str, float]:
        """PPO epochs over token-budgeted micro-batches; every loss is a sum over tokens divided by the step's token count."""
        warming = self.iteration < self.config.critic_warmup
        totals: dict[str, list[Tensor]] = {"policy_loss": [], "value_loss": [], "entropy": [], "clip_fraction": []}
        first_ratio_error = 0.0
        count = 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.iteration)
        for _ in range(self.config.epochs):
            order = torch.randperm(len(e.samples), generator=generator).tolist()
            size = -(-len(order) // self.config.minibatches)
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                tokens = sum(e.samples[i].tokens for i in chosen)
                for group in self._packed([e.samples[i] for i in chosen]):
                    stats = self._backward(e, [chosen[i] for i in group], tokens, warming)
                    if not count:
                        first_ratio_error = max(first_ratio_error, stats.pop("ratio_error"))
                    for name in totals:
                        totals[name].append(stats[name])
                self._optimise(e, chosen)
                count += 1
        means = {name: float(torch.stack(values).sum() / count) for name, values in totals.items()}
        return means | {"ratio_error": first_ratio_error}

    def advance(self, e: Experience, stats: dict[str, float], began: float) -> dict:
        """Move the limit and the KL price, log, evaluate and checkpoint."""
        signals = self._signals(e)
        limit = self.law.limit
        next_limit = self.law.update(signals)
        kl = float(ppo.kl_k3(e.logps, e.reference)[e.mask].mean())
        self.kl.update(kl)
        tokens = [s.tokens for s in e.samples]
        self.rollout_tokens += sum(tokens)
        self.iteration += 1
        row = {
            "iteration": self.iteration, "limit": limit, "next_limit": next_limit, "reason": self.law.reason,
            "rollout_tokens": self.rollout_tokens, "reward": float(e.rewards.mean()), "reward_sd": float(e.rewards.std()),
            "kl_per_token": kl, "kl_coefficient": self.kl.coefficient, "mean_tokens": sum(tokens) / len(tokens),
            "p95_tokens": sorted(tokens)[int(0.95 * (len(tokens) - 1))], "truncated_share": signals.truncated_share,
            "tail_return": signals.tail_return, "explained_variance": ppo.explained_variance(e.values, e.returns, e.mask),
            "rep4": sum(rep_n(s.ids, 4) for s in e.samples) / len(tokens), **stats,
        }  # fmt: skip
        row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        last = self.iteration >= self.config.iterations
        if self.evaluate and (self.iteration % self.config.evaluate_every == 0 or last):
            self._measure()
        row["seconds"] = round(perf_counter() - began, 3)
        self.history.append(row)
        if self.folder is not None and (self.iteration % self.config.checkpoint_every == 0 or last):
            checkpoints.save(self, self.folder)
        return row

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _next_prompts(self) -> list[Prompt]:
        """Prompts in an order reshuffled at every pass; a function of seed and iteration, so resuming needs no cursor."""
        chosen = []
        for position in range(self.iteration * self.config.prompts, (self.iteration + 1) * self.config.prompts):
            epoch, offset = divmod(position, len(self.prompts))
            chosen.append(self.prompts[self._order(epoch)[offset]])
        return chosen

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_shuffled", (None,))[0] != epoch:
            order = list(range(len(self.prompts)))
            random.Random(f"order-{self.seed}-{epoch}").shuffle(order)
            self._shuffled = (epoch, order)
        return self._shuffled[1]

    def _packed(self, samples: Sequence[Sample]) -> list[list[int]]:
        return pack([len(s.prompt.ids) + s.tokens for s in samples], self.config.tokens_per_micro_batch)

    def _collate(self, samples: Sequence[Sample]):
        return collate(samples, self.pad_id, self.policy.critic.head.weight.device)

    def _backward(self, e: Experience, group: list[int], tokens: int, warming: bool) -> dict[str, Tensor | float]:
        """Gradients of one micro-batch; `tokens` is the token count of the whole optimiser step."""
        c = self.config
        batch = self._collate([e.samples[i] for i in group])
        device = batch.ids.device
        old_logp, advantage, old_value, target = (
            torch.cat([array[i, :n] for i, n in zip(group, batch.lengths, strict=True)]).to(device)
            for array in (e.logps, e.advantages, e.values, e.returns)
        )
        logp, entropy, values = self.policy(batch, c.temperature, actor=not warming)
        v_loss = ppo.value_loss(values, old_value, target, c.value_clip).sum() / tokens
        zero = torch.zeros((), device=device)
        if warming:
            v_loss.backward()
            return {"policy_loss": zero, "value_loss": v_loss.detach(), "entropy": zero, "clip_fraction": zero, "ratio_error": 0.0}
        p_loss, ratio, clipped = ppo.policy_loss(logp, old_logp, advantage, c.clip)
        p_loss = p_loss.sum() / tokens
        (p_loss + (c.value_coefficient if c.critic == "shared" else 1.0) * v_loss).backward()
        return {
            "policy_loss": p_loss.detach(), "value_loss": v_loss.detach(), "entropy": entropy.detach().sum() / tokens,
            "clip_fraction": clipped.float().sum() / tokens, "ratio_error": float((ratio - 1).abs().max()),
        }  # fmt: skip

    def _optimise(self, e: Experience, chosen: list[int]) -> None:
        """Clip actor and critic gradients apart (the critic's scale must not throttle the actor) and take one step."""
        for group in self.optimiser.param_groups:
            norm = nn.utils.clip_grad_norm_(group["params"], self.config.gradient_clip)
            self._refuse_non_finite(norm, "gradient norm", [e.samples[i] for i in chosen])
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def _refuse_non_finite(self, values: Tensor, what: str, samples: Sequence[Sample]) -> None:
        if torch.isfinite(values).all():
            return
        bad = [i for i, v in enumerate(values.flatten().tolist()) if v != v or v in (float("inf"), float("-inf"))] if values.ndim else "all"
        where = f"; the last checkpoint in {self.folder} is from before it" if self.folder is not None else ""
        raise C2FError(
            f"non-finite {what} in iteration {self.iteration + 1}, samples {bad} of {len(samples)}{where}. "
            "Look at their texts, then lower the learning rates or tighten coarse.reward_clip"
        )

    def _measure(self) -> None:
        row = {"iteration": self.iteration, "rollout_tokens": self.rollout_tokens, "limit": self.law.limit}
        self.curve.append(row | self.evaluate(self.policy.actor))

    def _signals(self, e: Experience) -> Signals:
        cut = [s for s in e.samples if s.cut]
        error = ((e.values - e.returns)[e.mask] ** 2).mean() / e.returns[e.mask].var().clamp_min(1e-6)
        slopes = [float(v[s.tokens - 1] - v[int(0.75 * s.tokens)]) for s, v in zip(e.samples, e.values, strict=True) if s.cut]
        repeats = [float(repeated_spans(s.ids)[int(0.75 * s.tokens) :].mean()) for s in cut]
        return Signals(
            iteration=self.iteration,
            reward=float(e.rewards.mean()),
            value_error=min(3.0, float(error)),
            truncated_share=len(cut) / len(e.samples),
            tail_return=tail_return(e.prefix_rewards, e.limit) if e.prefix_rewards else None,
            value_slope=sum(slopes) / len(slopes) if slopes else 0.0,
            tail_repetition=sum(repeats) / len(repeats) if repeats else 0.0,
            kl_per_token=float(ppo.kl_k3(e.logps, e.reference)[e.mask].mean()),
            rewards=tuple(e.rewards.tolist()),
            limits=tuple(s.limit for s in e.samples),
        )


def tail_return(prefix_rewards: Sequence[Tensor], limit: int) -> float:
    """Mean reward of prefixes in the last quarter of the limit minus the quarter before; finished answers keep their reward and count 0."""
    half, three = limit // 2, (3 * limit) // 4
    gains = []
    for row in prefix_rewards:
        held = torch.cat([row, row[-1:].expand(max(0, limit - len(row)))])
        gains.append(float(held[three:limit].mean() - held[half:three].mean()))
    return sum(gains) / len(gains)
