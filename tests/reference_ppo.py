"""PPO with a critic the naive way, written from the formulas alone: what `CoarseTrainer` is compared with.

One answer at a time, unpadded, float64, full logits through the model's own forward, plain Python loops; advantages by
their O(T^2) definition; own AdamW, clipping, whitening, KL price, controller, scale and law. Nothing of
`c2f_utils.coarse` is called.
"""

import copy
import math
import statistics

import torch
from torch import Tensor, nn

from c2f_utils.domain.samples import Sample
from c2f_utils.settings.config import Coarse


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


class Logistic:
    """l <- min(l_max, l + step / (1 + exp(-(w0 + z(R) - value error + 2 (cut share - 0.3)))))."""

    def __init__(self, start: int, maximum: int, step: int):
        self.exact, self.maximum, self.growth = float(start), maximum, step
        self.mean = self.variance = None

    @property
    def limit(self) -> int:
        return round(self.exact)

    def update(self, reward: float, value_error: float, cut_share: float) -> None:
        if self.mean is None:
            z, self.mean, self.variance = 0.0, reward, 0.0
        else:
            change = reward - self.mean
            z = min(3.0, max(-3.0, change / math.sqrt(self.variance + 1e-4)))
            self.mean, self.variance = self.mean + 0.3 * change, 0.7 * (self.variance + 0.3 * change**2)
        logit = 0.7 + z - value_error + 2.0 * (cut_share - 0.3)
        self.exact = min(float(self.maximum), self.exact + self.growth / (1 + math.exp(-logit)))


class AdamW:
    """Adam without weight decay: m/(1 - b1^t) / (sqrt(v/(1 - b2^t)) + eps), step count of each weight its own."""

    def __init__(self):
        self.moments: dict[str, tuple[int, Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, name: str, weight: Tensor, gradient: Tensor, rate: float) -> None:
        t, m, v = self.moments.get(name, (0, torch.zeros_like(weight), torch.zeros_like(weight)))
        t, m, v = t + 1, 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        self.moments[name] = t, m, v
        weight -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-5)


