"""Does an average of reward models (WARM) put off over-optimisation on the embedded domain?

    for s in 41 42 43; do c2f run 01 --profile tiny --seed $s --run-id w$s; done
    python benchmarks/overoptimisation.py w41 w42 w43 --out benchmarks/results/overoptimisation.json

Takes `tiny` runs with a finished base model. In every condition it trains the three members of an average, and then two
coarse actors for many iterations under a fixed limit at a low KL price: one against the first member alone (`single`),
one against the average (`warm`). Both are watched by a held-out reward model, trained on other pairs from another seed
under the usual labels, and by the exact checker. An arm that is in the output file is not run again.
"""

import argparse
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from c2f_utils import stats
from c2f_utils.coarse import ppo
from c2f_utils.coarse.experience import Experience
from c2f_utils.coarse.trainer import CoarseTrainer
from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, write_json
from c2f_utils.measure import answers
from c2f_utils.models import rewards
from c2f_utils.report.figures_reward import root_kl, smoothed
from c2f_utils.runs.run import Run
from c2f_utils.runs.stage import Stage, run_folder
from c2f_utils.settings.laws import make_law
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import coarse_rlhf, data, reward_model
from c2f_utils.stages.inputs import Inputs

MEMBERS = 3
ARMS = ("single", "warm")
# What is changed in the `reward` settings: fewer pairs make a model that is easier to exploit (Gao et al. 2023), and a
# label that pays for length is what such models are known to pick up.
CONDITIONS = {
    "few pairs": {"pairs": 2500},
    "few pairs, length-biased labels": {"pairs": 2500, "length_bonus": 0.02},
    "usual": {},
}
HELD_OUT_PAIRS = 4000  # the held-out reward model is trained on
OTHER_SEED = 7919  # of the held-out reward model's pairs and head
METRICS = ("held_out", "utility")


