"""TRL's GRPO and RLOO trainers generate under l(t), also when resumed, and are fed only by laws that need no critic."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

from c2f_utils import limits
from c2f_utils.coarse import trl_limit
from c2f_utils.coarse.trl_limit import LimitCallback
from c2f_utils.domain import stories
from c2f_utils.domain.problems import EOS
from c2f_utils.errors import C2FError
from c2f_utils.files import read_jsonl
from c2f_utils.models import course, rewards
from c2f_utils.report import figures, results, tables
from c2f_utils.runs.run import Run
from c2f_utils.settings.laws import make_law
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import baselines as critic_free_runs
from c2f_utils.stages import length_schedules

TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
PROMPTS = tiny_models.prompts(16)


def clock() -> limits.Clock:
    """4, 8, 12, 16, 16, ..."""
    return limits.Clock(4, maximum=16, duration=3)


class Distinct:
    """A TRL reward function with prefix scores that remembers how long the answers were, per generation."""

    __name__ = "distinct"

    def __init__(self):
        self.longest, self.tokens = [], 0

    def prefix_scores(self, completion_ids, **_):
        self.longest.append(max(map(len, completion_ids)))
        self.tokens += sum(map(len, completion_ids))
        return [torch.tensor([len(set(ids[: k + 1])) / 20 for k in range(len(ids))]) for ids in completion_ids]

    def __call__(self, **columns):
        return [float(row[-1]) for row in self.prefix_scores(**columns)]


def endless() -> torch.nn.Module:
    """A model that hardly ever ends an answer, so that the limit is what ends it."""
    model = tiny_models.causal()
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0
    return model


def build(kind, folder, law, reward=None, others=(), generations=4, connect=True, model=None, **changes):
    """A trainer of 8 answers per generation on a random model, one optimiser step each unless `changes` say more."""
    make, configure = TRAINERS[kind]
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": generations, "beta": 0.0}
    settings |= {"learning_rate": 1e-3, "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    settings |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1, "seed": 1}
    settings |= {"max_completion_length": 6, "lr_scheduler_type": "constant", "output_dir": str(folder)} | changes
    limit = LimitCallback(law)
    rewards = [limit.watch(reward or Distinct()), *others]
    data = Dataset.from_dict({"prompt": [p.text for p in PROMPTS]})
    tokenizer = stories.make_tokenizer()
    model = model or endless()
    trainer = make(model, rewards, configure(**settings), data, processing_class=tokenizer, callbacks=[limit])
    limit.trainer = trainer if connect else None
    return trainer, limit


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_limits_4_8_12_16_are_reached_in_generation(kind, tmp_path):
    reward = Distinct()
    trainer, limit = build(kind, tmp_path, clock(), reward)
    trainer.train()
    assert reward.longest == [4, 8, 12, 16] == [row["limit"] for row in limit.history]
    assert limit.rollout_tokens == reward.tokens == limit.history[-1]["rollout_tokens"]
    told = (trainer.generation_config.max_new_tokens, trainer.generation_kwargs["max_new_tokens"])
    assert (*told, trainer.max_completion_length) == (16, 16, 16)


def test_the_three_lines_of_the_docstring_are_enough(tmp_path):
    lines = [line.strip() for line in LimitCallback.__doc__.splitlines() if line.startswith(" " * 8)]
    assert len(lines) == 3
    like, _ = build("grpo", tmp_path, clock(), generations=2)
    endless().save_pretrained(tmp_path)
    like.processing_class.save_pretrained(tmp_path)
    names = {"LimitCallback": LimitCallback, "Clock": limits.Clock, "GRPOTrainer": GRPOTrainer, "reward": Distinct()}
    names |= {"model": str(tmp_path), "args": like.args, "prompts": like.train_dataset}
    exec("\n".join(lines), names)
    names["trainer"].train()
    assert names["reward"].longest == [24, 31]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_the_limits_are_reached_in_continuous_batching(kind, tmp_path):
    reward = Distinct()
    engine = {"num_blocks": 64, "max_batch_tokens": 64, "page_size": 16}
    changes = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": engine}
    build(kind, tmp_path, clock(), reward, **changes)[0].train()
    assert reward.longest == [4, 8, 12, 16]


@pytest.mark.slow
def test_two_processes_move_the_limit_alike_by_the_answers_of_both(tmp_path):
    here, package = Path(__file__).parent, Path(trl_limit.__file__).parents[1]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(package / "coarse" / "launch" / "ddp.yaml"),
    ]
    command += ["--num_processes", "2", "--main_process_port", "0", str(here / "two_limits.py"), str(tmp_path)]
    paths = os.pathsep.join([str(package.parent), str(here)])
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=surroundings)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"limits-{rank}.json").read_text()) for rank in (0, 1))
    assert first["rows"] == second["rows"] and len(first["rows"]) == 4
    assert [row["longest"] for row in first["rows"]] == [
        *map(max, zip(first["longest"], second["longest"], strict=True))
    ]
    assert first["rows"][-1]["limit"] > 8


def test_the_limit_moves_once_per_generation_however_many_steps_learn_from_it(tmp_path):
    reward = Distinct()
    changes = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 12}
    trainer, _ = build("grpo", tmp_path, clock(), reward, **changes)
    compute, held = trainer.compute_loss, []
    trainer.compute_loss = lambda *a, **k: held.append(trainer.max_completion_length) or compute(*a, **k)
    trainer.train()
    assert reward.longest == [4, 8, 12] and held == [4] * 4 + [8] * 4 + [12] * 4


def test_a_generation_between_two_optimiser_steps_gets_the_next_limit(tmp_path):
    reward = Distinct()
    changes = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 2}
    build("grpo", tmp_path, clock(), reward, **changes)[0].train()
    assert reward.longest == [4, 8, 12, 16]


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_resumed_trainer_continues_l_of_t_and_ends_with_the_same_weights(kind, tmp_path):
    whole = Distinct()
    unbroken, _ = build(kind, tmp_path / "whole", clock(), whole)
    unbroken.train()
    changes = {"save_strategy": "steps", "save_steps": 2}
    build(kind, tmp_path / "halves", clock(), max_steps=2, **changes)[0].train()
    reward = Distinct()
    trainer, limit = build(kind, tmp_path / "halves", clock(), reward, **changes)
    trainer.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-2"))
    assert reward.longest == [12, 16] and whole.longest == [4, 8, 12, 16]
    assert [row["limit"] for row in limit.history] == whole.longest and limit.rollout_tokens == whole.tokens
    theirs = unbroken.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in trainer.model.state_dict().items())


def test_a_checkpoint_between_two_generations_keeps_what_the_law_has_not_seen(tmp_path):
    changes = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1}
    build("grpo", tmp_path, clock(), max_steps=3, **changes)[0].train()
    reward = Distinct()
    trainer, _ = build("grpo", tmp_path, clock(), reward, max_steps=5, **changes)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert reward.longest == [12]  # the second generation, at 8, was under way


def test_a_checkpoint_without_a_limit_and_one_of_another_law_are_refused(tmp_path):
    callback = LimitCallback(clock())
    with pytest.raises(C2FError, match="start anew at 4 tokens"):
        callback.load(tmp_path)
    callback.save(tmp_path)
    with pytest.raises(C2FError, match="written under law Clock, now Tail"):
        LimitCallback(limits.Tail(4, maximum=16)).load(tmp_path)


@pytest.mark.parametrize("name, why", [("logistic", "value_error"), ("gated", "value_slope"), ("probe", "limits")])
def test_laws_that_need_a_critic_or_a_limit_per_request_are_refused_at_once(name, why):
    with pytest.raises(C2FError, match=why):
        LimitCallback(make_law(tiny_models.LAWS[name]))


def test_a_law_that_draws_limits_is_refused_even_if_it_needs_nothing():
    class Jitter(limits.Fixed):
        def draw(self, count, rng):
            return [rng.randint(1, self.limit) for _ in range(count)]

    with pytest.raises(C2FError, match="for every request"):
        LimitCallback(Jitter(8))


def test_the_tail_law_is_fed_by_prefix_scores_and_refused_without_them(tmp_path):
    reward = Distinct()
    trainer, limit = build("grpo", tmp_path, limits.Tail(4, maximum=16, growth=1.0), reward)
    trainer.train()
    assert reward.longest == [4, 8, 16, 16] and all(row["tail_return"] > 0 for row in limit.history)
    with pytest.raises(C2FError, match="needs tail_return"):
        begin(build("grpo", tmp_path, limits.Tail(4, maximum=16), lambda completion_ids, **_: [1.0] * 8)[0])


def test_a_row_says_of_its_answers_what_they_were(tmp_path):
    answers, given = [], []

    def reward(completion_ids, **_):
        answers.extend(completion_ids)
        given.extend(len(set(ids)) / 20 for ids in completion_ids)
        return given

    trainer, limit = build("grpo", tmp_path, limits.Fixed(9), reward, generations=1, model=tiny_models.causal())
    trainer.train()
    (row,) = limit.history
    cut = [ids[-1] != EOS for ids in answers]
    assert 0 < sum(cut) < 8 and sum(cut) != 4 and row["truncated_share"] == sum(cut) / 8
    assert row["reward"] == pytest.approx(statistics.mean(given), abs=1e-6)
    assert row["reward_sd"] == pytest.approx(statistics.stdev(given), abs=1e-6)
    assert row["mean_tokens"] == sum(map(len, answers)) / 8 and row["longest"] == max(map(len, answers))


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_kl_that_the_trainer_logs_reaches_the_law(kind, tmp_path):
    class Cautious(limits.Fixed):
        needs = ("kl_per_token",)
        seen = []

        def update(self, signals):
            self.seen.append(self.checked(signals).kl_per_token)
            return self.limit

    endless().save_pretrained(tmp_path)  # the reference is read from where the model was
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    trainer, limit = build(kind, tmp_path, Cautious(6), model=model, beta=0.05, learning_rate=1e-2)
    trainer.train()
    assert Cautious.seen[0] == pytest.approx(0, abs=1e-6) and abs(Cautious.seen[2]) > 1e-4
    assert [row["kl_per_token"] for row in limit.history[:3]] == pytest.approx(Cautious.seen, abs=1e-6)
    with pytest.raises(C2FError, match="needs kl_per_token"):
        begin(build(kind, tmp_path, Cautious(6))[0])  # beta = 0: no KL is measured


def begin(trainer) -> None:
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_what_would_ignore_or_distort_the_limit_is_refused_before_training(tmp_path):
    with pytest.raises(C2FError, match="not connected"):
        begin(build("grpo", tmp_path, clock(), connect=False)[0])
    with pytest.raises(C2FError, match="dr_grpo"):
        begin(build("grpo", tmp_path, clock(), loss_type="dr_grpo")[0])
    begin(build("grpo", tmp_path, limits.Fixed(8), loss_type="dr_grpo")[0])  # a limit that stands still is harmless
    trainer, _ = build("grpo", tmp_path, clock())
    trainer.vllm_generation = SimpleNamespace(max_completion_length=6)
    trainer.args.generation_kwargs, trainer.args.vllm_max_model_length = {"max_tokens": 9}, 16
    with pytest.raises(C2FError, match="max_tokens(.|\n)*vllm_max_model_length = 16"):
        begin(trainer)
    with pytest.raises(C2FError, match="expected an ordinary function"):
        LimitCallback(clock()).watch(endless())


def test_an_answer_longer_than_the_limit_stops_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(trl_limit, "set_limit", lambda trainer, limit: None)  # a trainer that reads it elsewhere
    trainer, _ = build("grpo", tmp_path, clock())
    with pytest.raises(C2FError, match="6 tokens under a limit of 4"):
        trainer.train()


def test_vllm_gets_its_limit_where_it_reads_it():
    trainer = SimpleNamespace(vllm_generation=SimpleNamespace(max_completion_length=4), max_completion_length=4)
    trl_limit.set_limit(trainer, 12)
    assert trainer.vllm_generation.max_completion_length == trainer.max_completion_length == 12


def test_a_soft_overlong_punishment_follows_the_limit(tmp_path, monkeypatch):
    punish = get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=4)
    seen = []
    trainer, _ = build("grpo", tmp_path, clock(), others=[punish], generations=2)
    said = punish.__class__.__call__

    def overheard(self, *args, **columns):
        seen.append((self.max_completion_len, self.soft_punish_cache))
        return said(self, *args, **columns)

    monkeypatch.setattr(punish.__class__, "__call__", overheard)
    trainer.train()
    assert seen == [(4, 2), (8, 4)]


def test_state_is_plain_json(tmp_path):
    trainer, limit = build("grpo", tmp_path, clock(), generations=1)
    trainer.train()
    limit.save(tmp_path)
    state = json.loads((tmp_path / trl_limit.STATE).read_text())
    assert state["law"]["limit"] == 4 and state["pending"]["iteration"] == 0 and len(state["history"]) == 1


# --- the baselines of 04 ---------------------------------------------------------------------------------------------

CLOCK = {"name": "clock", "shape": "linear", "start": 8, "maximum": 20, "duration": 2}
TAIL = {"name": "tail", "start": 8, "maximum": 20, "growth": 0.5}
ENTRIES = {
    "grpo_model": {"trainer": "grpo", "law": TAIL, "iterations": 3},
    "rloo_exact": {"trainer": "rloo", "reward": "verifiable", "law": TAIL, "iterations": 2},
}


def study(folder, entries, **overrides):
    """Stage 04 of a copy of a finished run, begun as a study of nothing but these baselines under one seed."""
    only = {"laws": {}, "study_seeds": [0], "critic_free": entries}
    overrides = {f"schedules.{key}": value for key, value in only.items()} | overrides
    settings = load_settings("smoke", run_id="r", overrides=overrides, study=True)
    run = Run(settings.model_copy(update={"schedules": settings.schedules.model_copy(update={"laws": {}})}))
    run.here = run.stage("04_length_schedules")
    run.here.begin(run.inputs("04_length_schedules")[0])
    return run


@pytest.fixture
def parents(smoke_run, outputs):
    for name in ("01_base_model", "02_reward_model", "03_coarse_rlhf"):
        shutil.copytree(smoke_run / name, outputs / "r" / name)
    return outputs / "r" / "04_length_schedules"


class Killed(BaseException):
    pass


def test_04_keeps_finished_baselines_and_a_killed_one_continues_as_if_nothing_had_happened(parents, monkeypatch):
    run = study(parents, ENTRIES)
    whole = length_schedules.make(run)
    run.here.finish()
    assert list(whole["critic_free"]) == list(ENTRIES)
    for name, entry in whole["critic_free"].items():
        found = entry["seeds"]["0"]
        assert found["limits"][0] == 8 and len(found["limits"]) == ENTRIES[name]["iterations"] == found["iterations"]
        assert [point["iteration"] for point in found["curve"]][0] == 0 and found["final"]["n"] == 12
        assert found["curve"][-1]["rollout_tokens"] == found["rollout_tokens"] <= 8 * sum(found["limits"])
    rows = read_jsonl(parents / "metrics.jsonl")
    parents.rename(parents.with_name("whole"))

    run = study(parents, ENTRIES)
    log, seen = run.here.log, []

    def dying(row):
        log(row)
        seen.append(row)
        if len(seen) == 2:
            raise Killed

    run.here.log = dying
    with pytest.raises(Killed):
        length_schedules.make(run)
    run.here.release()
    assert course.latest(parents / "checkpoints" / "grpo_model-s0", critic_free_runs.CURVE).name == "checkpoint-4"
    run = study(parents, ENTRIES)
    assert json.loads(json.dumps(length_schedules.make(run))) == json.loads(json.dumps(whole))
    run.here.finish()
    assert read_jsonl(parents / "metrics.jsonl") == rows and len(rows) == 5
    names = list(results.with_baselines(whole)["laws"])
    assert len(tables.law_table(results.with_baselines(whole))) == len(names) and "rloo_exact" in names
    figures.tokens_to_target(results.with_baselines(whole))


def test_what_no_baseline_can_do_is_refused_with_the_settings_all_at_once():
    laws = {"name": "logistic", "start": 8, "maximum": 20, "step": 4}
    entries = {"a": {"trainer": "grpo", "law": laws}, "fixed_long": {"trainer": "rloo", "generations": 3, "law": CLOCK}}
    overrides = {"schedules.critic_free": entries, "coarse.cut": "bootstrap"}
    with pytest.raises(C2FError) as refused:
        load_settings("smoke", overrides=overrides, study=True)
    for words in (
        "schedules.critic_free.a: law Logistic needs value_error",
        "critic_free.fixed_long: a law has this name",
        "coarse.prompts = 8 is no multiple of generations = 3",
        "'bootstrap' asks the critic",
    ):
        assert words in str(refused.value)
    entries = {"a": {"trainer": "grpo", "law": CLOCK}}
    with pytest.raises(C2FError, match="'average' is known to our trainer only"):
        load_settings("smoke", overrides={"schedules.critic_free": entries, "coarse.cut": "average"}, study=True)
    entries = {"a": {"trainer": "grpo", "law": CLOCK | {"maximum": 999}}}
    with pytest.raises(C2FError, match="schedules.critic_free.a, largest limit = 999"):
        load_settings("smoke", overrides={"schedules.critic_free": entries}, study=True)


def test_the_exact_reward_of_a_prefix_is_the_reward_of_the_answer_cut_there():
    sample = tiny_models.samples(tiny_models.causal(), 1, 12)[0]
    sample.ids = stories.encode(["answer", ":", str(sample.prompt.problem.answer), "."])
    reward = rewards.Verifiable()
    assert reward.prefix_scores([sample])[0].tolist() == [-0.5, -0.5, 1.5, 1.5]
    assert reward([sample]).tolist() == [1.5]


def test_what_is_committed_was_not_measured_on_the_seeds_it_was_tuned_on():
    found = results.committed("critic_free")
    tuned = {str(row["seed"]) for row in found["tuning"]}
    measured = [set(law["seeds"]) for law in found["laws"].values()]
    assert len(measured) == 22 and all(seeds == measured[0] for seeds in measured) and not tuned & measured[0]
    for trainer, rate in found["learning_rates"].items():
        rows = [row for row in found["tuning"] if row["trainer"] == trainer]
        rates = {row["learning_rate"] for row in rows}
        assert min(rates) < rate < max(rates), "the best rate lies at the edge of those tried"
        assert rate == found["laws"][f"{trainer}_model_clock"]["learning_rate"]
