"""Figures are fit for a paper: legible at their own size, no second axis, no title or stamp in the PDF, and colours
that colour-blind readers tell apart."""

import itertools
import json
import re

import matplotlib
import numpy as np
import pytest
from fake_results import fake_run

from c2f_utils.report import against, contents, figures, sources
from c2f_utils.report.figures_forest import forest, seed_forest
from c2f_utils.report.style import _MORE_COLOURS, DOUBLE, LAW_COLOURS, ROLE_COLOURS, SMALLEST, save_figure


@pytest.fixture(scope="module", params=[True, False], ids=["checker", "reward only"])
def drawn(request, tmp_path_factory) -> dict:
    """Every figure of a report by key."""
    run = fake_run(tmp_path_factory.mktemp("run"), checker=request.param)
    stages = sources.find_stages(run)
    results = {name: json.loads((path / "results.json").read_text()) for name, path in stages.items()}
    found = {"hero": figures.hero(run)}
    for name, place in stages.items():
        found |= {f"{name[:2]}_{key}": draw() for key, draw, _ in contents.figures_of(name, place, results)}
    return found


def test_nothing_is_smaller_than_seven_points_and_nothing_wider_than_two_columns(drawn):
    for name, fig in drawn.items():
        assert fig.get_size_inches()[0] <= DOUBLE + 0.01, name
        fig.draw_without_rendering()
        texts = [text for text in fig.findobj(matplotlib.text.Text) if text.get_text().strip() and text.get_visible()]
        assert texts, name
        small = [t.get_text() for t in texts if t.get_fontsize() < SMALLEST and t.get_gid() != "caption"]
        assert not small, (name, small)


def test_no_axes_lie_on_top_of_others(drawn):
    for name, fig in drawn.items():
        boxes = [ax.get_position().bounds for ax in fig.axes]
        assert len(set(boxes)) == len(boxes), f"{name} has a second axis"


def test_the_pdf_has_neither_title_nor_stamp_and_its_own_width(drawn, tmp_path):
    fig = drawn["07_forest"]
    title = fig.get_suptitle()
    save_figure(fig, tmp_path / "figures", "forest")
    pdf = (tmp_path / "figures" / "forest.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ ?([\d. ]+)\]", pdf)
    width, height = [float(number) for number in box.group(1).split()][2:]
    assert title and width == pytest.approx(72 * fig.get_size_inches()[0], abs=0.5)
    assert height < 72 * fig.get_size_inches()[1] - 15
    assert fig._suptitle.get_visible(), "the picture keeps it"


# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as seen without one kind of cone.
_SEEN = {
    "everyone": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def lab(colour: str, seen: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as it is seen."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(_SEEN[seen]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ratio = np.array(to_xyz) @ linear / [0.9505, 1.0, 1.089]
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("seen", _SEEN)
@pytest.mark.parametrize("family", ["roles", "laws"])
def test_colours_of_one_figure_are_told_apart(seen, family):
    colours = ROLE_COLOURS if family == "roles" else LAW_COLOURS
    for (a, one), (b, other) in itertools.combinations(colours.items(), 2):
        assert np.linalg.norm(lab(one, seen) - lab(other, seen)) > 12, (a, b, seen)


def test_no_law_has_the_colour_of_a_role():
    laws = [*LAW_COLOURS.values(), *_MORE_COLOURS]
    assert len(set(laws)) == len(laws)
    for role, one in ROLE_COLOURS.items():
        for other in laws:
            assert np.linalg.norm(lab(one, "everyone") - lab(other, "everyone")) > 12, (role, other)


def test_the_forest_has_every_other_model_and_fills_what_survives_the_correction(tmp_path):
    run = fake_run(tmp_path)
    found = json.loads((run / "07_evaluation" / "results.json").read_text())
    fig = forest(run)
    others = {row["b"] for row in found["paired"] if row["metric"] == "accuracy_last"}
    assert set(fig.data["b"]) == others and len(fig.axes[0].get_yticklabels()) == len(others)
    filled = {row["b"] for row in fig.data.to_dict("records") if row["metric"] == "accuracy_last" and row["clear"]}
    told = {row.other for row in against.comparisons(found) if row.metric == "accuracy_last" and row.p_holm <= 0.05}
    assert filled == told and filled != others, "the figure and the sentences agree"
    ps = {row["b"]: row["p"] for row in found["paired"] if row["metric"] == "rep4"}
    filled = {row["b"] for row in fig.data.to_dict("records") if row["metric"] == "rep4" and row["clear"]}
    assert filled == {name for name, p in ps.items() if p * len(ps) <= 0.05}


def test_what_the_sentences_correct_away_the_forest_does_not_fill(tmp_path):
    found = json.loads((fake_run(tmp_path) / "07_evaluation" / "results.json").read_text())
    mine = [row for row in found["paired"] if row["decoding"] == "sampled_t1" and row["metric"].startswith("accuracy")]
    count = sum(row["metric"] == "accuracy_last" for row in mine)
    for row in mine:  # clear among the last answers alone, not among last and first answers
        row["p"] = 0.04 / count if row["metric"] == "accuracy_last" else 0.9
    data = forest(found).data
    assert len(mine) == 2 * count and not data[data["metric"] == "accuracy_last"]["clear"].any()


def test_without_comparisons_the_forest_says_so(tmp_path):
    assert "nothing to compare" in forest({}).axes[0].texts[0].get_text()
    assert "nothing to compare" in forest(tmp_path / "nowhere").axes[0].texts[0].get_text()


def test_a_forest_in_which_nothing_differs_is_drawn_without_a_warning(tmp_path, recwarn):
    found = json.loads((fake_run(tmp_path) / "07_evaluation" / "results.json").read_text())
    for row in found["paired"]:
        row |= {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert not forest(found).data["clear"].any() and not recwarn.list


def test_over_seeds_the_forest_shows_means_of_differences(tmp_path):
    runs = [
        json.loads((fake_run(tmp_path, f"s{s}", s) / "07_evaluation" / "results.json").read_text()) for s in range(3)
    ]
    data = seed_forest(runs, ["s0", "s1", "s2"]).data
    row = data[(data["b"] == "coarse") & (data["metric"] == "accuracy_last")].iloc[0]
    each = [
        r["models"]["fine"]["sampled_t1"]["accuracy_last"] - r["models"]["coarse"]["sampled_t1"]["accuracy_last"]
        for r in runs
    ]
    assert row["difference"] == pytest.approx(np.mean(each)) and row["low"] <= row["difference"] <= row["high"]
