"""Promises of the figures: drawn from disk alone, honest about nulls, readable, and saved whole."""

import hashlib
import itertools
import json
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
from fake_results import MODELS, fake_run

from c2f_utils.errors import C2FError
from c2f_utils.report import figures
from c2f_utils.report.labels import point_labels, spread
from c2f_utils.report.results import DECODINGS, target_tokens
from c2f_utils.report.style import DOUBLE, ROLE_COLOURS

STAGE_FIGURES = {
    "loss_curve": "01_base_model",
    "reward_calibration": "02_reward_model",
    "length_bias": "02_reward_model",
    "length_bias_models": "02_reward_model",
    "prefix_reward": "02_reward_model",
    "training_panel": "03_coarse_rlhf",
    "schedule_comparison": "04_length_schedules",
    "tokens_to_target": "04_length_schedules",
    "coefficient_sweep": "06_residue_merging",
    "layer_sweep": "06_residue_merging",
    "operator_table": "06_residue_merging",
    "residue_anatomy": "06_residue_merging",
    "quality_length_frontier": "07_evaluation",
    "quality_redundancy_frontier": "07_evaluation",
    "prefix_redundancy": "07_evaluation",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("hub"), "hub", checker=False)


def words(fig) -> str:
    fig.draw_without_rendering()
    return " ".join(text.get_text() for text in fig.findobj(matplotlib.text.Text) if text.get_visible())


@pytest.mark.parametrize("name", STAGE_FIGURES)
def test_every_figure_is_drawn_from_a_stage_or_the_run_directory_alone(run, name):
    draw, stage = getattr(figures, name), STAGE_FIGURES[name]
    by_stage, by_run = draw(run / stage), draw(run)
    assert isinstance(by_stage, matplotlib.figure.Figure)
    assert len(by_stage.data) and by_stage.data.equals(by_run.data)


@pytest.mark.parametrize("name", STAGE_FIGURES)
def test_a_missing_stage_names_its_notebook(tmp_path, name):
    with pytest.raises(C2FError, match=f"notebooks/{STAGE_FIGURES[name]}.ipynb"):
        getattr(figures, name)(tmp_path / STAGE_FIGURES[name])


@pytest.mark.parametrize("name", STAGE_FIGURES)
def test_empty_results_are_said_in_words(name):
    empty = [] if name == "training_panel" else {}
    said = words(getattr(figures, name)(empty))
    assert "no " in said or "not " in said


@pytest.mark.parametrize(
    "name", ["schedule_comparison", "coefficient_sweep", "operator_table", "quality_length_frontier"]
)
def test_without_the_checker_the_reward_is_drawn_and_the_title_says_why(hub, run, name):
    draw = getattr(figures, name)
    assert "reward: no exact checker" in draw(hub).get_suptitle().replace("\n", " ")
    assert "no exact checker" not in draw(run).get_suptitle().replace("\n", " ")


def test_other_nulls_are_explained_where_the_numbers_would_be(hub):
    assert "exact checker" in words(figures.length_bias(hub))
    assert "loaded,\nnot trained" in words(figures.loss_curve(hub))
    hero = words(figures.hero(hub))
    assert "Reward before and after" in hero and "no exact checker" in hero


def test_the_picture_of_the_readme_says_what_is_missing(tmp_path, run):
    said = words(figures.hero(fake_run(tmp_path, skip=("03_coarse_rlhf", "07_evaluation"))))
    assert "notebooks/03_coarse_rlhf.ipynb" in said and said.count("notebooks/07_evaluation.ipynb") == 2
    assert "not run yet" not in words(figures.hero(run))
    lent = {stage: run / stage for stage in ("03_coarse_rlhf", "07_evaluation")}
    assert words(figures.hero(lent)) == words(figures.hero(run))


@pytest.mark.parametrize("name", ["quality_length_frontier", "quality_redundancy_frontier"])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_names_of_models_do_not_overlap_and_stay_inside(run, name, decoding):
    fig = getattr(figures, name)(run, decoding=decoding)
    fig.draw_without_rendering()
    names = set(fig.data["label"])
    texts = [text for text in fig.axes[0].texts if text.get_text() in names]
    assert len(texts) == len(names) == 10
    # The extent of an annotation includes its leader line: compare the words alone.
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in texts]
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    outer = fig.bbox
    assert all(outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1 for box in boxes)


