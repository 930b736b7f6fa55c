"""02: does the reward rank answers as intended, and how length-biased is it?"""

import shutil
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats as scipy_stats

from c2f_utils.domain.problems import check
from c2f_utils.domain.samples import Prompt, Sample, make_prompts
from c2f_utils.measure import answers, length_bias
from c2f_utils.models import rewards
from c2f_utils.models.loading import refuse_other_tokenizer, save_model
from c2f_utils.notebook.progress import Progress
from c2f_utils.runs.run import Run
from c2f_utils.runs.work import NORMALISING_PROMPTS
from c2f_utils.stages import data
from c2f_utils.stages.inputs import CHECKPOINTS, Inputs, stopped_here

POINTS = 400


@dataclass(frozen=True)
class HeldOut:
    """Pairs that no reward model was trained on, the lengths of their prompts, and their true utilities (none on hub
    data)."""

    pairs: list[rewards.Pair]
    prompt_tokens: list[int]
    utilities: list[tuple[float, float]]

    def scores(self, model: rewards.RewardModel) -> torch.Tensor:
        """Normalised rewards of all answers, [pairs, 2], the labelled winner first."""
        return torch.stack([model([_whole(pair[side]) for pair in self.pairs]) for side in (0, 1)], dim=1)

    def bias(self, name: str, scores: torch.Tensor) -> dict:
        """The row of the length-bias report for the model that gave these scores."""
        utilities = np.array(self.utilities) if self.utilities else None
        tokens = length_bias.tokens_of(self.pairs, self.prompt_tokens)
        return length_bias.report(name, length_bias.ScoredPairs(scores.double().numpy(), tokens, utilities))


def make(run: Run) -> dict:
    """Results of 02: pair accuracy, calibration, length bias, reward of prefixes, and the normalisation used later."""
    here, settings = run.here, run.settings
    if here.loaded:
        return here.results()
    inputs = Inputs(run)
    base = inputs.base()
    with here.timer("pairs"):
        training, held_out, too_long = pairs(inputs, base)
    with here.timer("evaluation"):
        samples = inputs.answers(
            base, inputs.prompts("train", NORMALISING_PROMPTS), limit=settings.coarse.evaluation_tokens
        )
    losses: list[dict] = []
    biases: list[dict] = []  # the length bias of every model: the members before they are averaged, then the one used
    name = "loaded"
    if settings.models.reward:
        refuse_other_tokenizer(inputs.reward_source, inputs.tokenizer)
        model = rewards.load_reward_model(inputs.reward_source, settings, inputs.tokenizer.pad_token_id)
    else:
        with here.timer("training"), stopped_here(here):
            trained = members(inputs, training, losses.append)
        name = "single"
        if len(trained) > 1:
            name = f"average of {len(trained)}"
            with here.timer("evaluation"):
                for number, member in enumerate(trained, start=1):
                    scorer = rewards.RewardModel(member, inputs.tokenizer.pad_token_id).normalised_on(samples)
                    biases.append(held_out.bias(f"member {number}", held_out.scores(scorer)))
        averaged = rewards.average(trained)
        save_model(averaged, inputs.tokenizer, here.path("model"))
        model = rewards.RewardModel(averaged, inputs.tokenizer.pad_token_id)
    with here.timer("evaluation"):
        model = model.normalised_on(samples)
        scores = held_out.scores(model)
        biases.append(held_out.bias(name, scores))
        results = {
            "n_pairs": len(training), "too_long": too_long, "members": settings.reward.members, "loss": losses,
            "mean": model.mean, "std": model.std, **_ranking(model, scores, held_out.utilities),
            **_bias(model, samples), "length_bias_models": biases,
        }  # fmt: skip
    here.save_results(results)
    shutil.rmtree(here.dir / CHECKPOINTS, ignore_errors=True)
    return results


def one_pair(run: Run) -> tuple[dict[str, dict], list[dict]]:
    """A pair that no reward model was trained on: both answers as samples, and the reward after each of their tokens.

    To look at, after `make`. On the embedded domain that of a few new ones whose answers differ most in true utility,
    elsewhere the first held-out one.
    """
    inputs, settings = Inputs(run), run.settings
    if settings.embedded:
        new = data.embedded_pairs(settings, inputs.base(), inputs.tokenizer, 8, settings.seed + 1_000_000)
        pair = max(new, key=lambda pair: pair.utilities[0] - pair.utilities[1])
        prompt, both = make_prompts([pair.problem])[0], (pair.first, pair.second)
    else:
        few = settings.reward.model_copy(update={"pairs": 1, "held_out_pairs": 1})
        pair = data.hub_pairs(settings.model_copy(update={"reward": few}), inputs.tokenizer)[1][0]
        n = pair.prompt_tokens
        prompt = Prompt(tuple(pair.tokens[0][:n]), pair.prompt)
        both = tuple(tokens[n:] for tokens in pair.tokens)
    samples = [
        Sample(prompt, ids, "eos" if ids[-1] == inputs.tokenizer.eos_token_id else "limit", len(ids)) for ids in both
    ]
    found, place = run.here.results(), inputs.reward_source if settings.models.reward else run.here.dir / "model"
    model = rewards.load_reward_model(place, settings, inputs.tokenizer.pad_token_id, found["mean"], found["std"])
    shown, rows = {}, []
    for name, sample, scores in zip(("chosen", "rejected"), samples, model.prefix_scores(samples), strict=True):
        sample.text = inputs.tokenizer.decode(sample.ids, skip_special_tokens=True)
        shown[name] = answers.rows([sample], name, "", None)[0] | {"reward": float(scores[-1])}
        rows += [{"answer": name, "position": at, "reward": float(s)} for at, s in enumerate(scores, start=1)]
    return shown, rows


