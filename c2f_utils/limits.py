"""Laws for the output-length limit l(t): one protocol, `limit = law.update(signals)`, decisions with reasons.

Which law is whose: by a secondary source the paper extends the limit by a logistic function of reward and critic; no
constants are published. `Logistic` is our form of that description. `Fixed` and `Clock` are controls, `Tail`,
`Useful`, `Gated` and `Probe` are ours. A law keeps its own state (`state_dict`), so that a resumed run continues with
the same l(t). Everything that depends on the limit reads the law's `limit`. A law written in a notebook cell needs only
`limit`, `needs` and `update` (see `Law`).
"""

import json
import math
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

from c2f_utils.errors import C2FError, short


@dataclass(frozen=True)
class Signals:
    """What one iteration tells a law; fields that were not measured are None, and a law declares which it needs."""

    iteration: int
    reward: float | None = None  # mean reward that is paid, before clipping and scaling
    value_error: float | None = None  # critic's mean squared error / Var(value targets), at most 3; 0 = perfect
    truncated_share: float | None = None  # share of answers that the limit ended
    tail_return: float | None = (
        None  # reward gained in the last quarter of the limit minus the quarter before (normalised)
    )
    useful_length: float | None = None  # tokens after which the mean reward of prefixes has made 95 % of its rise
    value_slope: float | None = None  # critic: V at the cut minus V at three quarters, mean over cut answers
    tail_repetition: float | None = None  # share of repeated 4-grams in the last quarter of the answers
    kl_per_token: float | None = None  # nats
    rewards: tuple[float, ...] = ()  # per answer, normalised
    limits: tuple[int, ...] = ()  # per answer


@dataclass
class Law:
    """Base of all laws: a limit in tokens, and an `update` that moves it and says why."""

    limit: int
    reason: str = field(default="start", init=False)
    needs: ClassVar[tuple[str, ...]] = ()

    def update(self, signals: Signals) -> int:
        """Move and return the limit for the next iteration, tokens."""
        raise NotImplementedError

    def draw(self, count: int, rng: random.Random) -> list[int]:
        """Limits of the next `count` requests; the same for all unless the law experiments."""
        return [self.limit] * count

    @property
    def largest(self) -> int:
        """The largest limit the law can ever ask for, tokens; memory is checked against it before work starts."""
        return getattr(self, "maximum", self.limit)

    def state_dict(self) -> dict[str, object]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, object]) -> None:
        for key, value in state.items():
            setattr(self, key, value)

    def _move(self, exact: float, least: float = 0.0) -> None:
        """Go to `exact` tokens within `least` and the maximum, kept unrounded: rounding would swallow small growth."""
        self.exact = max(float(least), min(float(self.maximum), exact))
        self.limit = round(self.exact)

    def checked(self, signals: Signals) -> Signals:
        """The same signals; raises C2FError when one that this law needs was not measured."""
        missing = [name for name in self.needs if getattr(signals, name) in (None, ())]
        if missing:
            raise C2FError(
                f"law {type(self).__name__} needs {', '.join(missing)}, which this trainer or reward does not "
                "measure; choose another law"
            )
        return signals


@dataclass
class Fixed(Law):
    """The same limit for ever."""

    def update(self, signals: Signals) -> int:
        self.reason = "fixed"
        return self.limit


@dataclass
class Clock(Law):
    """From `start` to `maximum` in `duration` iterations without looking at anything; staged context lengthening is
    `steps`, and with a `maximum` below `start` the limit shrinks."""

    maximum: int
    duration: int
    shape: str = "linear"
    stages: list[int] = field(default_factory=list)
    start: int = 0

    def __post_init__(self) -> None:
        self.start = self.start or self.limit

    @property
    def largest(self) -> int:
        return max(self.start, self.maximum)

    def update(self, signals: Signals) -> int:
        progress = min(1.0, (signals.iteration + 1) / self.duration)
        if self.shape == "steps":
            self.limit = self.stages[min(len(self.stages) - 1, int(progress * len(self.stages)))]
        elif self.shape == "geometric":
            self.limit = round(self.start * (self.maximum / self.start) ** progress)
        else:
            eased = progress if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
            self.limit = round(self.start + (self.maximum - self.start) * eased)
        self.reason = f"{self.shape} clock at {progress:.0%}"
        return self.limit


