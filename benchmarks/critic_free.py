"""What does the critic add? GRPO and RLOO (TRL) under our laws, beside our PPO on the same runs.

    python benchmarks/critic_free.py dev --tune --out benchmarks/results/critic_free.json
    python benchmarks/critic_free.py s1 s2 --out benchmarks/results/critic_free.json

Takes finished `tiny` runs: their base, reward model, prompts and evaluation, and their PPO results from 04. `--tune`
tries three learning rates for each trainer and reward, on runs that may not be measured; the best of a trainer is used.
Arms: {GRPO, RLOO, our PPO} x {reward model, exact reward} x {fixed 144, linear clock 24 to 144, tail law}, and our PPO
under its logistic law. PPO keeps the settings of the profile: its rates were chosen before, not here. Its critic starts
as the reward model, which knows more than the others are given; so there is a second PPO whose critic starts as the
base model with a head of zeros and learns alone for one iteration. The file has the form of the results of 04, so its
figures and tables draw it.
"""

import argparse
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter

from c2f_utils import stats
from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, write_json
from c2f_utils.models import rewards
from c2f_utils.runs.run import Run
from c2f_utils.runs.stage import Stage, run_folder
from c2f_utils.settings.laws import Law, make_law
from c2f_utils.settings.load import load_settings
from c2f_utils.settings.rlhf import CriticFree
from c2f_utils.stages import coarse_rlhf
from c2f_utils.stages.baselines import Baseline
from c2f_utils.stages.inputs import Inputs
from c2f_utils.stages.length_schedules import baseline_label, label

PPO = ("logistic", "fixed_long", "clock_linear")  # of 04, all with the reward model
TRAINERS, REWARDS = ("grpo", "rloo"), ("model", "verifiable")
UNTAUGHT = "untaught"  # the PPO whose critic has learnt nothing from the reward model
LAWS = {
    "fixed": Law(name="fixed", limit=144),
    "clock": Law(name="clock", shape="linear", start=24, maximum=144, duration=17),
    "tail": Law(name="tail", start=24, maximum=144, growth=0.12),
}
RATES = (1e-4, 3e-4, 1e-3)
CURVE = ("iteration", "rollout_tokens", "limit", "utility", "accuracy_last", "accuracy_first", "reward", "mean_tokens")


def opened(run_id: str) -> tuple[Stage, Inputs]:
    """Stage 04 of a finished run and what it worked on."""
    stage = Stage(run_folder(run_id) / "04_length_schedules")
    run = Run(load_settings("tiny", stage.config()["settings"]["seed"], run_id))
    run.here = run.stage("04_length_schedules")
    return stage, Inputs(run)


