"""One run of the study of laws (`report/law_study.py`): a condition, a law, a budget of tokens, a curve of utility."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from time import process_time
from types import MappingProxyType

import torch
from torch import Tensor, nn

from c2f_utils import limits
from c2f_utils.domain import stories
from c2f_utils.domain.problems import check, response
from c2f_utils.domain.samples import Sample, make_prompts
from c2f_utils.measure import answers
from c2f_utils.models import pretrain, rewards
from c2f_utils.models.rewards import RewardModel
from c2f_utils.report.law_study import BUDGET, EVALUATED, EVALUATION_LIMIT, MARKS, UTILITY_PRICE, WITNESSES, Condition
from c2f_utils.settings.laws import Law, make_law
from c2f_utils.stages import coarse_rlhf, data
from c2f_utils.stages.inputs import Inputs

CHECK_WORTH = 0.4  # what `Verdict.utility` gives for a check section


@dataclass
class Paid:
    """A reward model with a bonus per answer token; asked for prefixes it pays the bonus for each prefix' length."""

    model: RewardModel
    bonus: float
    quality: float = 1.0

    def prefix_scores(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Per sample the reward after each answer token, [len(ids)]."""
        scores = self.model.prefix_scores(samples)
        return [self.quality * row + self.bonus * torch.arange(1, len(row) + 1) for row in scores]

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        return torch.stack([row[-1] for row in self.prefix_scores(samples)])


@dataclass
class FirstAnswer:
    """The checker's utility of an answer up to the first result that it states; nothing said later counts.

    Rewards are (utility - mean) / std, asked at every full stop and held in between.
    """

    mean: float = 0.0
    std: float = 1.0

    def prefix_scores(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Per sample the reward after each answer token, [len(ids)]."""
        found = []
        for sample in samples:
            problem, ids, row = sample.prompt.problem, sample.ids, torch.empty(sample.tokens)
            value, since, stop = check(problem, ()).utility, 0, problem.vocabulary.ids["."]
            for place, token in enumerate(ids):
                if token != stop:
                    continue
                row[since:place] = value
                verdict, since = check(problem, ids[: place + 1]), place
                value = verdict.utility - CHECK_WORTH * bool(verdict.checks)  # checking again is not the task here
                if verdict.first_answer is not None:
                    break
            row[since:] = value
            found.append((row - self.mean) / self.std)
        return found

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        return torch.stack([row[-1] for row in self.prefix_scores(samples)])

    def normalised_on(self, samples: Sequence[Sample]) -> "FirstAnswer":
        """The same reward with mean 0 and deviation 1 on these samples."""
        raw = FirstAnswer()(samples)
        return FirstAnswer(float(raw.mean()), float(raw.std()))


@dataclass
class Noisy:
    """A reward whose prefixes carry noise of deviation `noise`, all but the whole answer, by which it is paid."""

    reward: FirstAnswer
    noise: float
    draws: torch.Generator

    def prefix_scores(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Per sample the reward after each answer token, [len(ids)]."""
        found = []
        for row in self.reward.prefix_scores(samples):
            noise = self.noise * torch.randn(len(row), generator=self.draws)
            noise[-1] = 0.0
            found.append(row + noise)
        return found

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        return self.reward(samples)


@dataclass
class Deaf(limits.Useful):
    """`useful` that does not hear one of its witnesses."""

    to: str = ""

    def update(self, signals: limits.Signals) -> int:
        return super().update(replace(signals, **WITNESSES[self.to](self.limit)))


def deaf(law: Law, to: str) -> Deaf:
    """The law of these settings without the witness `to`."""
    whole = make_law(law)
    return Deaf(**{field.name: getattr(whole, field.name) for field in fields(whole) if field.init}, to=to)


@cache
def learned_first_answer(inputs: Inputs) -> RewardModel:
    """A reward model of the run's base, trained as 02 trains it on as many pairs, ranked by `FirstAnswer` under the
    same label noise; not yet normalised."""
    settings = inputs.settings
    rng, noise = random.Random(f"first-answer-{settings.seed}"), settings.reward.label_noise
    ranked = []
    for pair in data.embedded_pairs(settings, inputs.base(), inputs.tokenizer, settings.reward.pairs, settings.seed):
        prompt = make_prompts([pair.problem])[0]
        both = [Sample(prompt, ids, "limit", len(ids)) for ids in (pair.first, pair.second)]
        first, second = (float(worth) + rng.gauss(0.0, noise) for worth in FirstAnswer()(both))
        ranked.append(pair.tokens if first >= second else pair.tokens[::-1])
    model = rewards.train(inputs.base_source, ranked, inputs.tokenizer, settings, order=settings.seed)
    return RewardModel(model, inputs.tokenizer.pad_token_id)


def base_that_ends(inputs: Inputs, condition: Condition, tokens: int = 200_000) -> nn.Module:
    """The run's base after `tokens` more tokens of pretraining, at a quarter of its learning rates, on answers of the
    same mixed quality that all stop at their result, or that all work every step and then stop."""
    settings = inputs.settings
    rates = ("learning_rate_matrices", "learning_rate_other")
    slower = {name: 0.25 * getattr(settings.pretrain, name) for name in rates}
    config = settings.pretrain.model_copy(update={"tokens": tokens, **slower})
    if condition.complete:
        documents = _complete(tokens, settings.seed, condition.operations)
    else:
        documents = stories.documents(tokens, settings.seed, settings.data.operations, ends=True)
    return pretrain.train(inputs.base(), documents, config, settings.seed)


def _complete(tokens: int, seed: int, operations: tuple[int, int]) -> Iterator[list[int]]:
    rng = random.Random(f"complete-{seed}")
    while tokens > 0:
        problem = stories.draw_problem(rng, operations)
        if problem.split == "train":
            answer = response(problem, rng, kind="full", ends=True)
            document = [*problem.prompt_ids, *problem.vocabulary.encode(answer)]
            tokens -= len(document)
            yield document


def run_one(
    inputs: Inputs,
    condition: Condition,
    law: limits.Law,
    budget: int = BUDGET,
    *,
    start: dict | None = None,
    every: int = 0,
    until: float = math.inf,
    changes: Mapping[str, object] = MappingProxyType({}),
    observe=None,
) -> dict:
    """Train under one law until `budget` rollout tokens are spent; keep the curve of utility on validation problems.

    Evaluations are made after the iteration that passes a mark, or after every `every` iterations, at a fixed limit
    and T = 1, and cost no budget; two of them in a row at `until` or above end the run. `start` is the first point of
    another law's curve in the same condition and seed, which need not be measured again. `changes` are made in
    `coarse`. `observe(trainer, experience, row)` sees every iteration. Seconds are processor seconds of the five verbs
    alone.
    """
    settings = inputs.settings
    seed = settings.seed
    limit = min(EVALUATION_LIMIT, condition.maximum)
    problems = make_prompts(stories.problems("validation", EVALUATED, seed, condition.operations))
    reward = inputs.reward
    if condition.length_bonus or condition.quality != 1.0:
        reward = Paid(inputs.reward, condition.length_bonus, condition.quality)
    if condition.known:
        judge = learned_first_answer(inputs) if condition.learned else FirstAnswer()
        reward = judge.normalised_on(inputs.answers(inputs.base(), problems, limit=limit))
    if condition.noise:
        reward = Noisy(reward, condition.noise, torch.Generator().manual_seed(seed))
    fixed = {"token_price": condition.token_price, "iterations": 10**6}
    config = settings.coarse.model_copy(update=fixed | dict(changes))
    prompts = make_prompts(stories.problems("train", settings.data.train_prompts, seed, condition.operations))
    base = base_that_ends(inputs, condition) if condition.terminates else None
    trainer = coarse_rlhf.trainer(
        inputs, law, None, start=base, reward=reward, config=config, prompts=prompts, evaluated=False
    )

    def measured() -> dict:
        found = answers.measure(inputs.answers(trainer.policy.actor, problems, limit=limit))
        price = UTILITY_PRICE if condition.token_price else 0.0
        return {
            "tokens": trainer.rollout_tokens,
            "seconds": round(seconds, 2),
            "utility": round(found["utility"] - price * found["mean_tokens"], 4),
            **{key: round(found[key], 3) for key in ("accuracy_first", "eos_rate", "rep4", "mean_tokens")},
        }

    seconds, marks = 0.0, [mark for mark in MARKS if mark < budget] + [budget]
    points, path = [start or measured()], []
    while trainer.rollout_tokens < budget and (len(points) < 2 or min(p["utility"] for p in points[-2:]) < until):
        began = process_time()
        experience = trainer.credit(trainer.judge(trainer.collect()))
        row = trainer.advance(experience, trainer.improve(experience))
        seconds += process_time() - began
        path.append(row["limit"])
        if observe is not None:
            observe(trainer, experience, row)
        last = trainer.rollout_tokens >= budget
        if last or (len(path) % every == 0 if every else trainer.rollout_tokens >= marks[0]):
            marks = [mark for mark in marks if mark > trainer.rollout_tokens]
            points.append(measured())
    curve = {key: [point[key] for point in points] for key in points[0]}
    return {"curve": curve, "limits": [*path, law.limit], "reason": law.reason}