@dataclass
class Logistic(Law):
    """l <- min(l_max, l + step * sigma(w0 + w_R z(R) - w_V value_error + w_rho (rho - rho_0))), our form of the
    paper's description.

    z standardises the mean reward that is paid against its own running mean and deviation (weights 0.7 / 0.3, clamped
    to +-3); value_error is the critic's loss over Var(returns), because the raw loss grows with the limit itself. rho
    is the truncated share; the paper knows no such term, so `w_rho = 0` is the paper mode. z tells the sign of a trend
    and hardly its size: on a steady one it settles near +-1.2 whatever the slope, and in the second iteration, before
    a deviation is known, a change of 0.03 takes it to 3.
    """

    maximum: int
    step: int
    w0: float = 0.7
    w_reward: float = 1.0
    w_value: float = 1.0
    w_truncation: float = 2.0
    truncation_target: float = 0.3
    mean: float | None = None
    variance: float = 0.0
    exact: float | None = None  # the limit before rounding
    needs: ClassVar[tuple[str, ...]] = ("reward", "value_error", "truncated_share")

    def update(self, signals: Signals) -> int:
        signals = self.checked(signals)
        trend = 0.0 if self.mean is None else (signals.reward - self.mean) / math.sqrt(self.variance + 1e-4)
        z = max(-3.0, min(3.0, trend))
        logit = self.w0 + self.w_reward * z - self.w_value * signals.value_error
        logit += self.w_truncation * (signals.truncated_share - self.truncation_target)
        growth = self.step / (1.0 + math.exp(-max(-30.0, min(30.0, logit))))
        change = signals.reward - (signals.reward if self.mean is None else self.mean)
        self.mean = signals.reward if self.mean is None else self.mean + 0.3 * change
        self.variance = 0.7 * (self.variance + 0.3 * change * change)
        self._move((self.limit if self.exact is None else self.exact) + growth)
        seen = f"z(reward) {z:+.2f}, value error {signals.value_error:.2f}, cut {signals.truncated_share:.0%}"
        self.reason = f"{seen}: +{growth:.1f}"
        return self.limit


@dataclass
class Tail(Law):
    """Geometric growth with a brake: grow by `growth` until the tail return, once productive, has faded below its peak.

    e is the running mean (1/2, 1/2) of the tail return and P its peak; growth is scaled by clip((e - 0.2 P) / 0.3 P,
    0, 1) once e has exceeded `productive`. Never holds before that: a limit that stands still below the useful
    length teaches the policy to please the reward at the cut. Never shrinks.
    """

    maximum: int
    growth: float = 0.12
    productive: float = 0.1
    mean: float = 0.0
    peak: float = 0.0
    awake: bool = False
    exact: float | None = None
    needs: ClassVar[tuple[str, ...]] = ("tail_return",)

    def update(self, signals: Signals) -> int:
        signals = self.checked(signals)
        self.mean = 0.5 * self.mean + 0.5 * signals.tail_return
        self.peak = max(self.peak, self.mean)
        self.awake = self.awake or self.mean > self.productive
        share = min(1.0, max(0.0, (self.mean - 0.2 * self.peak) / (0.3 * self.peak))) if self.awake else 1.0
        self._move((self.limit if self.exact is None else self.exact) * (1 + self.growth * share))
        seen = f"tail return {signals.tail_return:+.2f} (mean {self.mean:+.2f}, peak {self.peak:.2f})"
        self.reason = f"{seen}: {share:.0%} of full growth"
        return self.limit


