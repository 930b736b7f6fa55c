"""All notebooks on `smoke`, headless, once: what they leave on disk is complete, finite, in range and loadable.

Cell outputs are not looked at: they may change with every sentence of the story; artefacts may not.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from finished_runs import (
    DECODINGS,
    METRICS,
    ROOT,
    check_metrics,
    check_samples,
    finished,
    results,
    rows,
    surroundings,
    timestamps,
)  # fmt: skip

from c2f_utils.report.tables import LONG
from c2f_utils.settings.config import STAGES
from c2f_utils.settings.load import load_settings

SMOKE = load_settings("smoke")
PARENTS = ("base", "instruct", "coarse", "fine")
CONTROLS = {*SMOKE.merge.controls, "best_recipe", "instruct_forced", "base_forced"}


def test_every_stage_is_done_and_says_where_it_comes_from(smoke_run):
    for name in STAGES:
        folder = smoke_run / name
        read = lambda file: json.loads((folder / file).read_text())  # noqa: B023, E731
        assert read("status.json")["status"] == "done" and read("status.json")["peak_mb"] > 50
        assert read("config.json")["threads"] == 1 and read("config.json")["settings"]["profile"] == "smoke"
        assert read("provenance.json")["sessions"][0]["versions"]["torch"]
        assert (folder / "log.txt").exists()
        executed = read("notebook.ipynb")
        assert all(cell["execution_count"] for cell in executed["cells"] if cell["cell_type"] == "code")
    assert not list(smoke_run.glob("*.running.*")) and not (smoke_run / "STOP").exists()


def test_no_result_holds_a_path_or_a_time(smoke_run):
    for path in smoke_run.glob("*/results.json"):
        assert str(smoke_run.parent) not in path.read_text() and "seconds" not in path.read_text(), path


def test_data_are_shown(smoke_run):
    found = results(smoke_run, "00")
    for kind in ("documents", "chosen", "rejected", "instructions"):
        assert len(found[kind]) == 4 and all(row["text"] and row["tokens"] > 0 for row in found[kind])
    assert all(a["prompt"] == b["prompt"] for a, b in zip(found["chosen"], found["rejected"], strict=True))


def test_base_and_instruct_have_losses_and_behaviour(smoke_run):
    base = results(smoke_run, "01")
    assert set(base["validation"]) == {"forced_accuracy", "forced_direct_accuracy"}
    assert all(0 <= share <= 1 for share in base["validation"].values()) and base["parameters"] > 10_000
    instruct = results(smoke_run, "05")
    assert instruct["examples"] > 10
    for found in (base, instruct):
        check_metrics(found["behaviour"], reward=False, longest=SMOKE.evaluation.max_tokens)
        steps = [row["step"] for row in found["loss"]]
        assert len(steps) >= 3 and steps == sorted(set(steps)) and found["loss"][-1]["loss"] < found["loss"][0]["loss"]
    assert [row["tokens"] for row in base["loss"]] == sorted(row["tokens"] for row in base["loss"])


def test_the_reward_model_is_measured(smoke_run):
    found = results(smoke_run, "02")
    assert 0 <= found["pair_accuracy"] <= 1 and found["n_pairs"] == SMOKE.reward.pairs and found["std"] > 0
    groups = found["calibration"]
    assert sum(group["n"] for group in groups) == 2 * SMOKE.reward.held_out_pairs
    for group in groups:
        assert 0 <= group["predicted"] <= 1 and 0 <= group["observed"] <= 1
        assert group["margin_low"] <= group["margin_high"]
    assert set(found["length_bias"]) == {"pearson", "spearman", "slope_per_100_tokens", "partial_given_utility"}
    (bias,) = found["length_bias_models"]
    assert bias["model"] == "single" and bias["pairs"] == SMOKE.reward.held_out_pairs and bias["better_by"] == "utility"
    assert 0 < len(found["points"]) <= 400 and set(found["points"][0]) == {"tokens", "reward", "utility"}
    assert all(row["reward_se"] >= 0 for row in found["prefix_reward"]) and len(found["prefix_reward"]) >= 2
    mean = sum(point["reward"] for point in found["points"]) / len(found["points"])
    assert abs(mean) < 0.01, "rewards are normalised on these very answers"


def test_the_coarse_stage_logs_one_complete_row_per_iteration(smoke_run):
    found, logged = results(smoke_run, "03"), rows(smoke_run / STAGES[3] / "metrics.jsonl")
    law = SMOKE.coarse.law
    assert [row["iteration"] for row in logged] == [1, 2, 3] and found["iterations"] == 3
    wanted = {
        "limit", "next_limit", "reason", "rollout_tokens", "reward", "reward_sd", "kl_per_token", "mean_tokens",
        "p95_tokens", "truncated_share", "entropy", "policy_loss", "value_loss", "explained_variance",
        "clip_fraction", "ratio_error", "rep4", "seconds",
    }  # fmt: skip
    for row, after in zip(logged, [*logged[1:], None], strict=True):
        assert wanted <= set(row), wanted - set(row)
        assert row["ratio_error"] <= 1e-4 and row["kl_per_token"] >= 0 and row["entropy"] > 0
        assert law.start <= row["limit"] <= row["next_limit"] <= law.maximum and row["mean_tokens"] <= row["limit"]
        assert after is None or after["limit"] == row["next_limit"]
    assert logged[-1]["rollout_tokens"] == found["rollout_tokens"] > 0
    assert found["limits"] == [row["limit"] for row in logged]
    check_metrics(found["final"])
    assert [point["iteration"] for point in found["curve"]] == [0, 2, 3]
    for point in found["curve"]:
        check_metrics(point, longest=SMOKE.coarse.evaluation_tokens)
    assert len(found["probes"]) == SMOKE.coarse.probes * len(found["curve"])
    assert all({"iteration", "prompt", "text", "reward", "tokens", "stop"} <= set(probe) for probe in found["probes"])
    assert {path.suffix for path in (smoke_run / STAGES[3] / "figures").iterdir()} == {".png", ".pdf", ".csv"}


def test_every_law_is_compared_at_equal_iterations(smoke_run):
    laws = results(smoke_run, "04")["laws"]
    assert set(laws) == {"logistic", "fixed_short", "fixed_long", "clock_linear"}
    for name, law in laws.items():
        one = law["seeds"]["0"]
        check_metrics(one["final"])
        assert len(one["limits"]) == SMOKE.coarse.iterations and one["rollout_tokens"] > 0 and len(one["curve"]) == 3
        assert law["label"]
        assert name != "fixed_long" or set(one["limits"]) == {32}
    assert laws["logistic"]["seeds"]["0"]["final"] == results(smoke_run, "03")["final"], "03 is reused"
    logged = rows(smoke_run / STAGES[4] / "metrics.jsonl")
    assert len(logged) == len({(row["law"], row["seed"], row["iteration"]) for row in logged}) == 9


def test_the_merge_is_swept_chosen_and_explained(smoke_run):
    found = results(smoke_run, "06")
    grid = [float(row["coefficient"]) for row in found["sweep"]]
    assert grid == SMOKE.merge.coefficients
    best = max(found["sweep"], key=lambda row: row["score"])
    assert found["chosen"] == {"operator": {"name": "residue"}, "coefficient": best["coefficient"]}
    for row in [*found["sweep"], *found["layers"], *found["operators"]]:
        check_metrics(row)
        assert row["score"] == pytest.approx(row["utility"] - SMOKE.merge.token_price * row["mean_tokens"], abs=1e-5)
    assert len(found["operators"]) == 1 + len(SMOKE.merge.other_operators) and len(found["layers"]) >= 8
    for row in found["anatomy"]:
        assert row["norm_coarse"] >= 0 and row["norm_instruct"] >= 0 and 0 <= row["sparsity"] <= 1
        assert row["cosine"] is None or -1 <= row["cosine"] <= 1
    assert all(0 <= share <= 1 for share in found["survival"].values())
    assert set(found["controls"]) == set(SMOKE.merge.controls) and "utility" in found["score"]


def test_the_fine_actor_on_disk_is_the_chosen_recipe(smoke_run):
    from safetensors.torch import load_file

    c = results(smoke_run, "06")["chosen"]["coefficient"]
    base, coarse, instruct, fine = (
        load_file(next(smoke_run.glob(f"{number}_*/model/model.safetensors"))) for number in ("01", "03", "05", "06")
    )
    assert set(fine) == set(instruct)
    for name, merged in fine.items():
        expected = instruct[name].double() + c * (coarse[name].double() - base[name].double())
        assert (merged.double() - expected).abs().max() < 1e-6, name


def test_the_evaluation_has_every_model_control_and_decoding(smoke_run):
    found = results(smoke_run, "07")
    assert {"interpolation", "random_residue", "ppo_instruct", "fixed_long_residue"} <= CONTROLS, "always shown"
    assert set(found["models"]) == {*PARENTS, *CONTROLS}
    for name, model in found["models"].items():
        assert model["role"] == (name if name in PARENTS else "control") and model["label"]
        for decoding in DECODINGS:
            check_metrics(model[decoding], longest=SMOKE.evaluation.max_tokens + 6)
            assert model[decoding]["n"] == SMOKE.data.test_prompts
        for row in found["prefix_redundancy"][name]:
            assert row["prefix"] in SMOKE.evaluation.prefixes and 0 <= row["n"] <= SMOKE.data.test_prompts
            assert (row["rep4"] is None) == (row["n"] == 0) and (row["rep4"] is None or 0 <= row["rep4"] <= 1)
    compared = {(row["b"], row["metric"], row["decoding"]) for row in found["paired"]}
    others = {*PARENTS, *CONTROLS} - {"fine"}
    assert {
        (b, metric, d) for b in others for metric in ("accuracy_last", "accuracy_first", "reward") for d in DECODINGS
    } <= compared
    for row in found["paired"]:
        if row["metric"] == "reward":
            fine, other = (found["models"][row[side]][row["decoding"]]["reward"] for side in "ab")
            assert row["difference"] == pytest.approx(fine - other, abs=1e-5)
        assert row["a"] == "fine" and row["low"] <= row["difference"] <= row["high"] and 0 <= row["p"] <= 1


def test_the_evaluation_says_what_is_kept_and_what_can_be_found(smoke_run):
    found, forced = results(smoke_run, "07"), {"instruct_forced", "base_forced"}
    kept = found["retention"]
    assert set(kept["kinds"]) == {"corpus", "chosen", "own"} and set(kept["models"]) == {*PARENTS, *CONTROLS} - forced
    assert all(kind["documents"] == 6 for kind in kept["kinds"].values())
    assert not forced & {row["model"] for row in found["tasks"]["rows"]}
    for name, model in kept["models"].items():
        assert model["perplexity"]["corpus"]["value"] > 1
        assert (model["forward_kl"]["value"] == 0) == (name == "instruct")
    often = found["sampling"]
    assert set(often["models"]) == set(PARENTS) and often["problems"] == 4 and often["choices"] == 15
    for model in often["models"].values():
        for what in ("answer", "worked"):
            curve = [row[what]["value"] for row in model["rows"]]
            assert curve == sorted(curve) and len(curve) == 4, "1, 2, 4 and 8 answers"
        assert model["rows"][0]["majority"]["value"] == pytest.approx(model["rows"][0]["answer"]["value"])
    for name, rows_of_one in found["redundancy"].items():
        assert [row["prefix"] for row in rows_of_one] == [*SMOKE.evaluation.prefixes, None]
        for row, known in zip(rows_of_one, found["prefix_redundancy"][name], strict=False):
            assert row["n"] == known["n"]
            assert row["rep4"] == (None if known["rep4"] is None else pytest.approx(known["rep4"]))
    assert {row["a"] for row in found["gains"]} == {*PARENTS, *CONTROLS} - {"instruct"}


@pytest.mark.parametrize(
    ("stage", "models"),
    [("01", {"base"}), ("03", {"coarse"}), ("05", {"instruct"}), ("06", {"fine"}), ("07", {*PARENTS, *CONTROLS})],
)
def test_samples_are_complete(smoke_run, stage, models):
    table = check_samples(next(smoke_run.glob(f"{stage}_*/samples.jsonl")), models)
    kept = {(row["model"], row["decoding"]) for row in table}
    assert all(sum((row["model"], row["decoding"]) == key for row in table) <= 6 for key in kept)
    assert stage != "07" or {decoding for _, decoding in kept} == set(DECODINGS)


@pytest.mark.parametrize("stage", ["01", "03", "04", "05", "06"])
def test_models_are_in_hugging_face_format(smoke_run, stage):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = next(smoke_run.glob("04_*/models/fixed_long-s0" if stage == "04" else f"{stage}_*/model"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "MistralForCausalLM" and len(tokenizer) == model.config.vocab_size
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    ids = tokenizer("question : anna has 7 coins .", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id and model(ids).logits.isfinite().all()
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))


def test_the_reward_model_is_in_hugging_face_format(smoke_run):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(next(smoke_run.glob("02_*/model")))
    assert model.config.num_labels == 1 and model.score.weight.abs().sum() > 0


def test_the_report_holds_every_figure_and_table_in_every_format(smoke_run):
    report = smoke_run / "report"
    for folder, suffixes in (("figures", (".pdf", ".png", ".csv")), ("tables", (".csv", ".md", ".tex"))):
        names = {path.stem for path in (report / folder).iterdir()}
        assert len(names) >= 10
        for name in names:
            long = folder == "tables" and len(pd.read_csv(report / folder / f"{name}.csv")) > LONG
            for suffix in suffixes[:1] if long else suffixes:
                assert (report / folder / f"{name}{suffix}").stat().st_size > 0, name + suffix
    text, page = (report / "report.md").read_text(), (report / "report.html").read_text()
    assert smoke_run.name in text and "<script" not in page
    for figure in (report / "figures").glob("[0-9]*.png"):
        assert figure.stem in text, f"{figure.stem} is drawn but not shown"
    assert str(smoke_run.parent) not in text, "no folder of this machine"
    assert "nothing was learnt, so nothing is concluded" in text and "cannot be told apart" not in text


def test_a_second_run_loads_everything(smoke_run):
    before = timestamps(smoke_run)
    models = {path: path.stat().st_mtime_ns for path in smoke_run.rglob("*.safetensors")}
    # 03 is loaded by the test after the next; all nine by the slow test below.
    finished(smoke_run.parent, "run", "06", "--profile", "smoke", "--run-id", smoke_run.name)
    assert timestamps(smoke_run) == before
    assert {path: path.stat().st_mtime_ns for path in smoke_run.rglob("*.safetensors")} == models


@pytest.mark.study
def test_a_second_run_of_all_notebooks_changes_no_result(smoke_run):
    before = {path: path.read_bytes() for path in smoke_run.glob("*/results.json")}
    stamps = timestamps(smoke_run)
    finished(smoke_run.parent, "run", "all", "--profile", "smoke", "--run-id", smoke_run.name)
    changed = {name for name, stamp in timestamps(smoke_run).items() if stamp != stamps[name]}
    assert changed <= {f"{STAGES[0]}/results.json", f"{STAGES[8]}/results.json"}
    assert {path: path.read_bytes() for path in before} == before


def papermill(folder: str, notebook: str, output: Path, outputs: Path, *parameters: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", notebook, str(output), *parameters]
    return subprocess.run(command, cwd=ROOT / folder, env=surroundings(outputs), capture_output=True, text=True)


@pytest.mark.slow
def test_plain_papermill_runs_03_from_the_root(smoke_run, tmp_path):
    """The run of its own finds its parents by profile and seed."""
    parameters = ("-p", "profile", "smoke", "-p", "run_id", "from-root")
    done = papermill(".", "notebooks/03_coarse_rlhf.ipynb", tmp_path / "o.ipynb", smoke_run.parent, *parameters)
    assert done.returncode == 0, done.stderr
    own = smoke_run.parent / "from-root"
    provenance = json.loads((own / STAGES[3] / "provenance.json").read_text())
    assert set(provenance["parents"].values()) == {smoke_run.name}
    assert (own / STAGES[3] / "results.json").read_bytes() == (smoke_run / STAGES[3] / "results.json").read_bytes()
    shutil.rmtree(own)


@pytest.mark.slow
def test_plain_papermill_runs_03_from_notebooks_and_loads_what_exists(smoke_run, tmp_path):
    before = timestamps(smoke_run)
    parameters = ("-p", "profile", "smoke", "-p", "run_id", smoke_run.name)
    done = papermill("notebooks", "03_coarse_rlhf.ipynb", tmp_path / "o.ipynb", smoke_run.parent, *parameters)
    assert done.returncode == 0, done.stderr
    assert timestamps(smoke_run) == before


def without_parameters(name: str, tmp_path: Path) -> None:
    """Execute a notebook as it lies in the repository, defaults and all; its stage must be done afterwards."""
    command = ["-m", "jupyter", "execute", f"notebooks/{name}.ipynb", "--output", str(tmp_path / f"{name}.ipynb")]
    environment = surroundings(tmp_path / "outputs")
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status = json.loads((tmp_path / "outputs" / "lab" / name / "status.json").read_text())
    assert status["status"] == "done"


@pytest.mark.parametrize("name", [STAGES[0], STAGES[9]])
def test_a_notebook_without_parameters_runs_on_tiny(tmp_path, name):
    without_parameters(name, tmp_path)
    assert (
        json.loads((tmp_path / "outputs" / "lab" / name / "config.json").read_text())["settings"]["profile"] == "tiny"
    )


@pytest.mark.slow
def test_run_all_of_the_first_notebooks_teaches_something(tmp_path):
    for name in STAGES[:4]:
        without_parameters(name, tmp_path)
    curve = results(tmp_path / "outputs" / "lab", "03")["curve"]
    assert curve[-1]["utility"] > curve[0]["utility"] + 1


def test_metrics_named_here_are_those_of_the_evaluation():
    from c2f_utils.domain import samples, stories
    from c2f_utils.measure import answers

    problem = stories.problems("test", 1, 0)
    sample = samples.Sample(samples.make_prompts(problem)[0], [5, 6], "limit", 2)
    assert set(answers.measure([sample])) == set(METRICS)
