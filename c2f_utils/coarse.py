"""Coarse RLHF: PPO with a critic straight on a base model, while a law moves the output-length limit.

Question: what does reinforcement learning without supervised fine-tuning give as the limit grows? Inputs: a base
model, a reward, prompts, a law. Outputs: the Coarse Actor, one metrics row per iteration, an evaluation curve at a
fixed limit. The loop is five verbs, each callable alone: `collect -> judge -> credit -> improve -> advance`. Several
processes: `accelerate launch -m c2f_utils.coarse run.yaml` (see `ranks.py`, `processes.py`). A trainer from a
library is not used because none is left that has a critic: TRL removed its PPO after 1.10.

What is known to break PPO on language models, and what is done about it here ([-] = left out, with the reason):
 1 dropout          off in actor, reference, critic and reward model (`models.disable_dropout`), or no ratio starts at 1
 2 PAD and EOS      differ (`models.load_tokenizer`); no padding is ever stored, and none is read
 3 padding side     answers are unpadded lists; rows are padded on the right for training, on the left for decoding
 4 shift            log-prob of a token is read off the state before it; one temperature for policy and reference
 5 sampling         the plain policy: no top-k, top-p, penalties or shortest length, or the KL estimate is wrong
 6 reward model     scored at the last real token; head of standard deviation 1/sqrt(d + 1); mean 0 on base samples
 7 length           decoding ends at EOS row by row [- fixed-length rollouts: waste that grows with l(t)]
 8 no EOS           `cut: penalty` subtracts from answers that the limit ended [- replacing the score hides its size]
 9 cuts             `Sample.stop` is stored, never inferred; score, average, bootstrap or penalty [- masking them: it
                    taught less in published ablations; - switching by itself: one `cut` per run, so results say which]
10 critic           from the reward model, or zero head with warm-up; lambda of its own, and one that grows with l
                    [- ending the warm-up by explained variance: a fixed count is comparable between laws]
11 reward's place   on the last token of the answer, EOS included
12 KL               k1 per token in the reward, k3 for the log; the controller follows KL per token, not its sum
13 whitening        over all real tokens of all processes; value targets are not whitened
14 schedule         value clip, Adam eps 1e-5, a new permutation per epoch [- decaying rates: laws are compared along
                    their tokens, and a decay would tie the middle of a run to its end]
15 normaliser       sums over tokens divided by the step's tokens on all processes, not means of means
16 old policy       the sampler's log-probs in float32, else recomputed; the first ratio and the mismatch are logged
                    [- importance weights for that mismatch: no asynchronous sampler here needs them]
17 range            log-ratios clamped to +-20; softmax, head and values in float32
18 seeds            one order of prompts for all processes, sampling seeds 100,003 apart
19 empty rows       refused in `collate`; a process without work backs up a micro-batch of weight 0 (split weights)
20 PPO-max          running scale, reward clip, a rate for each part, both clips; length, entropy and repetition are
                    logged beside the reward [- pretraining loss: the KL price to the base does its work]
21 stale caches     weights are read at every call; continuous batching gets a fresh manager
22 stop strings     end an answer like EOS, in both samplers
"""

import random
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import torch
from torch import Tensor, nn

from c2f_utils import checkpoints, ppo
from c2f_utils.budget import TokenBudget, preflight
from c2f_utils.config import Coarse
from c2f_utils.errors import C2FError
from c2f_utils.experience import Experience, last_prefixes, pool, signals
from c2f_utils.limits import Law, refuse_beyond
from c2f_utils.models import ActorCritic
from c2f_utils.packing import collate, pack
from c2f_utils.ranks import Ranks
from c2f_utils.redundancy import rep_n
from c2f_utils.refusals import refuse
from c2f_utils.rewards import RewardFunction
from c2f_utils.rollout import Prompt, Sample, Sampler
from c2f_utils.updates import Stats, Updates


