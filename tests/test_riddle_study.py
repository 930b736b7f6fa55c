"""The registered comparisons on riddles: right numbers from made-up seeds, and a gate that can hold them back."""

import json
from pathlib import Path

import pytest
import riddles as benchmark
from scipy import stats as library

from c2f_utils import stats
from c2f_utils.report import carried, riddle_study
from c2f_utils.report.figures_forest import seed_forest
from c2f_utils.settings.load import load_settings

ARMS = ("fine", "coarse", "instruct_forced", "base_forced", *riddle_study.RIVALS)


def model(label: str, accuracy: float) -> dict:
    kind = {"accuracy_last": accuracy, "accuracy_first": accuracy, "correct_steps": 2 * accuracy}
    whole = kind | {"utility": 3.0, "mean_tokens": 40.0, "eos_rate": 1.0}
    seen = {"all": whole, "story": kind, "riddle": kind}
    better = {name: row | {"accuracy_last": accuracy + (label == "fine")} for name, row in seen.items()}
    cost = {"rl_tokens": 5, "sft_tokens": 0, "search_tokens": None, "seconds": None}
    return {"label": label, "role": "control", "sampled_t1": seen, "greedy": better, "cost": cost}


def study(**accuracies: list[float]) -> dict:
    seeds = {}
    for number in range(8):
        models = {
            name: model(name, accuracies.get(name, [0.3 + 0.01 * (k % 3) for k in range(8)])[number]) for name in ARMS
        }
        seeds[str(201 + number)] = {
            "gate": [{"name": "x", "value": 0.5, "bound": 0.8, "passed": True}],
            "floor": 0.1 + 0.01 * number,
            "models": models,
            "carried": [
                {"problems": kind} | dict.fromkeys(carried.CHANGES, 0.1 * number + (kind == "riddle"))
                for kind in riddle_study.KINDS
            ],
        }
    return {"seeds": seeds}


def test_differences_are_paired_by_seed_and_corrected_over_all_registered_comparisons():
    fine = [0.6, 0.62, 0.58, 0.61, 0.6, 0.63, 0.59, 0.6]
    found = study(
        fine=fine, distilled=[x + 0.1 for x in fine], shortest_correct=[x + (-1) ** k * 0.1 for k, x in enumerate(fine)]
    )
    frame = riddle_study.registered_table(found).set_index("minus")
    row = frame.loc["ppo_instruct_tokens"]
    gaps = [a - (0.3 + 0.01 * (k % 3)) for k, a in enumerate(fine)]
    assert row["difference"] == pytest.approx(sum(gaps) / 8) and row["higher on"] == "8 of 8"
    assert row["p"] == pytest.approx(library.ttest_1samp(gaps, 0).pvalue) and row["verdict"] == "higher"
    assert frame.loc["shortest_correct", "verdict"] == "cannot be told apart"
    assert frame.loc["distilled", "verdict"] == "lower" and len(frame) == len(riddle_study.REGISTERED) == 8
    assert frame["p_holm"].tolist() == pytest.approx(stats.holm(frame["p"].tolist()))
    rivals = frame.head(len(riddle_study.RIVALS))
    assert {*rivals["model"]} == {"fine"} and rivals.index[0] == "distilled", "losses stand first"
    assert rivals["difference"].is_monotonic_increasing
    assert row["p_flip"] == pytest.approx(2 / 2**8, rel=0.3), "nothing smaller is possible with eight seeds"
    greedy = riddle_study.greedy_table(found).set_index("minus")
    assert greedy.loc["distilled", "difference"] == pytest.approx(0.9), "read from the other decoding"
    assert riddle_study.floor(found) == pytest.approx(0.135)


def test_what_was_asked_later_has_no_verdict_and_only_arms_that_every_seed_has():
    frame = riddle_study.further_table(study(coarse=[0.7] * 8, base_forced=[0.6] * 8)).set_index(["decoding", "minus"])
    assert {*frame.index} == {
        (way, b) for way in ("sampled_t1", "greedy") for b in ("ppo_instruct_tokens", "base_forced")
    }
    assert frame.loc[("sampled_t1", "base_forced"), "difference"] == pytest.approx(0.1) and "verdict" not in frame


def test_the_setting_decides_only_where_enough_seeds_pass_the_gate():
    found = study()
    assert riddle_study.decides(found) and riddle_study.gate_table(found)["holds"].all()
    for seed in ("201", "202"):
        found["seeds"][seed]["gate"][0]["passed"] = False
    assert riddle_study.decides(found), "six of eight"
    found["seeds"]["203"]["gate"][0]["passed"] = False
    assert not riddle_study.decides(found)
    assert all(text.endswith("of 5") for text in riddle_study.registered_table(found, passing_only=True)["higher on"])
    some = study()
    del some["seeds"]["208"]
    assert not riddle_study.decides(some), "all eight were registered"


def test_arms_are_ordered_by_riddles_and_unknown_costs_stay_unknown():
    frame = riddle_study.arms_table(study(coarse=[0.9] * 8))
    assert frame["accuracy_last, riddle"].is_monotonic_decreasing and frame["rl_tokens"][0] == 5
    assert frame["seconds"].isna().all() and frame["model"][0] == "coarse"


def test_every_difference_has_its_interval_in_table_and_figure():
    fine = [0.60, 0.62, 0.58, 0.61, 0.60, 0.63, 0.59, 0.60]
    found = study(fine=fine, coarse=[x + 0.2 for x in fine])
    frame = riddle_study.differences_table(found).set_index("fine minus")
    assert frame.index[0] == "coarse" and "fine" not in frame.index and len(frame) == len(ARMS) - 1
    columns = [f"accuracy_last, riddle{end}" for end in ("", " low", " high")]
    assert frame.loc["coarse", columns].tolist() == pytest.approx([-0.2] * 3)
    gaps = stats.seed_interval([a - (0.3 + 0.01 * (k % 3)) for k, a in enumerate(fine)])
    assert frame.loc["distilled", columns].tolist() == pytest.approx(list(gaps[:3]))
    data = seed_forest(*riddle_study.as_runs(found), metrics=riddle_study.PANELS).data
    assert {*data["metric"]} == {*riddle_study.PANELS}
    row = data[(data["b"] == "distilled") & (data["metric"] == "accuracy_last, riddle")].iloc[0]
    assert row["difference"] == pytest.approx(gaps.value) and row["low"] == pytest.approx(gaps.low)


def test_what_the_residue_carries_is_averaged_by_kind_over_seeds():
    frame = riddle_study.carried_over_seeds(study()).set_index(["problems", "change"])
    for change in carried.CHANGES:
        mine, wanted = frame.loc[("riddle", change)], stats.seed_interval([1 + 0.1 * k for k in range(8)])
        assert (mine["mean"], mine["low"], mine["high"]) == pytest.approx(wanted[:3])
    assert frame.loc[("story", "added by RL"), "mean"] == pytest.approx(0.35)


def test_what_is_run_is_what_was_registered():
    settings = load_settings("tiny", overrides={"data.domain": "riddles", "merge.controls": benchmark.CONTROLS})
    assert {*riddle_study.RIVALS} <= {*settings.merge.controls}
    assert {f"{name}_forced" for name in settings.forced_models} == {"instruct_forced", "base_forced", "fine_forced"}
    text = (Path(benchmark.__file__).parent / "preregistered" / "riddles.md").read_text()
    assert "201 202 203 204 205 206 207 208" in text and "Holm over the eight" in text
    assert json.loads(json.dumps(benchmark.CONTROLS)) == settings.merge.controls
