"""Coarse RLHF: PPO with a critic straight on a base model, while a law moves the output-length limit.

Question: what does reinforcement learning without supervised fine-tuning give as the limit grows? Inputs: a base
model, a reward, prompts, a law. Outputs: the Coarse Actor, one metrics row per iteration, an evaluation curve at a
fixed limit. The loop is five verbs, each callable alone: `collect -> judge -> credit -> improve -> advance`. Several
processes: `accelerate launch -m c2f_utils.coarse run.yaml` (`ranks.py`, `stages/worker.py`). A trainer from a
library is not used because none is left that has a critic: TRL removed its PPO after 1.10.

What is known to break PPO on language models, and what is done about it here, is listed in `docs/ppo_details.md`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from time import perf_counter

import torch
from torch import Tensor, nn

from c2f_utils.coarse import checkpoints, ppo
from c2f_utils.coarse.actor_critic import ActorCritic
from c2f_utils.coarse.budget import TokenBudget, preflight
from c2f_utils.coarse.experience import Experience, pool, signals
from c2f_utils.coarse.ranks import Ranks
from c2f_utils.coarse.refusals import one_each, refuse
from c2f_utils.coarse.shaping import DualPrice, length_cost, shape
from c2f_utils.coarse.unfinished import Begun, continued, going_on
from c2f_utils.coarse.updates import Updates
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.limits import Law, refuse_another, refuse_beyond
from c2f_utils.models.packing import collate, pack
from c2f_utils.models.rewards import RewardFunction
from c2f_utils.redundancy import rep_n
from c2f_utils.rollout.sampler import Sampler
from c2f_utils.settings.config import Coarse

LOGGED = ("policy_loss", "value_loss", "entropy", "clip_fraction")  # of `improve`, means over optimiser steps


class CoarseTrainer:
    """PPO under a moving limit; iterate over it for one metrics row per iteration.

    `reward` is any callable from samples to [B] rewards; if it has `prefix_scores`, laws may use the tail return.
    `evaluate(actor)` gives a metrics dictionary at a fixed limit. `folder` receives checkpoints; a trainer built on
    a folder with checkpoints continues. `ranks` are the processes that share the work, `updates` makes the optimiser.
    Raises C2FError before training for impossible work (`refusals.py`).
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
        ranks: Ranks | None = None,
        updates: Callable[[ActorCritic, Coarse, Ranks], Updates] = Updates,
    ):
        self.policy, self.reward, self.sampler, self.prompts = policy, reward, sampler, list(prompts)
        self.law, self.config, self.seed, self.pad_id, self.folder = law, config, seed, pad_id, folder
        self.evaluate, self.stop, self.ranks = evaluate, stop, ranks or Ranks()
        refuse(policy, reward, sampler, self.prompts, law, config, self.ranks)
        self.law_began, self.largest = law.state_dict(), law.largest
        self.iteration = 0
        self.rollout_tokens = 0
        self.kl = ppo.KLController(config.kl_coefficient, config.kl_target)
        self.scale = ppo.RunningScale()
        self.dual = DualPrice(config.length_budget, config.length_price_rate)
        self.unfinished: list[Begun] = []  # answers that go on in the next iteration
        self.history: list[dict] = []
        self.curve: list[dict] = []
        self.device = policy.critic.head.weight.device
        self.ranks.start_equal(policy)
        self.budget = TokenBudget(config.tokens_per_micro_batch, self.ranks)
        self.updates = updates(policy, config, self.ranks)
        if folder is not None and (found := checkpoints.whole(folder)):
            self.load_state_dict(checkpoints.load(found), found)
        longest = max(len(p.ids) for p in self.prompts) + law.largest
        preflight(policy, self.budget, longest, config.temperature, self.device)

    def __iter__(self) -> Iterator[dict]:
        """Run until `config.iterations` or a stop request, yielding each iteration's metrics; the state is saved on
        the way."""
        if self.evaluate and not self.curve:
            self._measure()
        while self.iteration < self.config.iterations and not self.ranks.any(self.stop()):
            yield self.step()
        if self.history and self.iteration % self.config.checkpoint_every:
            self.save()  # asked to stop between two checkpoints

    def step(self) -> dict:
        """One iteration: the five verbs in order, then evaluation and checkpoint where they are due."""
        began = perf_counter()
        if not self.iteration and self.folder is not None and checkpoints.latest(self.folder) is None:
            self.save()  # so that there is always one from before any damage
        experience = self.credit(self.judge(self.collect()))
        row = self.advance(experience, self.improve(experience))
        row["seconds"] = round(perf_counter() - began, 3)
        last = self.iteration >= self.config.iterations
        if self.evaluate and (self.iteration % self.config.evaluate_every == 0 or last):
            self._measure()
        if self.iteration % self.config.checkpoint_every == 0 or last:
            self.save()
        return row

    # --- the five verbs ----------------------------------------------------------------------------------------------

    def collect(self) -> Experience:
        """Answer the next prompts (with several processes: this one's share), each under the limit that the law
        draws for it."""
        rng = random.Random(f"{self.seed}-{self.iteration}")
        limits = self.law.draw(self.config.prompts, rng)
        refuse_beyond(self.law, limits, self.largest)
        seed = rng.getrandbits(62) + 100_003 * self.ranks.rank
        limits = [max(1, limit - len(begun)) for limit, (_, begun) in zip(limits, self._asked(), strict=True)]
        prompts, limits = self.ranks.deal(self._next_prompts()), self.ranks.deal(limits)
        with self.ranks.whole(self.policy):
            samples = self.sampler(prompts, limits, temperature=self.config.temperature, seed=seed)
        return Experience(samples, self.law.limit)

    @torch.no_grad()
    def judge(self, e: Experience) -> Experience:
        """Rewards, reference log-probabilities and values of every answer; afterwards every process holds all
        answers."""
        columns: dict[str, list[Tensor]] = {}
        with self.ranks.whole(self.policy):
            if hasattr(self.reward, "prefix_scores"):
                columns["prefix"] = self.reward.prefix_scores(e.samples)
                rewards = torch.stack([row[-1] for row in columns["prefix"]])
            else:
                rewards = one_each(self.reward(e.samples), len(e.samples))
            for attempt in self.budget.attempts(max(s.positions for s in e.samples)):
                with attempt as tokens:
                    columns |= self._score(e.samples, tokens)
        columns["reward"] = list(rewards[:, None])
        e.samples, columns = pool(self.ranks, self._next_prompts(), e.samples, columns)
        e.prefix_rewards = columns.get("prefix")
        e.rewards, e.final_values = torch.cat(columns["reward"]), torch.cat(columns["final"])
        self._refuse_non_finite(e.rewards, "reward", e.samples)
        if e.prefix_rewards:  # a law that follows them would stand still for ever, and no checkpoint could hold it
            self._refuse_non_finite(
                torch.stack([row.sum() for row in e.prefix_rewards]), "reward of a prefix", e.samples
            )
        e.mask = ppo.token_mask([len(s.sampled) for s in e.samples])
        e.logps = ppo.pad(columns["logps"]) if "logps" in columns else e.sampler_logps
        e.weights, e.truncated = ppo.importance_weights(e.logps, e.sampler_logps, self.config.importance_cap)
        e.reference, e.values = ppo.pad(columns["reference"]), ppo.pad(columns["values"])
        return e

    def credit(self, e: Experience) -> Experience:
        """Shape the reward, add the KL price per token, estimate advantages and value targets."""
        c = self.config
        shape(e, c, self.dual, self.scale, self.largest)
        rewards = -self.kl.coefficient * ppo.kl_k1(e.logps, e.reference) * e.mask
        # On the last token that was sampled.
        rewards[torch.arange(len(e.samples)), e.mask.sum(1) - 1] += e.shaped
        e.paid = rewards
        final = e.final_values * e.expected
        lam = ppo.adaptive_lambda(e.limit, c.lambda_alpha) if c.lambda_policy == "adaptive" else c.lambda_policy
        advantages = targets = ppo.gae(rewards, e.values, final, e.mask, c.discount, lam)
        if c.lambda_critic != lam:
            targets = ppo.gae(rewards, e.values, final, e.mask, c.discount, c.lambda_critic)
        e.returns = targets + e.values * e.mask
        e.advantages = ppo.whiten(advantages, e.trained)
        return e

    def improve(self, e: Experience) -> dict[str, float]:
        """PPO epochs over token-budgeted micro-batches; every loss is a sum over tokens divided by the step's token
        count."""
        rows, updates, ratio_error = [], 0, 0.0
        for chosen in self._minibatches(len(e.samples)):
            step_tokens = int(e.trained[chosen].sum())
            if not step_tokens:  # every answer of the step was cut and is left out
                continue
            mine = self._share(e, chosen)
            lengths = [e.samples[i].positions for i in mine]
            for attempt in self.budget.attempts(max(lengths, default=0)):
                with attempt as tokens:
                    self.updates.clear()
                    found = []
                    for group, weight in self.ranks.passes(pack(lengths, tokens), lengths):
                        loss, row = self.loss(e, [mine[i] for i in group], step_tokens)
                        self.updates.backward(loss, weight)
                        found += [row] * (weight > 0)
            for norm in self.updates.step():
                self._refuse_non_finite(norm, "gradient norm", e.samples, sorted(chosen))
            if not updates:
                ratio_error = self.ranks.most(max((row.pop("ratio_error") for row in found), default=0.0))
            rows, updates = rows + found, updates + 1
        sums = [torch.stack([row[name] for row in rows]).sum() if rows else torch.zeros(()) for name in LOGGED]
        means = (self.ranks.sum(torch.stack(sums)) / max(1, updates)).tolist()
        return dict(zip(LOGGED, means, strict=True)) | {"ratio_error": ratio_error}

    def loss(self, e: Experience, group: list[int], step_tokens: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Clipped surrogate plus value loss of one micro-batch of answers, over the tokens of its whole optimiser step;
        and what is logged of them."""
        c = self.config
        warming = self.iteration < c.critic_warmup  # only the critic learns
        batch = collate([e.samples[i] for i in group], self.pad_id, self.device, sampled=True)
        old_logp, weight, advantage, old_value, target, trained = (
            torch.cat([array[i, :n] for i, n in zip(group, batch.lengths, strict=True)]).to(self.device)
            for array in (e.logps, e.weights, e.advantages, e.values, e.returns, e.trained)
        )
        logp, entropy, values = self.policy(batch, c.temperature, actor=not warming)
        per_token = trained * ppo.value_loss(values, old_value, target, c.value_clip)
        loss = v_loss = per_token.sum() / step_tokens
        zero = torch.zeros((), device=self.device)
        row = dict.fromkeys(LOGGED, zero) | {"value_loss": v_loss.detach(), "ratio_error": 0.0}
        if not warming:
            p_token, ratio, clipped = ppo.policy_loss(logp, old_logp, advantage, c.clip, c.clip_high)
            p_token = trained * weight * p_token
            p_loss = p_token.sum() / step_tokens
            per_token = per_token + p_token
            loss = p_loss + (c.value_coefficient if c.critic == "shared" else 1.0) * v_loss
            row |= {
                "policy_loss": p_loss.detach(), "entropy": (trained * entropy.detach()).sum() / step_tokens,
                "clip_fraction": (trained & clipped).sum() / step_tokens, "ratio_error": float((ratio - 1).abs().max()),
            }  # fmt: skip
        if not torch.isfinite(loss):
            sums = torch.stack([part.detach().sum() for part in batch.split(per_token)])
            self._refuse_non_finite(sums, "loss", e.samples, group)
        return loss, row

    def advance(self, e: Experience, stats: dict[str, float]) -> dict:
        """Move the limit and the KL price, and keep in one row what this iteration was."""
        seen = signals(e, self.iteration, lambda tokens, limits: length_cost(tokens, limits, self.config, self.dual))
        limit = self.law.limit
        next_limit = self.law.update(seen)
        refuse_beyond(self.law, [next_limit], self.largest)
        self.ranks.agree(next_limit, f"the next limit of law {type(self.law).__name__}")
        self.kl.update(seen.kl_per_token)
        tokens = [len(s.answer) for s in e.samples]
        self.dual.update(torch.tensor(tokens, dtype=torch.float32))
        self.unfinished = continued(e, self._asked(), next_limit) if self.config.cut == "continue" else []
        self.rollout_tokens += int(e.mask.sum())
        self.iteration += 1
        row = {
            "iteration": self.iteration,
            "limit": limit,
            "next_limit": next_limit,
            "reason": self.law.reason,
            "rollout_tokens": self.rollout_tokens,
            "reward": float(e.rewards.mean()),
            "reward_sd": float(e.rewards.std()) if len(e.rewards) > 1 else 0.0,
            "kl_per_token": seen.kl_per_token,
            "kl_coefficient": self.kl.coefficient,
            "mean_tokens": sum(tokens) / len(tokens),
            "p95_tokens": sorted(tokens)[int(0.95 * (len(tokens) - 1))],
            "truncated_share": seen.truncated_share,
            "tail_return": seen.tail_return,
            "explained_variance": ppo.explained_variance(e.values, e.returns, e.mask),
            "rep4": sum(rep_n(s.answer, 4) for s in e.samples) / len(tokens),
            "sampler_mismatch": e.sampler_mismatch,
            "truncated_weights": float(e.truncated[e.mask].float().mean()),
            "tokens_per_micro_batch": self.budget.tokens,
            **stats,
        }
        self.history.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
        return self.history[-1]

    # --- what a checkpoint holds -------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint to `folder`, if there is one; every process must call."""
        if self.folder is not None:
            checkpoints.save(self.folder, self.iteration, self.state_dict(), self.ranks)

    def state_dict(self) -> checkpoints.Parts:
        """What training changes: trained weights, Adam moments and, as JSON, everything else.

        Random numbers are functions of seed and iteration, so no generator state is needed. Every process must call.
        """
        return {
            "weights": {name: self.ranks.full(w.detach()) for name, w in self.updates.weights.items()},
            "optimiser": self.updates.moments(),
            "state": {
                "iteration": self.iteration,
                "rollout_tokens": self.rollout_tokens,
                "law_name": type(self.law).__name__,
                "law": self.law.state_dict(),
                "law_began": self.law_began,
                "kl_coefficient": self.kl.coefficient,
                "scale": asdict(self.scale),
                "length_price": self.dual.price,
                "unfinished": self.unfinished,
                "tokens_per_micro_batch": self.budget.tokens,
                "history": self.history,
                "curve": self.curve,
            },
        }

    def load_state_dict(self, parts: checkpoints.Parts, where: object) -> None:
        """Continue from a checkpoint's parts; `where` names it. Raises C2FError when it belongs to another law or
        model."""
        state = parts["state"]
        refuse_another(self.law, state["law_name"], state.get("law_began"), where)
        self.updates.load(parts["weights"], parts["optimiser"], where)
        self.iteration, self.rollout_tokens = state["iteration"], state["rollout_tokens"]
        self.history, self.curve = state["history"], state["curve"]
        self.law.load_state_dict(state["law"])
        self.kl.coefficient = state["kl_coefficient"]
        self.scale = ppo.RunningScale(**state["scale"])
        self.dual.price, self.unfinished = state.get("length_price", 0.0), state.get("unfinished", [])
        self.budget.tokens = state["tokens_per_micro_batch"]

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _next_prompts(self) -> list[Prompt]:
        return [going_on(self.prompts[number], begun) for number, begun in self._asked()]

    def _asked(self) -> list[Begun]:
        """What the next answers are to: those that go on first, then prompts in an order reshuffled at every pass; a
        function of seed and iteration, so resuming needs no cursor."""
        chosen = []
        for position in range(self.iteration * self.config.prompts, (self.iteration + 1) * self.config.prompts):
            epoch, offset = divmod(position, len(self.prompts))
            chosen.append((self._order(epoch)[offset], []))
        return [*self.unfinished, *chosen][: self.config.prompts]

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_shuffled", (None,))[0] != epoch:
            order = list(range(len(self.prompts)))
            random.Random(f"order-{self.seed}-{epoch}").shuffle(order)
            self._shuffled = (epoch, order)
        return self._shuffled[1]

    def _minibatches(self, answers: int) -> Iterator[list[int]]:
        """Which answers each optimiser step is made of: a new permutation per epoch, cut into `minibatches`."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.iteration)
        size = -(-answers // self.config.minibatches)
        for _ in range(self.config.epochs):
            order = torch.randperm(answers, generator=generator).tolist()
            yield from (order[start : start + size] for start in range(0, answers, size))

    def _share(self, e: Experience, chosen: list[int]) -> list[int]:
        """This process's part of an optimiser step's answers; several get them dealt out longest first."""
        if self.ranks.world == 1:
            return chosen
        return self.ranks.deal(sorted(chosen, key=lambda i: -e.samples[i].positions))

    def _score(self, samples: Sequence[Sample], budget: int) -> dict[str, list[Tensor]]:
        """Reference log-probabilities and values of each answer, and the old policy's log-probabilities where the
        sampler's do not serve."""
        c = self.config
        ours = c.engine != "vllm" and self.policy.dtype == torch.float32
        recorded = c.old_logps == "recorded" or (c.old_logps == "auto" and ours)
        names = ("reference", "values", "final") if recorded else ("reference", "values", "final", "logps")
        found: dict[str, list] = {name: [None] * len(samples) for name in names}
        for group in pack([s.positions for s in samples], budget):
            batch = collate([samples[i] for i in group], self.pad_id, self.device, sampled=True)
            logps, _, values = self.policy(batch, c.temperature, actor=not recorded)
            reference = self.policy.reference_logps(batch, c.temperature)
            final = self.policy.final_values(batch) if c.cut in ("bootstrap", "continue") else torch.zeros(len(group))
            rows = {
                "reference": batch.split(reference.cpu()),
                "values": batch.split(values.cpu()),
                "final": final.cpu().split(1),
            }
            if not recorded:
                rows["logps"] = batch.split(logps.cpu())
            for name, parts in rows.items():
                for index, part in zip(group, parts, strict=True):
                    found[name][index] = part
        return found

    def _refuse_non_finite(
        self, values: Tensor, what: str, samples: Sequence[Sample], numbers: Sequence[int] | None = None
    ) -> None:
        if torch.isfinite(values).all():
            return
        bad = numbers or range(len(values))
        if values.ndim:
            bad = [i for i, ok in zip(bad, torch.isfinite(values).tolist(), strict=True) if not ok]
        saved = checkpoints.latest(self.folder) if self.folder is not None else None
        where = f"; checkpoint {saved} is from before it" if saved else "; no checkpoint was asked for"
        raise C2FError(
            f"non-finite {what} in iteration {self.iteration + 1}, samples {bad} of {len(samples)}{where}. "
            "Look at their texts, then lower the learning rates or tighten coarse.reward_clip"
        )

    def _measure(self) -> None:
        row = {"iteration": self.iteration, "rollout_tokens": self.rollout_tokens, "limit": self.law.limit}
        with self.ranks.whole(self.policy):
            self.curve.append(row | self.evaluate(self.policy.actor))
