"""How long is one iteration of coarse RLHF, and where does the time go, beside TRL 1.10's PPO on the same work in the
same run?

    python benchmarks/coarse_speed.py --trl PYTHON      # PYTHON: interpreter of an environment with trl==1.10.*
    python benchmarks/coarse_speed.py --iterations 2 --threads 1                # a small try, ours alone

The work: the embedded domain's actor (about 97,000 parameters) with a separate critic of the same shape and a reward
model, all at random weights; 64 prompts, answers of exactly 144 tokens (end-of-sequence is off on both sides), 2
epochs, 2 minibatches, float32. Both sides run in fresh processes that take turns, so that a passing load meets both;
the median of the iterations after the first is reported, seconds of wall time. TRL 1.10 is the last release with a
PPO trainer. Run it on an idle machine: with other work around, two threads may be slower than one. Writes
benchmarks/results/coarse_speed.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
BATCH, LENGTH, EPOCHS, MINIBATCHES = 64, 144, 2, 2
SHORTER = (24, 48, 96)  # limits at which our iterations are timed as well: what a growing limit costs on the way
VERBS = ("collect", "judge", "credit", "improve", "advance")


def parts():
    """(actor, reward model, tokenizer, prompts as ids) at random weights, equal on both sides."""
    import torch
    from transformers import AutoModelForSequenceClassification, MistralConfig

    from c2f_utils.domain import stories
    from c2f_utils.models.pretrain import new_model
    from c2f_utils.settings.config import Pretrain

    actor = new_model(Pretrain(), 0).eval()
    torch.manual_seed(0)
    scored = AutoModelForSequenceClassification.from_config(
        MistralConfig(**actor.config.to_diff_dict() | {"num_labels": 1})
    )
    return actor, scored.eval(), stories.make_tokenizer(), stories.problems("train", 1000, 0)


def ours(iterations: int, threads: int, budget: int, length: int = LENGTH) -> dict:
    """Seconds of each iteration and of each verb with answers of `length` tokens."""
    import torch

    from c2f_utils import limits
    from c2f_utils.coarse import actor_critic
    from c2f_utils.coarse.trainer import CoarseTrainer
    from c2f_utils.domain import samples
    from c2f_utils.models import rewards
    from c2f_utils.rollout.decoder import KVDecoder
    from c2f_utils.settings.config import Coarse
    from c2f_utils.settings.laws import Law

    torch.set_num_threads(threads)
    actor, scored, tokenizer, problems = parts()
    policy = actor_critic.ActorCritic(actor, actor_critic.Critic.from_reward(scored, 0.0, 1.0))
    decoder = KVDecoder(actor, tokenizer)
    decoder.eos = frozenset({-1})  # no answer ends early
    config = Coarse(
        law=Law(name="fixed", limit=length), prompts=BATCH, epochs=EPOCHS, minibatches=MINIBATCHES,
        iterations=iterations, tokens_per_micro_batch=budget,
    )  # fmt: skip
    trainer = CoarseTrainer(
        policy,
        rewards.RewardModel(scored, 0),
        decoder,
        samples.make_prompts(problems),
        limits.Fixed(length),
        config,
        seed=0,
        pad_id=0,
    )
    rows = []
    for _ in range(iterations):
        times, e, stats = [perf_counter()], None, None
        for verb in VERBS:
            call = getattr(trainer, verb)
            if verb == "collect":
                e = call()
            elif verb == "improve":
                stats = call(e)
            elif verb == "advance":
                call(e, stats)
            else:
                e = call(e)
            times.append(perf_counter())
        assert all(s.tokens == length for s in e.samples)
        rows.append([b - a for a, b in zip(times, times[1:], strict=False)])
    return {"seconds": [sum(row) for row in rows], "verbs": {v: [row[i] for row in rows] for i, v in enumerate(VERBS)}}


def trl(iterations: int, threads: int) -> dict:
    """Seconds of each iteration of TRL 1.10's PPO trainer."""
    import copy
    import tempfile
    import warnings

    import torch
    from datasets import Dataset

    warnings.simplefilter("ignore")
    import trl as library
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(threads)
    actor, scored, tokenizer, problems = parts()
    tokenizer.padding_side = "left"
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *arguments, **named):
            marks.append(perf_counter())

        def on_step_end(self, *arguments, **named):
            marks.append(perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder, total_episodes=BATCH * iterations, per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1, num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS, response_length=LENGTH,
            local_rollout_forward_batch_size=BATCH, stop_token=None, temperature=1.0, num_sample_generations=0,
            report_to=[], save_strategy="no", eval_strategy="no", logging_steps=10**9, use_cpu=True, disable_tqdm=True,
            bf16=False, learning_rate=5e-4, kl_coef=0.05, vf_coef=1.0, gradient_checkpointing=False,
        )  # fmt: skip
        dataset = Dataset.from_dict({"input_ids": [p.prompt_ids for p in problems]})
        trainer = PPOTrainer(
            args=arguments, processing_class=tokenizer, model=actor, ref_model=copy.deepcopy(actor),
            reward_model=scored, value_model=copy.deepcopy(scored), train_dataset=dataset,
            eval_dataset=dataset.select(range(2)), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return {"seconds": [b - a for a, b in zip(marks, marks[1:], strict=False)], "version": library.__version__}


def fresh(python: str, side: str, options: argparse.Namespace, threads: int, length: int = LENGTH) -> dict:
    """Run one side in a process of its own."""
    command = [python, __file__, "--side", side, "--threads", str(threads), "--iterations", str(options.iterations)]
    command += ["--length", str(length)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run([*command, "--budget", str(options.budget)], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(found: list[dict]) -> dict:
    """Medians over the iterations after the first of all rounds."""
    seconds = [s for each in found for s in each["seconds"][1:]]
    result = {"median": statistics.median(seconds), "fastest": min(seconds), "iterations": len(seconds)}
    if "verbs" in found[0]:
        verbs = {v: statistics.median([s for each in found for s in each["verbs"][v][1:]]) for v in VERBS}
        result["verbs"] = {v: round(s, 4) for v, s in verbs.items()}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of an environment with trl==1.10.*")
    parser.add_argument("--iterations", type=int, default=8, help="per process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3, help="processes per side and thread count, taking turns")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--budget", type=int, default=16_384, help="our tokens per micro-batch")
    parser.add_argument("--side", choices=("ours", "trl"), help="run one side in this process")
    parser.add_argument("--length", type=int, default=LENGTH, help="answer tokens of --side ours")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "coarse_speed.json")
    options = parser.parse_args()
    if options.side:
        side = {"ours": lambda n, t: ours(n, t, options.budget, options.length), "trl": trl}[options.side]
        print(json.dumps(side(options.iterations, options.threads[0])))
        return
    from c2f_utils import files
    from c2f_utils.runs import provenance

    rows = []
    for threads in options.threads:
        found: dict[str, list[dict]] = {"ours": [], "trl": []}
        for _ in range(options.rounds):
            found["ours"].append(fresh(sys.executable, "ours", options, threads))
            if options.trl:
                found["trl"].append(fresh(options.trl, "trl", options, threads))
        row = {"threads": threads} | {side: summary(each) for side, each in found.items() if each}
        row["ours"]["rollout_tokens_per_second"] = round(BATCH * LENGTH / row["ours"]["median"])
        if options.trl:
            row["trl"]["version"] = found["trl"][0]["version"]
            row["times_faster"] = round(row["trl"]["median"] / row["ours"]["median"], 2)
        shorter = {str(k): summary([fresh(sys.executable, "ours", options, threads, k)])["median"] for k in SHORTER}
        row["ours_by_limit"] = shorter | {str(LENGTH): row["ours"]["median"]}
        rows.append(row)
        print(json.dumps(row), flush=True)
    work = {
        "prompts": BATCH,
        "answer_tokens": LENGTH,
        "epochs": EPOCHS,
        "minibatches": MINIBATCHES,
        "budget": options.budget,
    }
    machine = {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    result = {
        "what": "seconds per iteration of coarse RLHF",
        "work": work,
        "machine": machine,
        "versions": provenance.versions(),
        "rows": rows,
    }
    files.write_json(options.out, result)
    print(f"written to {options.out.name}")


if __name__ == "__main__":
    main()