def members(inputs: Inputs, training: list[rewards.Pair], log=lambda row: None) -> list[torch.nn.Module]:
    """The `reward.members` models of one run; `log` receives the losses of the first.

    All start from the same trunk and the same head, without which their weights could not be averaged (WARM, Rame et
    al. 2024), and differ in the order of the data [- learning rates of their own, which WARM also varies: one setting
    fits all]. The first is the model that a run with a single member trains.
    """
    settings, here, found = inputs.settings, inputs.run.here, []
    for member in range(settings.reward.members):
        number = f" {member + 1} of {settings.reward.members}" if settings.reward.members > 1 else ""
        found.append(
            rewards.train(
                inputs.base_source,
                training,
                inputs.tokenizer,
                settings,
                order=settings.seed + 1000 * member,
                log=log if member == 0 else (lambda row: None),
                folder=here.path(CHECKPOINTS, f"member-{member + 1}"),
                stop=here.stop_requested,
                progress=Progress(f"reward model{number}"),
            )  # fmt: skip
        )
    return found


def pairs(inputs: Inputs, base) -> tuple[list[rewards.Pair], HeldOut, int]:
    """Training pairs, held-out pairs, and how many were left out as too long."""
    settings = inputs.settings
    if not settings.embedded:
        training, held_out, too_long = data.hub_pairs(settings, inputs.tokenizer)
        lengths = [p.prompt_tokens for p in held_out]
        return [p.tokens for p in training], HeldOut([p.tokens for p in held_out], lengths, []), too_long
    config = settings.reward
    count, progress = config.pairs + config.held_out_pairs, Progress("the base's answers for pairs", "answer")
    made = data.embedded_pairs(settings, base, inputs.tokenizer, count, settings.seed, progress)
    held_out, training = made[: config.held_out_pairs], made[config.held_out_pairs :]
    lengths = [len(p.problem.prompt_ids) for p in held_out]
    tokens, utilities = [p.tokens for p in held_out], [p.utilities for p in held_out]
    return [p.tokens for p in training], HeldOut(tokens, lengths, utilities), 0


def _whole(ids: list[int]) -> Sample:
    """A full token sequence as a sample, so that the model scores it at its last token."""
    return Sample(Prompt(tuple(ids[:-1]), ""), ids[-1:], "limit", 1)


def _ranking(model: rewards.RewardModel, scores: torch.Tensor, utilities: list[tuple[float, float]]) -> dict:
    """Accuracy on held-out labels and calibration of sigmoid(margin) in ten equal groups; on the embedded domain
    also against noise-free utility."""
    margins = scores[:, 0] - scores[:, 1]
    # Each pair once as labelled and once swapped: without the swap every label is 1 and nothing could be miscalibrated.
    both = torch.cat([margins, -margins]) * model.std
    wins = torch.cat([torch.ones_like(margins), torch.zeros_like(margins)])
    groups = [g for g in both.argsort().chunk(10) if len(g)]
    found = {
        "pair_accuracy": float((margins > 0).float().mean()),
        "held_out_pairs": len(margins),
        "calibration": [
            {
                "margin_low": float(both[g].min()), "margin_high": float(both[g].max()), "n": len(g),
                "predicted": float(both[g].sigmoid().mean()), "observed": float(wins[g].mean()),
            }
            for g in groups
        ],
    }  # fmt: skip
    if utilities:
        truth = torch.tensor([first - second for first, second in utilities])
        decided = truth != 0
        right = ((margins > 0) == (truth > 0))[decided].float()
        found["true_pair_accuracy"] = float(right.mean()) if len(right) else None
    return found


def _bias(model: rewards.RewardModel, samples: list[Sample]) -> dict:
    """How reward goes with length on base samples: raw, at equal utility, and along the prefixes of one answer."""
    prefixes = model.prefix_scores(samples)
    score = torch.stack([row[-1] for row in prefixes]).numpy()
    tokens = torch.tensor([float(s.tokens) for s in samples]).numpy()
    known = samples[0].prompt.problem is not None
    utility = [check(s.prompt.problem, s.ids).utility for s in samples] if known else [None] * len(samples)
    flat = len(set(tokens.tolist())) < 2  # every answer cut at the same limit: no correlation is defined
    bias = {
        "pearson": None if flat else float(scipy_stats.pearsonr(tokens, score)[0]),
        "spearman": None if flat else float(scipy_stats.spearmanr(tokens, score)[0]),
        "slope_per_100_tokens": None if flat else float(scipy_stats.linregress(tokens, score).slope * 100),
        "partial_given_utility": None
        if flat or not known or len(set(utility)) < 2
        else _partial(tokens, score, utility),
    }
    points = [
        {"tokens": int(t), "reward": round(float(s), 4), "utility": u}
        for t, s, u in zip(tokens, score, utility, strict=True)
    ][:POINTS]
    longest = max(len(row) for row in prefixes)
    curve = []
    for length in range(8, longest + 1, 8):
        values = torch.stack([row[min(length, len(row)) - 1] for row in prefixes])
        curve.append(
            {
                "tokens": length,
                "reward_mean": float(values.mean()),
                "reward_se": float(values.std() / len(values) ** 0.5),
            }
        )
    found = {"length_bias": bias, "points": points, "prefix_reward": curve}
    if known and len(set(utility)) > 1:
        found["utility_correlation"] = float(scipy_stats.pearsonr(utility, score)[0])
    return found


def _partial(tokens, score, utility) -> float:
    """Correlation of length and reward after utility has been regressed out of both."""

    def residual(y):
        fit = scipy_stats.linregress(utility, y)
        return y - (fit.intercept + fit.slope * torch.tensor(utility).numpy())

    return float(scipy_stats.pearsonr(residual(tokens), residual(score))[0])