class CoarseTrainer:
    """PPO under a moving limit; iterate over it for one metrics row per iteration.

    `reward` is any callable from samples to [B] rewards; if it has `prefix_scores`, laws may use the tail return.
    `evaluate(actor)` gives a metrics dictionary at a fixed limit. `folder` receives checkpoints; a trainer built on
    a folder with checkpoints continues. `ranks` are the processes that share the work. Raises C2FError before
    training for impossible work (`refusals.py`).
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
        self.history: list[dict] = []
        self.curve: list[dict] = []
        self.device = policy.critic.head.weight.device
        self.ranks.start_equal(policy)
        self.budget = TokenBudget(config.tokens_per_micro_batch, self.ranks)
        self.updates = Updates(policy, config, self.ranks, self.budget)
        if folder is not None:
            checkpoints.resume(self, folder)
        longest = max(len(p.ids) for p in self.prompts) + law.largest
        preflight(policy, self.budget, longest, config.temperature, self.device)

    def __iter__(self) -> Iterator[dict]:
        """Run until `config.iterations` or a stop request, yielding each iteration's metrics; the state is saved on
        the way."""
        if self.evaluate and not self.curve:
            self._measure()
        while self.iteration < self.config.iterations and not self.ranks.any(self.stop()):
            yield self.step()
        if self.folder is not None and self.history and self.iteration % self.config.checkpoint_every:
            checkpoints.save(self, self.folder)  # asked to stop between two checkpoints

    def step(self) -> dict:
        """One iteration: the five verbs in order."""
        began = perf_counter()
        if not self.iteration and self.folder is not None and checkpoints.latest(self.folder) is None:
            checkpoints.save(self, self.folder)  # so that there is always one from before any damage
        experience = self.credit(self.judge(self.collect()))
        stats = self.improve(experience)
        return self.advance(experience, stats, began)

    # --- the five verbs ----------------------------------------------------------------------------------------------

    def collect(self) -> Experience:
        """Answer the next prompts (with several processes: this one's share), each under the limit that the law
        draws for it."""
        rng = random.Random(f"{self.seed}-{self.iteration}")
        limits = self.law.draw(self.config.prompts, rng)
        refuse_beyond(self.law, limits, self.largest)
        seed = rng.getrandbits(62) + 100_003 * self.ranks.rank
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
                rewards = torch.as_tensor(self.reward(e.samples), dtype=torch.float32).cpu()
            longest = max(len(s.prompt.ids) + s.tokens for s in e.samples)
            columns |= self.budget.spend(lambda tokens: self._score(e.samples, tokens), longest)
        columns["reward"] = list(rewards[:, None])
        e.samples, columns = pool(self.ranks, self._next_prompts(), e.samples, columns)
        e.prefix_rewards = columns.get("prefix")
        e.rewards, e.final_values = torch.cat(columns["reward"]), torch.cat(columns["final"])
        self._refuse_non_finite(e.rewards, "reward", e.samples)
        if e.prefix_rewards:  # a law that follows them would stand still for ever, and no checkpoint could hold it
            self._refuse_non_finite(
                torch.stack([row.sum() for row in e.prefix_rewards]), "reward of a prefix", e.samples
            )
        e.mask = ppo.token_mask([s.tokens for s in e.samples])
        e.logps = ppo.pad(columns.get("logps") or [s.logps for s in e.samples])
        e.reference, e.values = ppo.pad(columns["reference"]), ppo.pad(columns["values"])
        return e

    def credit(self, e: Experience) -> Experience:
        """Shape the reward, add the KL price per token, estimate advantages and value targets."""
        c = self.config
        cut = torch.tensor([s.cut for s in e.samples])
        tokens = torch.tensor([float(s.tokens) for s in e.samples])
        scores = last_prefixes(e) if c.cut == "average" else e.rewards
        shaped = scores - c.token_price * tokens
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
        advantages = targets = ppo.gae(rewards, e.values, final, e.mask, c.discount, lam)
        if c.lambda_critic != lam:
            targets = ppo.gae(rewards, e.values, final, e.mask, c.discount, c.lambda_critic)
        e.returns = targets + e.values * e.mask
        e.advantages = ppo.whiten(advantages, e.mask)
        return e

    def improve(self, e: Experience) -> dict[str, float]:
        """PPO epochs over token-budgeted micro-batches; every loss is a sum over tokens divided by the step's token
        count."""
        warming = self.iteration < self.config.critic_warmup
        totals: dict[str, list[Tensor]] = {"policy_loss": [], "value_loss": [], "entropy": [], "clip_fraction": []}
        ratio_error = 0.0
        count = 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.iteration)
        for _ in range(self.config.epochs):
            order = torch.randperm(len(e.samples), generator=generator).tolist()
            size = -(-len(order) // self.config.minibatches)
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                stats = self._update(e, chosen, warming)
                if not count:
                    ratio_error = self.ranks.most(max((s["ratio_error"] for s in stats), default=0.0))
                for name, values in totals.items():
                    values += [s[name] for s in stats]
                count += 1
        sums = torch.stack([torch.stack(values).sum() if values else torch.zeros(()) for values in totals.values()])
        means = (self.ranks.sum(sums) / count).tolist()
        return dict(zip(totals, means, strict=True)) | {"ratio_error": ratio_error}

    def advance(self, e: Experience, stats: dict[str, float], began: float) -> dict:
        """Move the limit and the KL price, log, evaluate and checkpoint."""
        seen = signals(e, self.iteration, self.config.token_price)
        limit = self.law.limit
        next_limit = self.law.update(seen)
        refuse_beyond(self.law, [next_limit], self.largest)
        self.ranks.agree(next_limit, f"the next limit of law {type(self.law).__name__}")
        self.kl.update(seen.kl_per_token)
        tokens = [s.tokens for s in e.samples]
        self.rollout_tokens += sum(tokens)
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
            "rep4": sum(rep_n(s.ids, 4) for s in e.samples) / len(tokens),
            "sampler_mismatch": e.sampler_mismatch,
            "tokens_per_micro_batch": self.budget.tokens,
            **stats,
        }
        row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        row["seconds"] = round(perf_counter() - began, 3)  # without evaluation and checkpoint
        last = self.iteration >= self.config.iterations
        if self.evaluate and (self.iteration % self.config.evaluate_every == 0 or last):
            self._measure()
        self.history.append(row)
        if self.folder is not None and (self.iteration % self.config.checkpoint_every == 0 or last):
            checkpoints.save(self, self.folder)
        return row

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _next_prompts(self) -> list[Prompt]:
        """Prompts in an order reshuffled at every pass; a function of seed and iteration, so resuming needs no
        cursor."""
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

    def _collate(self, samples: Sequence[Sample]):
        return collate(samples, self.pad_id, self.device)

    def _score(self, samples: Sequence[Sample], budget: int) -> dict[str, list[Tensor]]:
        """Reference log-probabilities and values of each answer, and the old policy's log-probabilities where the
        sampler's do not serve."""
        c = self.config
        recorded = c.old_logps == "recorded" or (c.old_logps == "auto" and self.policy.dtype == torch.float32)
        names = ("reference", "values", "final") if recorded else ("reference", "values", "final", "logps")
        found: dict[str, list] = {name: [None] * len(samples) for name in names}
        for group in pack([len(s.prompt.ids) + s.tokens for s in samples], budget):
            batch = self._collate([samples[i] for i in group])
            logps, _, values = self.policy(batch, c.temperature, actor=not recorded)
            reference = self.policy.reference_logps(batch, c.temperature)
            final = self.policy.final_values(batch) if c.cut == "bootstrap" else torch.zeros(len(group))
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

    def _update(self, e: Experience, chosen: list[int], warming: bool) -> list[Stats]:
        """One optimiser step on the chosen answers, dealt out longest first; returns this process's micro-batch
        statistics."""
        tokens = sum(e.samples[i].tokens for i in chosen)
        lengths = {i: len(e.samples[i].prompt.ids) + e.samples[i].tokens for i in chosen}
        mine = self.ranks.deal(sorted(chosen, key=lambda i: -lengths[i]) if self.ranks.world > 1 else chosen)
        stats = self.updates.accumulate(
            [lengths[i] for i in mine],
            lambda group, weight: self._backward(e, [mine[i] for i in group], tokens, warming, weight),
        )
        for norm in self.updates.step():
            self._refuse_non_finite(norm, "gradient norm", e.samples, sorted(chosen))
        return stats

    def _backward(self, e: Experience, group: list[int], tokens: int, warming: bool, weight: float = 1.0) -> Stats:
        """Gradients of one micro-batch; `tokens` is the token count of the whole optimiser step."""
        c = self.config
        batch = self._collate([e.samples[i] for i in group])
        device = batch.ids.device
        old_logp, advantage, old_value, target = (
            torch.cat([array[i, :n] for i, n in zip(group, batch.lengths, strict=True)]).to(device)
            for array in (e.logps, e.advantages, e.values, e.returns)
        )
        logp, entropy, values = self.policy(batch, c.temperature, actor=not warming)
        per_token = ppo.value_loss(values, old_value, target, c.value_clip)
        loss = v_loss = per_token.sum() / tokens
        zero = torch.zeros((), device=device)
        stats = {
            "policy_loss": zero,
            "value_loss": v_loss.detach(),
            "entropy": zero,
            "clip_fraction": zero,
            "ratio_error": 0.0,
        }
        if not warming:
            p_token, ratio, clipped = ppo.policy_loss(logp, old_logp, advantage, c.clip)
            p_loss = p_token.sum() / tokens
            per_token = per_token + p_token
            loss = p_loss + (c.value_coefficient if c.critic == "shared" else 1.0) * v_loss
            stats |= {
                "policy_loss": p_loss.detach(), "entropy": entropy.detach().sum() / tokens,
                "clip_fraction": clipped.float().sum() / tokens, "ratio_error": float((ratio - 1).abs().max()),
            }  # fmt: skip
        if not torch.isfinite(loss):
            sums = torch.stack([row.detach().sum() for row in batch.split(per_token)])
            self._refuse_non_finite(sums, "loss", e.samples, group)
        (loss if weight == 1.0 else loss * weight).backward()
        return stats

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


if __name__ == "__main__":
    import sys

    from c2f_utils.processes import main

    sys.exit(main())
