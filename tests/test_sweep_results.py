"""A sweep read back: one row per point and seed, intervals over seeds, its figure, and what is not done yet."""

import json
import math

import matplotlib
import pytest
from fake_results import fake_run

from c2f_utils import stats
from c2f_utils.errors import C2FError
from c2f_utils.report import figures_sweep, sweep_results
from c2f_utils.report.style import save_figure

STAGE = "03_coarse_rlhf"
LAWS = [{"name": "fixed", "limit": 32}, {"name": "logistic", "maximum": 160}]
GRID = {"coarse.iterations": [5, 20], "coarse.law": LAWS}
SEEDS = (1, 2, 3)


def accuracy(iterations: int, law: int, seed: int) -> float:
    return 0.3 + 0.01 * iterations + 0.1 * law + 0.02 * seed * (1 + law)


def planted(outputs, undone: str = "") -> str:
    """A sweep `s` of four points and three seeds with known results; the run `undone` has none."""
    runs = [{"run": "s-s1", "seed": 1, "point": None, "notebooks": ["01_base_model"], "after": None}]
    for iterations in GRID["coarse.iterations"]:
        for number, law in enumerate(LAWS):
            for seed in SEEDS:
                name = f"s-{iterations}-{number}-s{seed}"
                point = {"coarse.iterations": iterations, "coarse.law": law}
                runs.append({"run": name, "seed": seed, "point": point, "notebooks": [STAGE], "after": "s-s1"})
                final = {"accuracy_last": accuracy(iterations, number, seed), "mean_tokens": 30.0 + seed, "n": 8}
                folder = outputs / name / STAGE
                if name != undone:
                    folder.mkdir(parents=True)
                    (folder / "results.json").write_text(json.dumps({"final": final, "rollout_tokens": 100}))
                    (folder / "status.json").write_text(json.dumps({"status": "done"}))
    record = {"sweep": "s", "notebooks": [STAGE], "profile": "smoke", "grid": GRID, "seeds": SEEDS, "runs": runs}
    (outputs / "s").mkdir()
    (outputs / "s" / "sweep.json").write_text(json.dumps(record))
    return "s"


def test_one_row_per_point_and_seed_and_t_intervals_over_seeds(outputs):
    frame = sweep_results.sweep_results(planted(outputs))
    assert len(frame) == 12 and list(frame["seed"]) == [*SEEDS] * 4
    assert set(frame["coarse.law"]) == {"fixed, limit 32", "logistic, maximum 160"}
    found = sweep_results.summary(frame)
    assert list(found["metric"][:3]) == ["accuracy_last", "mean_tokens", "rollout_tokens"] and len(found) == 12
    row = found[(found["coarse.iterations"] == 20) & (found["coarse.law"].str.startswith("log"))].iloc[0]
    wanted = stats.seed_interval([accuracy(20, 1, seed) for seed in SEEDS])
    assert (row["mean"], row["low"], row["high"], row["seeds"]) == wanted


def test_what_is_not_done_is_missing_and_the_others_are_there(outputs):
    frame = sweep_results.sweep_results(planted(outputs, undone="s-5-0-s2"))
    missing = frame[frame["accuracy_last"].isna()]
    assert list(missing["run"]) == ["s-5-0-s2"]
    assert sweep_results.summary(frame)["seeds"].min() == 2


def test_an_unfinished_stage_gives_no_numbers(outputs):
    planted(outputs)
    status = outputs / "s-5-0-s1" / STAGE / "status.json"
    status.write_text(json.dumps({"status": "stopped"}))
    frame = sweep_results.sweep_results("s").set_index("run")
    assert math.isnan(frame.loc["s-5-0-s1", "accuracy_last"])


def test_unknown_and_damaged_sweeps_are_refused_in_a_sentence_and_concern_no_run(outputs):
    planted(outputs)
    with pytest.raises(C2FError, match="no sweep 'other' .*there are: s"):
        sweep_results.sweep_results("other")
    with pytest.raises(C2FError, match="expected one of 03_coarse_rlhf"):
        sweep_results.sweep_results("s", "06_residue_merging")
    assert sweep_results.of_run("s-5-0-s1") == "s" and sweep_results.of_run("lab") is None
    for damage in ("null", "[]", '{"sweep": 1', '{"runs": [1]}', "\xff"):
        (outputs / "s" / "sweep.json").write_text(damage, encoding="latin-1")
        with pytest.raises(C2FError, match="sweep.json"):
            sweep_results.read("s")
        assert sweep_results.of_run("s-5-0-s1") is None


def test_the_figure_names_every_point_its_mean_and_the_number_of_seeds(outputs, tmp_path):
    planted(outputs, undone="s-5-0-s2")
    figure = save_figure(figures_sweep.sweep_figure("s"), tmp_path, "sweep")
    said = " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))
    for law in ("fixed, limit 32", "logistic, maximum 160"):
        assert f"iterations 5, law {law}" in said and f"iterations 20, law {law}" in said
    assert "95 % t-interval over 3 seeds" in said.replace("\n", " ") and "sweep s" in said
    assert f"{sum(accuracy(20, 1, seed) for seed in SEEDS) / 3:.3f}" in said
    assert len(figure.data) == 12 and (tmp_path / "figures" / "sweep.png").stat().st_size > 10_000


def test_the_figure_says_so_where_nothing_is_done(outputs):
    (outputs / "s").mkdir()
    run = {"run": "a", "seed": 0, "point": {"coarse.iterations": 5}, "notebooks": [STAGE], "after": None}
    record = {"sweep": "s", "notebooks": [STAGE], "profile": "smoke", "grid": {}, "seeds": [0], "runs": [run]}
    (outputs / "s" / "sweep.json").write_text(json.dumps(record))
    said = " ".join(text.get_text() for text in figures_sweep.sweep_figure("s").findobj(matplotlib.text.Text))
    assert "no run of this sweep has results" in said


def test_metrics_are_those_of_the_stage_that_is_asked_for(outputs):
    fake_run(outputs, "one")
    names = ["01_base_model", "02_reward_model", STAGE, "05_instruction_model", "06_residue_merging", "07_evaluation"]
    run = {"run": "one", "seed": 0, "point": {}, "notebooks": names, "after": None}
    record = {"sweep": "s", "notebooks": names, "profile": "tiny", "grid": {}, "seeds": [0], "runs": [run]}
    (outputs / "s").mkdir()
    (outputs / "s" / "sweep.json").write_text(json.dumps(record))
    found = {name: sweep_results.sweep_results("s", name).iloc[0] for name in names}
    whole = {name: json.loads((outputs / "one" / name / "results.json").read_text()) for name in names}
    assert (
        found["07_evaluation"]["accuracy_last"]
        == whole["07_evaluation"]["models"]["fine"]["sampled_t1"]["accuracy_last"]
    )
    assert found["06_residue_merging"]["score"] == max(row["score"] for row in whole["06_residue_merging"]["sweep"])
    assert found["02_reward_model"]["pair_accuracy"] == whole["02_reward_model"]["pair_accuracy"]
    assert sweep_results.sweep_results("s").iloc[0]["stage"] == "07_evaluation"