@dataclass
class Useful(Law):
    """Search for the useful length while the tail pays and says something new, then stay near it.

    Searching, the limit grows by `growth`, scaled by the smaller of two shares: how much of its peak the tail return
    still has (as in `Tail`), and how much of the tail is new (all while at most half of it repeats 4-grams, none from
    0.7 on). The second is a witness that the reward does not produce: a reward that loves length pays for any tail, but
    a model that has nothing left to say repeats itself. Once the tail return has faded, or the tail repeats itself and
    the useful length ends before the last quarter, the limit follows `room` times the running mean of the useful
    length: up by at most `growth` per iteration, down by at most 5 % and only while the tail repeats itself. Never
    holds before the tail has paid once, unless it repeats itself. While fewer than half of the answers are cut, the
    limit grows at full speed: it costs next to nothing, the tails of a few are no evidence, and a limit held close
    unlearns the ends of a model that knows how to stop. The search ends once and for all; repetition is measured on
    answers that were cut, so padding that never repeats itself is not noticed.
    """

    maximum: int
    growth: float = 0.12
    room: float = 1.2
    productive: float = 0.1
    minimum: int = 0
    mean: float = 0.0
    peak: float = 0.0
    awake: bool = False
    found: bool = False
    length: float | None = None
    repetition: float | None = None
    cut: float | None = None
    exact: float | None = None
    needs: ClassVar[tuple[str, ...]] = ("truncated_share", "tail_return", "tail_repetition", "useful_length")

    def __post_init__(self) -> None:
        self.minimum = self.minimum or self.limit

    def update(self, signals: Signals) -> int:
        signals = self.checked(signals)
        self.mean = 0.5 * self.mean + 0.5 * signals.tail_return
        self.peak = max(self.peak, self.mean)
        self.awake = self.awake or self.mean > self.productive
        self.repetition = _running(self.repetition, signals.tail_repetition)
        self.length = _running(self.length, signals.useful_length)
        self.cut = _running(self.cut, signals.truncated_share)
        pays = _ramp(self.mean, 0.2 * self.peak, 0.5 * self.peak) if self.awake else 1.0
        new = _ramp(-self.repetition, -0.7, -0.5)
        old = float(self.limit) if self.exact is None else self.exact
        redundant = new < 1.0  # both witnesses must agree: early on the reward of prefixes is too noisy to stop for
        binds = self.cut >= 0.5
        faded = pays == 0.0 or (self.awake and redundant and self.length <= 0.75 * old)
        self.found = self.found or (binds and faded)
        if not binds:
            wanted = (1 + self.growth) * old
            why = f"only {self.cut:.0%} of the answers are cut: full growth"
        elif self.found:
            least = 0.95 * old if redundant else old
            wanted = max(least, min(self.room * self.length, (1 + self.growth * new) * old))
            why = f"useful length {self.length:.0f}: {wanted / old - 1:+.0%}"
        else:
            share = min(pays, new)
            wanted = (1 + self.growth * share) * old
            why = f"searching: {share:.0%} of full growth"
        self._move(wanted, self.minimum)
        seen = f"tail return {self.mean:+.2f} (peak {self.peak:.2f}), tail repetition {self.repetition:.2f}"
        self.reason = f"{seen}; {why}"
        return self.limit


def _running(mean: float | None, value: float) -> float:
    """Running mean with weights 1/2 and 1/2."""
    return value if mean is None else 0.5 * mean + 0.5 * value


def _ramp(value: float, low: float, high: float) -> float:
    """0 below `low`, 1 above `high`, linear between."""
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else float(value >= high)


@dataclass
class Gated(Law):
    """Additive trust, multiplicative retreat: grow only when several witnesses agree, shrink when the tail is
    redundant.

    Grows by `growth` when answers are cut, the critic expects no loss at the cut and the tail is not repetition;
    shrinks by half of it when the tail is mostly repetition; else holds. Witnesses that the reward model does not
    produce, hence harder to please.
    """

    maximum: int
    growth: float = 0.2
    minimum: int = 0
    repetition: float | None = None
    exact: float | None = None
    needs: ClassVar[tuple[str, ...]] = ("truncated_share", "value_slope", "tail_repetition")

    def __post_init__(self) -> None:
        self.minimum = self.minimum or self.limit

    def update(self, signals: Signals) -> int:
        signals = self.checked(signals)
        self.repetition = _running(self.repetition, signals.tail_repetition)
        if self.repetition > 0.8:
            factor, why = 1 - self.growth / 2, "tail repeats itself: back"
        elif signals.truncated_share > 0.3 and signals.value_slope > -0.02 and self.repetition < 0.65:
            factor, why = 1 + self.growth, "cut, value holds, tail is new: grow"
        else:
            factor, why = 1.0, "witnesses disagree: hold"
        self._move((self.exact or self.limit) * factor, self.minimum)
        seen = f"cut {signals.truncated_share:.0%}, value slope {signals.value_slope:+.3f}"
        self.reason = f"{seen}, tail repetition {self.repetition:.2f}; {why}"
        return self.limit