def random_models(seed: int) -> dict:
    """Results of 07 with ten models whose points are scattered, in bunches or alike, as the draw has it."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform((15, 0.1, 0), (160, 0.95, 0.5), (3, 3))
    models = {}
    for name, (label, role, *_) in MODELS.items():
        spread = rng.choice([0.01, 0.08, 0.4]) * np.array((40, 0.3, 0.1))
        length, last, repeated = np.abs(centres[rng.integers(3)] + spread * rng.normal(size=3))
        first = last + rng.choice([0, 0.02, 0.2]) * rng.normal()
        row = {"mean_tokens": length, "accuracy_last": min(1, last), "accuracy_first": np.clip(first, 0, 1)}
        row = {key: float(value) for key, value in (row | {"rep4": repeated}).items()}
        models[name] = {"label": label, "role": role, "sampled_t1": row}
    return {"models": models}


def check_labels(fig, ax, found: dict, across: str) -> None:
    """Every name is beside a marker of its own model, or a line leads from it to one; no two names overlap."""
    fig.draw_without_rendering()
    rows = {model["label"]: model["sampled_t1"] for model in found["models"].values()}
    texts = [text for text in ax.texts if text.get_text() in rows]
    assert len(texts) == len(rows)
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    kinds = ("accuracy_last", "accuracy_first")
    places = [(row[across], row[kind]) for row in rows.values() for kind in kinds]
    owner = np.repeat(list(rows), len(kinds))
    points = 72 / fig.dpi
    markers = ax.transData.transform(places) * points
    for text, box in zip(texts, boxes, strict=True):
        name = text.get_text()
        mine = ax.transData.transform(text.xy) * points
        if text.arrow_patch is None:
            low, high = box.min * points, box.max * points
            near = np.hypot(*np.maximum(0, np.maximum(low - markers, markers - high)).T)
            assert near[owner == name].min() < near[owner != name].min(), f"{name} stands beside another's marker"
        else:
            line = text.arrow_patch.get_transform().transform(text.arrow_patch.get_path().vertices) * points
            start, end = line[0], line[-1]
            assert np.hypot(*(end - mine)) < 3 < np.hypot(*(start - end)), f"no line is seen from {name} to its marker"
            others = markers[(owner != name) & (np.hypot(*(markers - mine).T) > 4)]
            share = np.clip((others - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
            passed = np.hypot(*(others - start - share[:, None] * (end - start)).T)
            assert passed.min(initial=np.inf) > 2, f"the line of {name} passes another's marker"


@pytest.mark.parametrize("seed", range(50))
def test_in_any_frontier_a_name_leads_to_its_own_marker_and_none_overlap(seed):
    found = random_models(seed)
    fig = (figures.quality_length_frontier if seed % 2 else figures.quality_redundancy_frontier)(found)
    check_labels(fig, fig.axes[0], found, "mean_tokens" if seed % 2 else "rep4")


@pytest.mark.parametrize("seed", range(50, 56))
def test_in_the_narrow_frontier_of_the_readme_as_well(tmp_path, seed):
    found = random_models(seed)
    (tmp_path / "07_evaluation").mkdir()
    (tmp_path / "07_evaluation" / "results.json").write_text(json.dumps(found))
    fig = figures.hero(tmp_path)
    check_labels(fig, fig.axes[3], found, "mean_tokens")


def test_names_of_points_on_one_spot_still_do_not_overlap():
    fig = matplotlib.figure.Figure(figsize=(4, 3))
    ax = fig.subplots()
    spots = [(0.5 + 0.001 * k, 0.5) for k in range(9)]
    ax.plot(*zip(*spots, strict=True), "o")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    texts = point_labels(ax, spots, [f"control number {k}" for k in range(9)], ["k"] * 9)
    fig.draw_without_rendering()
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_spread_keeps_order_and_gap_and_moves_nothing_without_need():
    assert spread([0.0, 10.0, 30.0], 8) == [0.0, 10.0, 30.0]
    moved = spread([5.0, 5.0, 5.0, 40.0], 8)
    assert np.diff(moved).min() >= 8 - 1e-9 and np.mean(moved[:3]) == pytest.approx(5.0) and moved[3] == 40.0


def test_saving_writes_pdf_png_and_the_numbers_and_twice_gives_the_same_bytes(run, tmp_path):
    stage = tmp_path / "demo" / "03_coarse_rlhf"
    stage.mkdir(parents=True)

    def digest() -> dict:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (stage / "figures").iterdir()}

    fig = figures.save_figure(figures.training_panel(run), stage, "panel")
    first = digest()
    assert sorted(first) == ["panel.csv", "panel.pdf", "panel.png"]
    figures.save_figure(fig, stage, "panel")
    assert digest() == first, "saving again must not add a second caption or a time stamp"
    assert len(pd.read_csv(stage / "figures" / "panel.csv")) == 17
    captions = [text.get_text() for text in fig.texts if text.get_gid() == "caption"]
    assert captions == ["run demo · 03_coarse_rlhf"]
    image = matplotlib.image.imread(stage / "figures" / "panel.png")
    assert image.shape[1] == round(DOUBLE * 200)


def test_a_folder_that_cannot_be_written_is_named(run, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(C2FError, match="cannot write"):
        figures.save_figure(figures.prefix_reward(run), blocked / "figures", "x")


def test_drawing_leaves_the_settings_of_the_notebook_alone_and_ignores_them(run):
    with matplotlib.rc_context({"font.size": 30.0, "axes.grid": False}):
        fig = figures.prefix_reward(run)
        assert matplotlib.rcParams["font.size"] == 30.0
    assert fig.axes[0].xaxis.label.get_fontsize() == 7.5


def test_text_from_data_is_never_read_as_mathematics(run):
    results = json.loads((run / "07_evaluation" / "results.json").read_text())
    results["models"]["fine"]["label"] = "costs $5 or \\frac $"
    assert "costs $5" in words(figures.quality_length_frontier(results))


def test_tokens_to_target_interpolates_and_says_when_a_seed_never_gets_there():
    def seed(utility, tokens=(10, 20, 30)):
        rows = [{"utility": u, "rollout_tokens": t} for u, t in zip(utility, tokens, strict=True)]
        return {"curve": rows, "rollout_tokens": tokens[-1], "limits": [1, 1, 1]}

    laws = {
        "fixed_long": {"label": "long", "seeds": {"0": seed((0, 1, 2)), "1": seed((0, 1, 2))}},
        "logistic": {"label": "log", "seeds": {"0": seed((0, 2, 3)), "1": seed((0, 0.5, 1))}},
    }
    frame = target_tokens(laws, "utility", 0.5).set_index(["law", "seed"])["tokens"]
    assert frame["fixed_long", "0"] == 20 and frame["logistic", "0"] == pytest.approx(15)
    assert frame["logistic", "1"] == 30
    assert np.isnan(target_tokens(laws, "utility", 0.9).set_index(["law", "seed"])["tokens"]["logistic", "1"])
    del laws["fixed_long"]
    assert target_tokens(laws, "utility", 0.9)["tokens"].isna().all()
    assert "fixed-long was not run" in words(figures.tokens_to_target({"laws": laws}))


def test_a_law_stopped_before_its_first_snapshot_is_left_out(run):
    results = json.loads((run / "04_length_schedules" / "results.json").read_text())
    results["laws"]["fixed_short"]["seeds"] = {}
    results["laws"]["logistic"]["seeds"]["0"] |= {"curve": []}
    assert set(figures.schedule_comparison(results).data["law"]) == {"fixed_long", "clock_linear", "logistic"}
    assert len(figures.tokens_to_target(results).data) == 2 * (3 + 3 + 2)


def test_a_prefix_that_only_a_handful_of_answers_reach_is_not_drawn(run):
    results = json.loads((run / "07_evaluation" / "results.json").read_text())
    found = results["prefix_redundancy"]
    found["instruct"] = [{"prefix": 32, "rep4": 0.1, "n": 81}, {"prefix": 64, "rep4": 0.9, "n": 3}]
    said = words(figures.prefix_redundancy(results))
    assert "Instruct (n 81)" in said and "fewer than 10" in said
    results["prefix_redundancy"] = {"instruct": found["instruct"][1:]}
    assert "no prefix was reached by at least 10 answers" in words(figures.prefix_redundancy(results))


def test_the_chosen_operator_is_the_only_green_one(run):
    colours = figures.operator_table(run).axes[0].collections[1].get_facecolors()
    green = [matplotlib.colors.to_hex(colour) == ROLE_COLOURS["fine"] for colour in colours]
    assert green == [True, False, False, False, False]


def test_a_single_seed_is_called_one_seed(run):
    results = json.loads((run / "04_length_schedules" / "results.json").read_text())
    assert "each of 3 seeds" in words(figures.schedule_comparison(results))
    for law in results["laws"].values():
        law["seeds"] = {"0": law["seeds"]["0"]}
    assert "one seed" in words(figures.schedule_comparison(results))


def test_seed_overview_shows_every_run(run, hub):
    results = [json.loads((run / "07_evaluation" / "results.json").read_text())] * 2
    fig = figures.seed_overview(results, ["s11", "s12"])
    assert set(fig.data["run"]) == {"s11", "s12"} and len(fig.data) == 2 * 10 * 4
    assert fig.caption == "runs s11, s12"


def test_drawing_needs_neither_torch_nor_pyplot():
    code = (
        "import sys, c2f_utils.report.figures\nsys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