class ReferencePPO:
    """An actor, a critic and a base model of its own (copied before the trainer moves them), all in float64.

    `score` maps answer ids to a reward. `iterate(samples, steps)` is one iteration on given answers; `steps` says which
    answers every optimiser step is made of.
    """

    def __init__(self, policy, base: nn.Module, score, law: Logistic, config: Coarse):
        self.actor = copy.deepcopy(policy.actor).double()
        self.trunk = copy.deepcopy(policy.critic.trunk).double() if policy.critic.trunk is not None else None
        self.head = copy.deepcopy(policy.critic.head).double()
        self.base, self.score, self.law, self.c = base.double(), score, law, config
        self.coefficient, self.square, self.seen, self.dual = config.kl_coefficient, 0.0, 0, 0.0
        self.adam, self.iteration, self.tokens = AdamW(), 0, 0

    def weights(self) -> dict[str, Tensor]:
        """Everything that training changes, under the trainer's names."""
        parts = {"actor": self.actor, "critic.trunk": self.trunk, "critic.head": self.head}
        return {
            f"{part}.{name}": weight
            for part, module in parts.items()
            if module is not None
            for name, weight in module.named_parameters()
            if weight.requires_grad
        }

    # --- what the models say of one answer ---------------------------------------------------------------------------

    def log_policy(self, logits: Tensor, sample: Sample) -> list[tuple[Tensor, Tensor]]:
        """Log-probability and entropy of every answer token under softmax(logits / T); the state before it decides."""
        found = []
        for t, token in enumerate(sample.ids):
            scaled = logits[len(sample.prompt.ids) + t - 1] / self.c.temperature
            logps = scaled - torch.log(torch.exp(scaled - scaled.max()).sum()) - scaled.max()
            found.append((logps[token], -(torch.exp(logps) * logps).sum()))
        return found

    def read(self, sample: Sample, learning_actor: bool = True) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Log-probabilities, entropies and values of the answer's tokens; one value more, after the last token."""
        ids = torch.tensor([[*sample.prompt.ids, *sample.ids]])
        out = self.actor(input_ids=ids, output_hidden_states=True, use_cache=False)
        if self.trunk is not None:
            states = self.trunk(input_ids=ids, use_cache=False).last_hidden_state[0]
        else:
            states = out.hidden_states[-1][0] if learning_actor else out.hidden_states[-1][0].detach()
        said = self.log_policy(out.logits[0], sample)
        first = len(sample.prompt.ids) - 1
        values = [self.head(states[first + t])[0] for t in range(sample.tokens + 1)]
        return [logp for logp, _ in said], [entropy for _, entropy in said], values

    @torch.no_grad()
    def judge(self, sample: Sample) -> dict:
        """Old and reference log-probabilities, importance weights min(pi_old / pi_sampler, cap), values and rewards of
        every prefix, as plain numbers."""
        logps, _, values = self.read(sample)
        ids = torch.tensor([[*sample.prompt.ids, *sample.ids]])
        reference = self.log_policy(self.base(input_ids=ids, use_cache=False).logits[0], sample)
        sampled = sample.logps.tolist()
        odds = [math.exp(float(p) - q) for p, q in zip(logps, sampled, strict=True)]
        cap = self.c.importance_cap
        return {
            "logps": [float(x) for x in logps],
            "weights": [min(x, cap) for x in odds] if cap else [1.0 for _ in odds],
            "truncated": [x > cap > 0 for x in odds],
            "mismatch": [abs(float(p) - q) for p, q in zip(logps, sampled, strict=True)],
            "reference": [float(x) for x, _ in reference],
            "values": [float(x) for x in values[:-1]],
            "final": float(values[-1]),
            "prefixes": [self.score(sample.ids[: k + 1]) for k in range(sample.tokens)],
        }

    # --- credit ------------------------------------------------------------------------------------------------------

    def cost(self, tokens: int, limit: int) -> float:
        """What length costs: the price per token, the punishment near the limit, and the dual price."""
        c = self.c
        near = min(1.0, max(0.0, (tokens - (1 - c.overlong_buffer) * limit) / (c.overlong_buffer * limit)))
        over = max(0.0, (tokens - c.length_budget) / c.length_budget) if c.length_budget else 0.0
        return c.token_price * tokens + c.overlong * near + self.dual * over

    def shape(self, samples: list[Sample], facts: list[dict]) -> list[float]:
        """What each answer is paid at its last token: price, scale, clip, and the treatment of cuts."""
        c, paid = self.c, []
        mostly_cut = 2 * sum(sample.cut for sample in samples) >= len(samples)
        for sample, fact in zip(samples, facts, strict=True):
            worth = fact["prefixes"][-1]
            if c.cut == "average" and sample.cut and mostly_cut:
                worth = mean(fact["prefixes"][-max(1, sample.tokens // 8) :])
            paid.append(worth - self.cost(len(sample.prompt.forced) + sample.tokens, self.law.limit))
        penalties = [c.cut_penalty if sample.cut and c.cut == "penalty" else 0.0 for sample in samples]
        self.earned = [x - y for x, y in zip(paid, penalties, strict=True)]
        if c.reward_scaling == "running":
            self.square = (self.square * self.seen + sum(x * x for x in paid)) / (self.seen + len(paid))
            self.seen += len(paid)
            paid = [x / math.sqrt(self.square) for x in paid]
        paid = [min(c.reward_clip, max(-c.reward_clip, x)) for x in paid]
        for i, sample in enumerate(samples):
            if sample.cut and c.cut == "penalty":
                paid[i] -= c.cut_penalty
            if self.expected(sample):
                paid[i] = 0.0
        return paid

    def expected(self, sample: Sample) -> bool:
        """Whether the critic says what would follow: of every cut answer, or of those that may go on."""
        whole = len(sample.prompt.forced) + sample.tokens
        return sample.cut and (self.c.cut == "bootstrap" or self.c.cut == "continue" and whole < self.law.maximum)

    def teaches(self, sample: Sample) -> bool:
        return not (sample.cut and self.c.cut == "mask")

    def advantages(self, rewards: list[float], values: list[float], final: float, lam: float) -> list[float]:
        """A_t = sum_k (gamma lambda)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t."""
        gamma, after = self.c.discount, [*values[1:], final]
        deltas = [r + gamma * b - a for r, a, b in zip(rewards, values, after, strict=True)]
        return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]

    def credit(self, samples: list[Sample], facts: list[dict]) -> None:
        """Add `advantages` (whitened over all tokens) and `returns` to the facts of every answer."""
        c = self.c
        lam = min(1.0, max(0.95, 1 - 1 / (c.lambda_alpha * self.law.limit)))
        lam = lam if c.lambda_policy == "adaptive" else c.lambda_policy
        for sample, fact, paid in zip(samples, facts, self.shape(samples, facts), strict=True):
            price = [self.coefficient * (p - q) for p, q in zip(fact["logps"], fact["reference"], strict=True)]
            rewards = [-x for x in price]
            rewards[-1] += paid
            final = fact["final"] if self.expected(sample) else 0.0
            fact["paid"] = rewards
            fact["raw"] = self.advantages(rewards, fact["values"], final, lam)
            targets = self.advantages(rewards, fact["values"], final, c.lambda_critic)
            fact["returns"] = [a + v for a, v in zip(targets, fact["values"], strict=True)]
        every = [a for sample, fact in zip(samples, facts, strict=True) if self.teaches(sample) for a in fact["raw"]]
        centre, spread = mean(every), math.sqrt(statistics.pvariance(every) + 1e-8)
        for fact in facts:
            fact["advantages"] = [(a - centre) / spread for a in fact["raw"]]
        for sample, fact in zip(samples, facts, strict=True):
            if not self.teaches(sample):
                fact["advantages"] = [0.0 for _ in fact["raw"]]

    # --- improve -----------------------------------------------------------------------------------------------------

    def step(self, chosen: list[int], samples: list[Sample], facts: list[dict]) -> dict:
        """One optimiser step: losses are sums over tokens divided by the step's tokens."""
        c, warming = self.c, self.iteration < self.c.critic_warmup
        chosen = [i for i in chosen if self.teaches(samples[i])]
        total = sum(samples[i].tokens for i in chosen)
        policy = value = entropy = torch.zeros((), dtype=torch.float64)
        clipped, ratios = 0, []
        for i in chosen:
            logps, entropies, values = self.read(samples[i], learning_actor=not warming)
            for t in range(samples[i].tokens):
                ratio = torch.exp(logps[t] - facts[i]["logps"][t])
                number = float(ratio.detach())
                advantage, old, target = (facts[i][key][t] for key in ("advantages", "values", "returns"))
                inside = min(1 + (c.clip_high or c.clip), max(1 - c.clip, number))
                held = advantage * number > advantage * inside  # the pessimistic one of the two: no gradient
                # Where all are held the gradient is zero, not missing: Adam goes on with its momentum.
                gain = advantage * inside + 0 * ratio if held else advantage * ratio
                policy = policy - facts[i]["weights"][t] * gain
                error = (values[t] - target) ** 2
                if c.value_clip:
                    near = old + torch.clamp(values[t] - old, -c.value_clip, c.value_clip)
                    error = torch.maximum(error, (near - target) ** 2)
                value, entropy = value + error / 2, entropy + entropies[t].detach()
                clipped, ratios = clipped + held, [*ratios, number]
        policy, value = policy / total, value / total
        weight = c.value_coefficient if self.trunk is None else 1.0
        norms = self.descend(value if warming else policy + weight * value)
        zero = {"policy_loss": 0.0, "entropy": 0.0, "clip_fraction": 0.0, "ratio_error": 0.0}
        said = {
            "policy_loss": float(policy.detach()),
            "entropy": float(entropy) / total,
            "clip_fraction": clipped / total,
            "ratio_error": max(abs(r - 1) for r in ratios),
        }
        return (zero if warming else said) | {"value_loss": float(value.detach()), "norms": norms}

    def descend(self, loss: Tensor) -> list[float]:
        """Clip actor and critic apart, step with a rate for each; returns both norms."""
        weights, norms = self.weights(), []
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(weights, found, strict=True) if g is not None}
        for part, rate in (("actor.", self.c.actor_learning_rate), ("critic.", self.c.critic_learning_rate)):
            mine = {name: g for name, g in gradients.items() if name.startswith(part)}
            norms.append(math.sqrt(sum(float((g**2).sum()) for g in mine.values())))
            for name, gradient in mine.items():
                shrunk = gradient * min(1.0, self.c.gradient_clip / norms[-1])
                self.adam.step(name, weights[name], shrunk, rate)
        return norms

    # --- one iteration -----------------------------------------------------------------------------------------------

    def iterate(self, samples: list[Sample], steps: list[list[int]]) -> tuple[list[dict], list[dict], dict]:
        """What it found of every answer, of every optimiser step, and the iteration's row."""
        facts = [self.judge(sample) for sample in samples]
        self.credit(samples, facts)
        return (
            facts,
            (taken := [self.step(chosen, samples, facts) for chosen in steps]),
            self.row(samples, facts, taken),
        )

    def row(self, samples: list[Sample], facts: list[dict], taken: list[dict]) -> dict:
        limit, lengths = self.law.limit, [len(sample.prompt.forced) + sample.tokens for sample in samples]
        whole = [i for i, sample in enumerate(samples) if not sample.prompt.forced]  # laws hear of no part of an answer
        values, returns = ([x for fact in facts for x in fact[key]] for key in ("values", "returns"))
        errors = [r - v for r, v in zip(returns, values, strict=True)]
        rewards = [fact["prefixes"][-1] for fact in facts]
        gains = []
        for sample in (samples[i] for i in whole):
            ends = [min(k + 1, sample.tokens) for k in range(limit)]  # a finished answer keeps its reward
            upto = [self.score(sample.ids[:k]) - self.cost(k, limit) for k in ends]
            gains.append(mean(upto[3 * limit // 4 :]) - mean(upto[limit // 2 : 3 * limit // 4]))
        told = [facts[i] for i in whole]
        targets = [r for fact in told for r in fact["returns"]]
        lost = mean((r - v) ** 2 for fact in told for r, v in zip(fact["returns"], fact["values"], strict=True))
        logs = [q - p for fact in told for p, q in zip(fact["logps"], fact["reference"], strict=True)]
        kl = mean(math.exp(x) - 1 - x for x in logs)
        cuts = mean(samples[i].cut for i in whole)
        self.law.update(mean(self.earned[i] for i in whole), min(3.0, lost / statistics.variance(targets)), cuts)
        if self.c.length_budget:
            over = (mean(lengths) - self.c.length_budget) / self.c.length_budget
            self.dual = max(0.0, self.dual + self.c.length_price_rate * over)
        if self.c.kl_target:
            self.coefficient *= 1 + min(0.2, max(-0.2, kl / self.c.kl_target - 1))
        self.iteration, self.tokens = self.iteration + 1, self.tokens + sum(sample.tokens for sample in samples)
        return {
            "iteration": self.iteration,
            "limit": limit,
            "next_limit": self.law.limit,
            "rollout_tokens": self.tokens,
            "reward": mean(rewards),
            "reward_sd": statistics.stdev(rewards),
            "kl_per_token": kl,
            "kl_coefficient": self.coefficient,
            "mean_tokens": mean(lengths),
            "p95_tokens": sorted(lengths)[int(0.95 * (len(lengths) - 1))],
            "truncated_share": cuts,
            "tail_return": mean(gains),
            "explained_variance": 1 - statistics.pvariance(errors) / statistics.pvariance(returns),
            "rep4": mean(repeated(sample.answer) for sample in samples),
            "sampler_mismatch": mean(x for fact in facts for x in fact["mismatch"]),
            "truncated_weights": mean(x for fact in facts for x in fact["truncated"]),
            "ratio_error": taken[0]["ratio_error"],
        } | {
            name: mean(step[name] for step in taken)
            for name in ("policy_loss", "value_loss", "entropy", "clip_fraction")
        }


def repeated(ids: list[int]) -> float:
    """Share of 4-grams that have occurred before."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return mean(gram in grams[:i] for i, gram in enumerate(grams)) if grams else 0.0