@dataclass
class Probe(Law):
    """Randomise the limit per request, so that the slope of reward on log limit is causal, and follow the slope.

    l_i ~ U[(1 - jitter) l, (1 + jitter) l]; the slope is averaged over about 10 iterations, because one batch hardly
    sees it. Growth is `growth` x clip(slope / productive, -1/2, 1); until the average has settled (5 iterations) the
    law grows at full speed.
    """

    maximum: int
    growth: float = 0.12
    jitter: float = 0.25
    productive: float = 0.5
    slope: float = 0.0
    seen: int = 0
    minimum: int = 0
    exact: float | None = None
    needs: ClassVar[tuple[str, ...]] = ("rewards", "limits")

    def __post_init__(self) -> None:
        self.minimum = self.minimum or self.limit

    def draw(self, count: int, rng: random.Random) -> list[int]:
        low, high = (1 - self.jitter) * self.limit, min(self.maximum, (1 + self.jitter) * self.limit)
        return [max(1, round(rng.uniform(low, high))) for _ in range(count)]

    def update(self, signals: Signals) -> int:
        signals = self.checked(signals)
        logs = [math.log(limit) for limit in signals.limits]
        mean_log, mean_reward = sum(logs) / len(logs), sum(signals.rewards) / len(logs)
        variance = sum((x - mean_log) ** 2 for x in logs)
        slope = (
            sum((x - mean_log) * (r - mean_reward) for x, r in zip(logs, signals.rewards, strict=True)) / variance
            if variance
            else 0.0
        )
        self.seen += 1
        self.slope += (slope - self.slope) / min(self.seen, 10)
        share = 1.0 if self.seen < 5 else min(1.0, max(-0.5, self.slope / self.productive))
        self._move((self.exact or self.limit) * (1 + self.growth * share), self.minimum)
        self.reason = f"dR/dlog l {slope:+.2f} (mean {self.slope:+.2f}): {share:+.0%} of full growth"
        return self.limit


CRITIC_FREE = (
    "reward", "truncated_share", "tail_return", "useful_length", "tail_repetition", "kl_per_token", "rewards",
)  # fmt: skip


def refuse_unfed(law: Law, measured: Collection[str] = CRITIC_FREE) -> None:
    """Raise C2FError for a law that needs more than what a trainer without critic measures (names of Signals)."""
    name = type(law).__name__
    if missing := [need for need in law.needs if need not in measured]:
        raise C2FError(
            f"law {name} needs {', '.join(missing)}, which this trainer or reward does not measure (a trainer without "
            f"critic, here: {', '.join(measured)}); choose another law, such as fixed, clock or tail"
        )
    if type(law).draw is not Law.draw:
        raise C2FError(
            f"law {name} draws a limit of its own for every request, and GRPO and RLOO trainers generate all under "
            "one; choose another law, such as fixed, clock or tail"
        )


def refuse_beyond(law: Law, asked: Collection[int], largest: int) -> None:
    """Raise C2FError unless all limits asked for (tokens) lie in 1 .. `largest`, which was checked before training."""
    if wrong := [limit for limit in asked if not (isinstance(limit, Real) and 1 <= limit <= largest)]:
        raise C2FError(
            f"law {type(law).__name__} asks for {short(wrong[0])} tokens; expected 1 to {largest}, its `maximum` when "
            "training started (without one: its first limit), against which memory and positions were checked: give "
            "it a `maximum` that it never passes"
        )


def refuse_another(law: Law, name: str, began: dict[str, object] | None, where: object) -> None:
    """Raise C2FError unless `law`, in its first state, is the one of checkpoint `where`: same class, same constants.

    `began` is the state in which the checkpoint's law was made; older checkpoints have none and are taken on trust.
    """
    if name != (now := type(law).__name__):
        raise C2FError(f"checkpoint {where} was written under law {name}, now {now} is asked for; use overwrite=True")
    mine = json.loads(json.dumps(law.state_dict()))
    other = [key for key in mine.keys() | (began or mine).keys() if mine.get(key) != (began or mine).get(key)]
    if other:
        found = "; ".join(f"{key}: {began.get(key)} then, {mine.get(key)} now" for key in sorted(other))
        raise C2FError(
            f"checkpoint {where} was written under another law {name} ({found}); ask for that one, or start anew in "
            "another folder (a notebook: overwrite=True)"
        )