def trained(inputs: Inputs, entry: CriticFree, name: str) -> dict:
    """One arm on one run: tokens, limits, validation curve, test metrics at T = 1, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        began = perf_counter()
        process = Baseline(inputs, entry, Path(folder))
        process.train(lambda row: print(f"{name} {row['iteration']} limit {row['limit']}    ", end="\r"))
        seconds = round(perf_counter() - began, 1)
    return finished(inputs, process, process.actor, name, seconds)


def with_critic(inputs: Inputs, law: Law, reward: str, name: str, taught: bool = True) -> dict:
    """Our PPO on one run, with settings as in 03, under any law and reward."""
    untaught = {"critic_head": "zero", "critic_warmup": 1}
    config = inputs.settings.coarse.model_copy(update={} if taught else untaught)
    with tempfile.TemporaryDirectory() as folder:
        began = perf_counter()
        process = coarse_rlhf.trainer(
            inputs,
            make_law(law),
            Path(folder),
            reward=rewards.Verifiable() if reward != "model" else None,
            config=config,
        )
        for row in process:
            print(f"{name} {row['iteration']} limit {row['limit']}    ", end="\r")
        seconds = round(perf_counter() - began, 1)
    return finished(inputs, process, process.policy.actor, name, seconds)


def finished(inputs: Inputs, process, actor, name: str, seconds: float) -> dict:
    samples = inputs.answers(actor, inputs.prompts("test"))
    found = kept(coarse_rlhf.summary(process, samples, inputs)) | {"seconds": seconds}
    print(f"{name}: utility {found['final']['utility']:.2f}, {found['rollout_tokens']} tokens, {found['seconds']} s")
    return found


def kept(result: dict) -> dict:
    """A result of 04 without what its figures and tables do not read."""
    shown = {key: result[key] for key in ("rollout_tokens", "limits", "final")}
    return shown | {"curve": [{key: point[key] for key in CURVE} for point in result["curve"]]}


def tune(run_id: str, content: dict) -> Iterator[None]:
    """Add the last validation utility of every learning rate to `content["tuning"]`, and the best per
    trainer (mean over both rewards)."""
    stage, inputs = opened(run_id)
    seed = stage.config()["settings"]["seed"]
    for trainer in TRAINERS:
        for reward in REWARDS:
            for rate in RATES:
                key = {"seed": seed, "trainer": trainer, "reward": reward, "learning_rate": rate}
                if any(key.items() <= row.items() for row in content["tuning"]):
                    continue
                entry = CriticFree(trainer=trainer, law=LAWS["clock"], reward=reward, learning_rate=rate)
                found = trained(inputs, entry, f"{run_id} {trainer} {reward} {rate:g}")
                content["tuning"].append(key | {"validation_utility": found["curve"][-1]["utility"]})
                yield
        rows = [row for row in content["tuning"] if row["trainer"] == trainer]
        score = {rate: mean(r["validation_utility"] for r in rows if r["learning_rate"] == rate) for rate in RATES}
        content["learning_rates"][trainer] = max(score, key=score.get)
        yield


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def measure(run_id: str, content: dict) -> Iterator[None]:
    """Add every arm of one run to `content["laws"]`, beside the run's own PPO."""
    stage, inputs = opened(run_id)
    seed = str(stage.config()["settings"]["seed"])
    if int(seed) in {row["seed"] for row in content["tuning"]}:
        raise C2FError(f"run {run_id!r} has seed {seed}, on which the learning rates were tuned; measure on others")
    for name in PPO:
        law = stage.results()["laws"][name]
        entry = {"label": f"PPO, {law['label']}", "trainer": "ppo", "reward": "model", "law": law["law"], "seeds": {}}
        content["laws"].setdefault(name, entry)["seeds"][seed] = kept(law["seeds"][seed])
    for reward, short in (("model", "tail"), *(("verifiable", short) for short in LAWS)):  # what 04 does not have
        name, law = f"ppo_{reward}_{short}", LAWS[short]
        checked = ", exact reward" if reward == "verifiable" else ""
        entry = {"label": f"PPO{checked}, {label(law, {})}", "trainer": "ppo", "reward": reward}
        entry |= {"law": law.model_dump(exclude_none=True), "seeds": {}}
        seeds = content["laws"].setdefault(name, entry)["seeds"]
        if seed not in seeds:
            seeds[seed] = with_critic(inputs, law, reward, f"{run_id} {name}")
            yield
    for short, law in LAWS.items():
        name = f"{UNTAUGHT}_model_{short}"
        entry = {"label": f"PPO, critic from zero, {label(law, {})}", "trainer": "ppo", "reward": "model"}
        entry |= {"law": law.model_dump(exclude_none=True), "seeds": {}}
        seeds = content["laws"].setdefault(name, entry)["seeds"]
        if seed not in seeds:
            seeds[seed] = with_critic(inputs, law, "model", f"{run_id} {name}", taught=False)
            yield
    for trainer in TRAINERS:
        for reward in REWARDS:
            for short, law in LAWS.items():
                name, rate = f"{trainer}_{reward}_{short}", content["learning_rates"][trainer]
                entry = CriticFree(trainer=trainer, law=law, reward=reward, learning_rate=rate)
                shown = {"label": baseline_label(entry), **entry.model_dump(exclude_none=True), "seeds": {}}
                seeds = content["laws"].setdefault(name, shown)["seeds"]
                if seed not in seeds:
                    seeds[seed] = trained(inputs, entry, f"{run_id} {name}")
                    yield


def compared(laws: dict) -> dict:
    """Per arm, over the seeds: test utility minus that of our PPO under the same law and reward, and its share of its
    rollout tokens."""
    found = {}
    for name, law in laws.items():
        trainer, _, rest = name.partition("_")
        if trainer not in (*TRAINERS, UNTAUGHT):
            continue
        other = {"model_fixed": "fixed_long", "model_clock": "clock_linear"}.get(rest, f"ppo_{rest}")
        pairs = [(mine, laws[other]["seeds"][seed]) for seed, mine in law["seeds"].items()]
        gap = stats.seed_interval([a["final"]["utility"] - b["final"]["utility"] for a, b in pairs])
        found[name] = {
            "ppo": other,
            "utility_minus_ppo": {"mean": gap.value, "low": gap.low, "high": gap.high, "n": gap.n},
            "tokens_over_ppo": mean(a["rollout_tokens"] / b["rollout_tokens"] for a, b in pairs),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run ids, one per seed")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; what is already in it is kept")
    parser.add_argument("--tune", action="store_true", help="choose the learning rates on these runs")
    options = parser.parse_args()
    content = read_json(options.out) if options.out.exists() else {"tuning": [], "learning_rates": {}, "laws": {}}
    if not options.tune and set(content["learning_rates"]) != set(TRAINERS):
        raise C2FError(f"{options.out} has no learning rates yet; run with --tune on a development run first")
    for run_id in options.runs:
        for _ in (tune if options.tune else measure)(run_id, content):
            write_json(options.out, content)
    if content["laws"]:
        places = {trainer: place for place, trainer in enumerate(("ppo", *TRAINERS))}
        rows = sorted(content["laws"].items(), key=lambda item: (item[1]["reward"], places[item[1]["trainer"]]))
        content["laws"] = dict(rows)  # as figures and tables show them
        content["comparison"] = compared(content["laws"])
        content["load"] = round(os.getloadavg()[1], 2)
    write_json(options.out, content)


if __name__ == "__main__":
    main()
