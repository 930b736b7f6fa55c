"""Tables and the figure of what judges pay for: what was measured stands in them, and nothing breaks without it."""

import json

import pytest
from judged_pairs import verdicts

from c2f_utils.measure.bias_panel import panel
from c2f_utils.measure.length_matched import length_matched
from c2f_utils.measure.style_control import style_controlled
from c2f_utils.measure.win_rates import win_rates
from c2f_utils.report import figures_bias, tables_bias, typeset

MADE = {
    "strengths": {"coarse": 0.3, "fine": 0.5, "instruct": 0.0},
    "lengths": {"coarse": 2000, "fine": 60, "instruct": 50},
    "pairs": [("fine", "instruct"), ("coarse", "instruct")], "questions": 60, "length": 0.5, "noise": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    odd = "<b>judge</b> | $x$"
    return verdicts(**MADE, place=0.5, unread=0.05) + verdicts(**MADE, judge=odd, seed=1)


def on_disk(found):
    """What is kept as JSON and read again."""
    return json.loads(json.dumps(found, allow_nan=False))


def test_the_win_rate_table_has_all_three_rates_and_says_why_one_is_missing(rows):
    found = on_disk(win_rates(rows, "instruct", resamples=50))
    frame = tables_bias.win_rate_table(found).set_index(["model", "judge"])
    fine, coarse = frame.loc[("fine", "judge")], frame.loc[("coarse", "judge")]
    (same,) = [row for row in found if (row["model"], row["judge"]) == ("fine", "judge")]
    assert fine["raw"] == same["raw"]["value"] and fine["both orders"] == same["swap_consistent"]["value"]
    for rate in ("raw", "both orders", "length-controlled"):
        assert fine[f"{rate}, low"] <= fine[rate] <= fine[f"{rate}, high"]
    assert coarse.isna()["length-controlled"] and "extrapolation" in coarse["remark"] and coarse["raw"] > 0.5
    assert fine["detectable"] > 0 and coarse["length_ratio"] > 20
    text = typeset.markdown(tables_bias.win_rate_table(found))
    assert "<b>" not in text and text.count("\n") == 6, "a judge's name cannot break the table"


def test_the_panel_agreement_and_style_tables_hold_what_was_found(rows):
    found = on_disk(panel(rows, resamples=50))
    frame = tables_bias.panel_table(found)
    assert len(frame) == 2 * len(tables_bias.FIGURES)
    first = frame[(frame["judge"] == "judge") & frame["figure"].str.startswith("answer shown first")].iloc[0]
    assert first["value"] == found["judges"][0]["first_wins"]["value"] and first["low"] > 0.5
    assert tables_bias.agreement_table(found)["pairs"].tolist() == [found["agreement"][0]["pairs"]]
    style = tables_bias.style_table(on_disk(style_controlled(rows, "instruct", resamples=20)))
    assert set(style["model"]) == {"fine", "coarse"} and len(style) == 4


def test_the_length_matched_table_shows_metrics_or_why_there_are_none():
    sweep = [{"coefficient": c, "mean_tokens": 40 + 60 * c, "score": c} for c in (0.0, 0.5, 1.0)]
    others = {"instruct": {"mean_tokens": 55, "score": 0.1}, "coarse": {"mean_tokens": 300, "score": 0.9}}
    found = on_disk({name: length_matched(sweep, other, ("score",)) for name, other in others.items()})
    frame = tables_bias.length_matched_table(found).set_index("compared with")
    assert frame.loc["instruct", "coefficient"] == pytest.approx(0.25)
    assert frame.loc["instruct", "difference"] == pytest.approx(0.15)
    assert "never 300" in frame.loc["coarse", "remark"]


def test_without_verdicts_tables_are_empty_and_the_figure_says_so():
    for frame in (
        tables_bias.win_rate_table([]), tables_bias.panel_table({}), tables_bias.agreement_table({}),
        tables_bias.style_table([]), tables_bias.length_matched_table({}),
    ):  # fmt: skip
        assert frame.empty and len(frame.columns) > 3
    figures_bias.longer_wins_by_ratio({}).draw_without_rendering()


def test_the_figure_draws_every_judge_with_its_intervals(rows):
    found = on_disk(panel(rows, resamples=50))
    figure = figures_bias.longer_wins_by_ratio(found)
    figure.draw_without_rendering()
    assert figure.data.groupby("judge").size().tolist() == [len(row["by_ratio"]) for row in found["judges"]]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        r["judge"] for r in found["judges"]
    ]