def columns(rows: Sequence[dict]) -> dict[str, list[float]]:
    """Rows of one curve as lists by name, the form kept on disk."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def features(curve: dict[str, list[float]]) -> dict[str, float]:
    """What one curve says, from its moving means: end of the training reward and KL, and by metric the peak, sqrt(KL)
    at the peak, the end, and the drop from peak to end."""
    x, training = root_kl(curve), smoothed(curve["training"])
    found = {"training_end": training[-1], "root_kl_end": x[-1], "tokens_end": smoothed(curve["tokens"])[-1]}
    for metric in METRICS:
        y = smoothed(curve[metric])
        peak = int(y.argmax())
        found |= {
            f"{metric}_peak": y[peak],
            f"{metric}_root_kl_at_peak": x[peak],
            f"{metric}_end": y[-1],
            f"{metric}_drop": y[peak] - y[-1],
        }
    found["gap_end"] = training[-1] - found["held_out_end"]
    return {name: float(value) for name, value in found.items()}


def at_root_kl(curve: dict[str, list[float]], metric: str, where: float) -> float:
    """The smoothed metric when the policy first reaches this sqrt(KL), linear between iterations."""
    return float(np.interp(where, np.maximum.accumulate(root_kl(curve)), smoothed(curve[metric])))


def compare(pairs: Sequence[tuple[dict, dict]]) -> dict[str, dict]:
    """First curve minus second, paired by seed: every feature, and the metrics at the largest sqrt(KL) both reach.

    One entry {"first", "second", "difference", "low", "high", "n"} per feature: means over seeds, and the t-interval of
    the paired differences (null bounds for a single seed).
    """
    first, second = ([features(curve) for curve in side] for side in zip(*pairs, strict=True))
    for a, b, (curve, other) in zip(first, second, pairs, strict=True):
        reach = min(root_kl(curve).max(), root_kl(other).max())
        for metric in METRICS:
            a[f"{metric}_at_equal_kl"] = at_root_kl(curve, metric, reach)
            b[f"{metric}_at_equal_kl"] = at_root_kl(other, metric, reach)
    found = {}
    for name in first[0]:
        mine, others = [row[name] for row in first], [row[name] for row in second]
        interval = stats.seed_interval(np.subtract(mine, others))
        means = {"first": float(np.mean(mine)), "second": float(np.mean(others))}
        found[name] = means | {"difference": interval.value, "low": interval.low, "high": interval.high}
        found[name] = {key: value if value is None else round(value, 4) for key, value in found[name].items()}
        found[name]["n"] = interval.n
    return found


def train(process: CoarseTrainer, held_out: rewards.RewardFunction) -> Iterator[dict]:
    """Run a trainer to its end with its own verbs, yielding one row of `measure` per iteration.

    A row is that of the policy before the iteration's update, so that the first one is the base model's.
    """
    while process.iteration < process.config.iterations:
        experience = process.credit(process.judge(process.collect()))
        row = measure(experience, held_out)
        process.advance(experience, process.improve(experience))
        yield {"iteration": process.iteration, **row}


def measure(e: Experience, held_out: rewards.RewardFunction) -> dict[str, float]:
    """Means over the answers of one iteration: training reward and held-out reward (z-scores on base answers), exact
    utility, tokens, and KL to the base in nats per answer and per token (k1 estimates)."""
    kl = ppo.kl_k1(e.logps, e.reference) * e.mask
    row = {
        "training": e.rewards.mean(),
        "held_out": held_out(e.samples).mean(),
        "utility": rewards.verifiable(e.samples).mean(),
        "tokens": e.mask.sum() / len(e.samples),
        "kl_per_answer": kl.sum() / len(e.samples),
        "kl_per_token": kl.sum() / e.mask.sum(),
    }
    return {name: round(float(value), 5) for name, value in row.items()}


class Study:
    """The reward models of one run and condition, made when first asked for."""

    def __init__(self, run_id: str, condition: str):
        seed = Stage(run_folder(run_id) / "01_base_model").config()["settings"]["seed"]
        change = {f"reward.{key}": value for key, value in CONDITIONS[condition].items()}
        self.run = Run(load_settings("tiny", seed, run_id, change | {"reward.members": MEMBERS}))
        self.run.here = self.run.stage("02_reward_model")
        self.inputs = Inputs(self.run)
        self.base = self.inputs.base()
        self.samples = self.inputs.answers(
            self.base, self.inputs.prompts("train", reward_model.NORMALISING_PROMPTS), limit=144
        )

    def normalised(self, model: torch.nn.Module) -> rewards.RewardModel:
        return rewards.RewardModel(model, self.inputs.tokenizer.pad_token_id).normalised_on(self.samples)

    def proxies(self) -> tuple[dict[str, rewards.RewardModel], list[dict]]:
        """The reward model of each arm, and accuracy and length bias of every model on held-out pairs."""
        training, held_out, _ = reward_model.pairs(self.inputs, self.base)
        members = reward_model.members(self.inputs, training)
        rows = [describe(f"member {i}", self.normalised(member), held_out) for i, member in enumerate(members, 1)]
        warm = self.normalised(rewards.average([copy.deepcopy(members[0]), *members[1:]]))
        proxies = {"single": self.normalised(members[0]), "warm": warm}
        return proxies, [*rows, describe(f"average of {MEMBERS}", warm, held_out)]

    def held_out(self) -> rewards.RewardModel:
        """A reward model from the same base that has seen none of the pairs: other problems, labels, head and order."""
        usual = load_settings("tiny", self.run.settings.seed + OTHER_SEED, self.run.settings.run_id)
        made = data.embedded_pairs(usual, self.base, self.inputs.tokenizer, HELD_OUT_PAIRS, usual.seed)
        pairs = [pair.tokens for pair in made]
        return self.normalised(rewards.train(self.inputs.base_source, pairs, self.inputs.tokenizer, usual, usual.seed))

    def arm(self, proxy: rewards.RewardModel, held_out: rewards.RewardModel, config) -> dict:
        """Curve of one coarse actor trained against `proxy`, and its metrics on the test problems at the end."""
        self.inputs.reward = proxy  # the critic starts from the model that pays
        law = make_law(self.run.settings.schedules.laws["fixed_long"])
        process = coarse_rlhf.trainer(self.inputs, law, None, config=config, evaluated=False)
        rows = []
        for row in train(process, held_out):
            rows.append(row)
            print(f"{row['iteration']}/{config.iterations}", row, end="\r")
        samples = self.inputs.answers(process.policy.actor, self.inputs.prompts("test"), limit=law.limit)
        final = answers.measure(samples, held_out)
        final |= {"held_out": final.pop("reward"), "training": round(float(proxy(samples).mean()), 6)}
        return {"curve": columns(rows), "final": final}


def describe(name: str, model: rewards.RewardModel, held_out: reward_model.HeldOut) -> dict:
    """Length-bias row of a model with its accuracy on held-out labels and on true utility."""
    scores = held_out.scores(model)
    margin, truth = scores[:, 0] - scores[:, 1], torch.tensor(held_out.utilities).diff(dim=1)[:, 0].neg()
    right = ((margin > 0) == (truth > 0))[truth != 0]
    accuracies = {
        "pair_accuracy": float((margin > 0).float().mean()),
        "true_pair_accuracy": float(right.float().mean()),
    }
    return held_out.bias(name, scores) | accuracies


def summary(content: dict) -> dict:
    """WARM minus single by condition, over the runs in which both arms are finished."""
    found = {}
    for condition in CONDITIONS:
        arms = [run[condition]["arms"] for run in content["runs"].values() if condition in run]
        pairs = [(each["warm"]["curve"], each["single"]["curve"]) for each in arms if len(each) == len(ARMS)]
        if pairs:
            found[condition] = compare(pairs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run ids, one per seed")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; arms already in it are kept")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--kl", type=float, default=0.0, help="price of one nat of KL to the base")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    arguments = parser.parse_args()
    made_with = {"iterations": arguments.iterations, "kl_coefficient": arguments.kl}
    made_with |= {"members": MEMBERS, "held_out_pairs": HELD_OUT_PAIRS, "conditions": CONDITIONS}
    content = read_json(arguments.out) if arguments.out.exists() else {**made_with, "runs": {}}
    if changed := [key for key, value in made_with.items() if content[key] != value]:
        raise C2FError(f"{arguments.out} was made with other {', '.join(changed)}; choose another --out")
    for run_id in arguments.runs:
        held_out = None  # one for all conditions of a run
        for condition in arguments.conditions:
            found = content["runs"].setdefault(run_id, {}).setdefault(condition, {"arms": {}})
            missing = [arm for arm in ARMS if arm not in found["arms"]]
            if not missing:
                continue
            study = Study(run_id, condition)
            proxies, found["reward_models"] = study.proxies()
            held_out = held_out or study.held_out()
            change = {"iterations": arguments.iterations, "kl_coefficient": arguments.kl}
            for arm in missing:
                print(f"\n{run_id}, {condition}, {arm}")
                config = study.run.settings.coarse.model_copy(update=change)
                found["arms"][arm] = study.arm(proxies[arm], held_out, config)
                content["summary"] = summary(content)
                write_json(arguments.out, content)
    write_json(arguments.out, content | {"summary": summary(content)})


if __name__ == "__main__":
    main()
