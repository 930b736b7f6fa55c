"""Estimates of time: what a stage works through at most, and how fast this machine was."""

import pytest
from finished_runs import results

from c2f_utils.notebook import cells
from c2f_utils.runs import work
from c2f_utils.runs.run import Run
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import base_model

SPEEDS = work.Speeds(generated=100.0, read=1000.0, prompt_tokens=20.0, pair_tokens=60.0)


def of(stage: str, profile: str = "tiny", **overrides: object) -> work.Work:
    changes = {name.replace("__", "."): value for name, value in overrides.items()}
    return work.of_stage(stage, load_settings(profile, overrides=changes), SPEEDS)


def test_an_iteration_is_counted_token_by_token():
    few = {
        "coarse__law": {"name": "fixed", "limit": 100}, "coarse__prompts": 8, "coarse__epochs": 3,
        "coarse__evaluate_every": 1000, "coarse__evaluation_prompts": 4, "coarse__evaluation_tokens": 10,
        "evaluation__max_tokens": 10, "data__test_prompts": 4,
    }  # fmt: skip
    one, two = (of("03_coarse_rlhf", coarse__iterations=n, **few) for n in (1, 2))
    assert two.generated - one.generated == 8 * 100
    # 8 sequences of 120 tokens: reward model, reference, critic; then in three epochs actor and critic, each thrice
    assert two.read - one.read == 8 * 120 * (3 + 3 * 2 * 3)
    assert one.generated == 8 * 100 + 4 * 10 + 4 * 10 and one.read == 8 * 120 * 21 + 4 * 30 + 4 * 30
    assert one.seconds(SPEEDS) == pytest.approx(one.generated / 100 + one.read / 1000)


def test_what_is_asked_for_decides_how_long_it_takes():
    assert of("04_length_schedules").generated > 2 * of("03_coarse_rlhf").generated
    assert (
        of("06_residue_merging", merge__sections=[], merge__controls=[]).generated < of("06_residue_merging").generated
    )
    few, more = (of("06_residue_merging", merge__sections=found, merge__controls=[]) for found in ([], ["label_free"]))
    assert more.generated == 3 * len(load_settings("tiny").merge.coefficients) * 256 * 160 + few.generated
    swept = of("06_residue_merging", merge__sections=[], merge__controls=["coarse_interpolation"])
    assert 3 * (swept.generated - few.generated) == more.generated - few.generated
    alone = {"tasks__suites": [], "judge__name": "none"}
    one_of_three = of("07_evaluation", evaluation__decodings=["greedy"], **alone)
    assert one_of_three.generated == of("07_evaluation", **alone).generated / 3
    asked = of("07_evaluation", judge__name="none")
    assert of("07_evaluation", **alone).generated < asked.generated
    assert of("07_evaluation", judge__name="none", tasks__problems=128).generated > asked.generated
    judged, more = of("07_evaluation"), of("07_evaluation", judge__questions=48, judge__pairs=1200)
    assert more.generated - asked.generated == 2 * (judged.generated - asked.generated) > 0
    assert more.read > judged.read > of("07_evaluation", judge__name="heuristic").read > asked.read
    assert of("02_reward_model", reward__members=2).read > 1.5 * of("02_reward_model").read
    assert of("05_instruction_model").read > of("05_instruction_model", instruct__tokens=1000).read
    assert work.of_stage("08_report", load_settings("tiny"), SPEEDS) is None


def test_adapters_spare_a_pass_and_recomputed_activations_cost_one():
    lora = {"rank": 4, "alpha": 8}
    whole, adapters, recomputed = (
        of("02_reward_model", **changes).read
        for changes in ({}, {"models__lora": lora}, {"models__lora": lora, "models__gradient_checkpointing": True})
    )
    assert recomputed == whole and adapters < whole


def test_speeds_are_kept_beside_the_base_and_older_runs_have_none(tmp_path):
    assert work.known(tmp_path) is None
    SPEEDS.save(tmp_path)
    assert work.known(tmp_path) == SPEEDS
    (tmp_path / work.FILE).write_text('{"generated": "fast"}')
    assert work.known(tmp_path) is None


def test_the_probe_measures_this_machine_and_what_was_done_stayed_below_its_bounds(smoke_run, tmp_path, monkeypatch):
    speeds = work.known(smoke_run / "01_base_model")
    assert speeds.generated > 1 and speeds.read > speeds.generated and 10 < speeds.prompt_tokens < 64
    assert "speeds" not in str(results(smoke_run, "01")), "a second run measures others, and must give the same results"
    settings = load_settings("smoke")
    bound = work.of_stage("03_coarse_rlhf", settings, speeds)
    assert 0 < results(smoke_run, "03")["rollout_tokens"] <= bound.generated
    monkeypatch.setenv("C2F_OUTPUTS", str(smoke_run.parent))
    run = Run(load_settings("smoke", run_id=smoke_run.name))
    run.here = run.stage("01_base_model")
    table = base_model.times(run)
    assert [name[:2] for name in table.index] == ["02", "03", "04", "05", "06", "07"]
    run.here = run.stage("03_coarse_rlhf")
    origins = {"01_base_model": smoke_run.name}
    assert "at most" in cells._longest(run, origins) and cells._longest(run, {}) is None
