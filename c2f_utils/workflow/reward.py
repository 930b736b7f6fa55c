"""02: does the reward rank answers as intended, and how length-biased is it?"""

import torch
from scipy import stats as scipy_stats

from c2f_utils import data, rewards, tasks
from c2f_utils.models import save_model
from c2f_utils.refusals import refuse_other_tokenizer
from c2f_utils.rollout import Prompt, Sample
from c2f_utils.runs import Run
from c2f_utils.workflow.inputs import Inputs

NORMALISING_PROMPTS = 256
POINTS = 400


def make(run: Run) -> dict:
    """Results of 02: pair accuracy, calibration, length bias, reward of prefixes, and the normalisation used later."""
    here, settings = run.here, run.settings
    if here.loaded:
        return here.results()
    inputs = Inputs(run)
    base = inputs.base()
    with here.timer("pairs"):
        training, held_out, utilities, too_long = _pairs(inputs, base)
    losses: list[dict] = []
    if settings.models.reward:
        refuse_other_tokenizer(settings.models.reward, inputs.tokenizer)
        model = rewards.load_reward_model(settings.models.reward, settings, inputs.tokenizer.pad_token_id)
    else:
        with here.timer("training"):
            members = []
            for member in range(settings.reward.members):
                log = losses.append if member == 0 else (lambda row: None)
                order = settings.seed + 1000 * member  # one initial head, another order of the data
                members.append(rewards.train(inputs.base_source, training, inputs.tokenizer, settings, order, log))
            trained = rewards.average(members)
        save_model(trained, inputs.tokenizer, here.path("model"))
        model = rewards.RewardModel(trained, inputs.tokenizer.pad_token_id)
    with here.timer("evaluation"):
        samples = inputs.answers(
            base, inputs.prompts("train", NORMALISING_PROMPTS), limit=settings.coarse.evaluation_tokens
        )
        model = model.normalised_on(samples)
        results = {
            "n_pairs": len(training), "too_long": too_long, "members": settings.reward.members, "loss": losses,
            "mean": model.mean, "std": model.std, **_ranking(model, held_out, utilities), **_bias(model, samples),
        }  # fmt: skip
    here.save_results(results)
    return results


def _pairs(inputs: Inputs, base) -> tuple[list[rewards.Pair], list[rewards.Pair], list[tuple[float, float]], int]:
    """Training pairs, held-out pairs, the held-out pairs' true utilities (empty on hub data), pairs left out as too
    long."""
    settings = inputs.settings
    if not settings.embedded:
        training, held_out, too_long = data.hub_pairs(settings, inputs.tokenizer)
        return training, held_out, [], too_long
    config = settings.reward
    pairs = data.embedded_pairs(settings, base, inputs.tokenizer, config.pairs + config.held_out_pairs, settings.seed)
    held_out, training = pairs[: config.held_out_pairs], pairs[config.held_out_pairs :]
    return [p.tokens for p in training], [p.tokens for p in held_out], [p.utilities for p in held_out], 0


def _whole(ids: list[int]) -> Sample:
    """A full token sequence as a sample, so that the model scores it at its last token."""
    return Sample(Prompt(tuple(ids[:-1]), ""), ids[-1:], "limit", 1)


def _ranking(model: rewards.RewardModel, pairs: list[rewards.Pair], utilities: list[tuple[float, float]]) -> dict:
    """Accuracy on held-out labels and calibration of sigmoid(margin) in ten equal groups; on the embedded domain
    also against noise-free utility."""
    margins = model([_whole(c) for c, _ in pairs]) - model([_whole(r) for _, r in pairs])
    # Each pair once as labelled and once swapped: without the swap every label is 1 and nothing could be miscalibrated.
    both = torch.cat([margins, -margins]) * model.std
    wins = torch.cat([torch.ones_like(margins), torch.zeros_like(margins)])
    groups = [g for g in both.argsort().chunk(10) if len(g)]
    found = {
        "pair_accuracy": float((margins > 0).float().mean()),
        "held_out_pairs": len(pairs),
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
        found["true_pair_accuracy"] = float(((margins > 0) == (truth > 0))[decided].float().mean())
    return found


def _bias(model: rewards.RewardModel, samples: list[Sample]) -> dict:
    """How reward goes with length on base samples: raw, at equal utility, and along the prefixes of one answer."""
    prefixes = model.prefix_scores(samples)
    score = torch.stack([row[-1] for row in prefixes]).numpy()
    tokens = torch.tensor([float(s.tokens) for s in samples]).numpy()
    known = samples[0].prompt.problem is not None
    utility = [tasks.check(s.prompt.problem, s.ids).utility for s in samples] if known else [None] * len(samples)
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
