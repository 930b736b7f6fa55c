"""Promises of the tables: every row, honest nulls, and files that cannot be broken by what is in them."""

import html.parser
import json

import pandas as pd
import pytest
import tex
from fake_results import MODELS, fake_run

from c2f_utils import stats
from c2f_utils.report import against, build, contents, typeset
from c2f_utils.report import tables as t
from c2f_utils.report.letters import in_markdown


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("hub"), "hub", checker=False)


def test_model_table_has_every_model_and_all_metrics(run, hub):
    frame = t.model_table(run, "greedy")
    assert list(frame["model"]) == [label for label, *_ in MODELS.values()]
    assert list(frame.columns) == ["model", "role", *t.MEASURED]
    assert t.model_table(hub)["accuracy_last"].isna().all() and t.model_table(hub)["reward"].notna().all()
    assert t.model_table({}).empty


def test_law_table_shows_each_seed_and_the_mean(run):
    frame = t.law_table(run / "04_length_schedules")
    mine = frame[frame["law"] == "logistic"]
    assert list(mine["seed"]) == ["0", "1", "2", "mean of 3"]
    assert mine["utility"].iloc[3] == pytest.approx(mine["utility"].iloc[:3].astype(float).mean())
    assert 0.5 < mine["of_fixed_long"].iloc[0] < 0.65
    assert not mine["agnostic"].any() and frame[frame["law"] == "linear clock"]["agnostic"].all()
    assert t.law_table({}).empty


def test_a_single_seed_has_no_mean_row(run):
    results = json.loads((run / "04_length_schedules" / "results.json").read_text())
    for law in results["laws"].values():
        law["seeds"] = {"0": law["seeds"]["0"]}
    assert list(t.law_table(results)["seed"]) == ["0"] * 4


def test_length_bias_has_a_row_per_model_and_figure_and_none_for_what_is_not_known(run, hub):
    frame = t.length_bias_table(run).set_index(["model", "figure"])
    assert len(frame) == 4 * 9 and (frame["low"] <= frame["value"]).all() and (frame["value"] <= frame["high"]).all()
    assert frame.loc[("average of 3", "slope given utility"), "value"] == pytest.approx(0.045)
    assert len(t.length_bias_table(hub)) == 4 * 8 and t.length_bias_table({}).empty


def test_the_chosen_row_is_marked_once(run):
    for frame in (t.sweep_table(run), t.operator_table(run)):
        assert list(frame["chosen"]).count(True) == 1
    assert t.sweep_table(run).loc[t.sweep_table(run)["chosen"], "coefficient"].item() == 0.7
    assert len(t.layer_table(run)) == 5


def test_paired_table_corrects_within_a_family():
    pair = {"a": "fine", "metric": "m", "decoding": "d", "difference": 0.1, "low": 0.0, "high": 0.2}
    frame = t.paired_table(
        {"paired": [pair | {"b": "x", "p": 0.02}, pair | {"b": "y", "p": 0.5}, pair | {"b": "z", "p": None}]}
    )
    assert frame["p_holm"].iloc[:2].tolist() == [0.04, 0.5] and pd.isna(frame["p_holm"].iloc[2])


def test_prefix_table_counts_answers_long_enough(run):
    frame = t.prefix_table(run)
    assert len(frame) == 30 and set(frame["prefix"]) == {32, 64, 128}
    assert frame.loc[frame["n"] == 0, "rep4"].isna().all()


def test_timings_table_has_wall_time_memory_and_timers(run, tmp_path):
    frame = t.timings_table(run)
    row = frame[frame["stage"] == "07_evaluation"].iloc[0]
    assert row["wall_s"] == 27 and row["peak_mb"] == 970 and "compute 19.5" in row["timers (s)"]
    (tmp_path / "r" / "03_coarse_rlhf").mkdir(parents=True)
    (tmp_path / "r" / "03_coarse_rlhf.old-1").mkdir()
    running = t.timings_table(tmp_path / "r")
    assert list(running["stage"]) == ["03_coarse_rlhf"] and running["wall_s"].isna().all()


def test_seed_table_gives_each_run_mean_and_interval(run):
    results = json.loads((run / "07_evaluation" / "results.json").read_text())
    other = json.loads(json.dumps(results))
    other["models"]["fine"]["sampled_t1"]["accuracy_last"] = (
        results["models"]["fine"]["sampled_t1"]["accuracy_last"] + 0.1
    )
    frame = t.seed_table([results, other], ["s11", "s12"], "sampled_t1")
    row = frame[(frame["model"] == "Fine Actor") & (frame["metric"] == "accuracy, last")].iloc[0]
    assert row["s12"] - row["s11"] == pytest.approx(0.1) and row["mean"] == pytest.approx((row["s11"] + row["s12"]) / 2)
    assert row["low"] < row["s11"] and row["high"] > row["s12"]
    alone = t.seed_table([results], ["s11"], "sampled_t1")
    assert alone["low"].isna().all()


NASTY = pd.DataFrame(
    {
        "model_name": ["a|b\n<b>c</b>", "50 % & $x_1$ \\frac{1}{2} #1 ~ ^", "_em_ *strong* `code` [l](u)"],
        "accuracy_last": [0.51234, None, 1.0],
        "n": [256, 1, 0],
    }
)


def test_markdown_rows_keep_their_columns_whatever_they_hold():
    lines = typeset.markdown(NASTY).strip().split("\n")
    assert lines[1] == "| --- | ---: | ---: |" and len(lines) == 5
    for line in lines:
        assert line.replace("\\|", "").count("|") == 4
    assert r"a\|b \<b\>c\</b\>" in lines[2] and "0.512" in lines[2]
    assert typeset.DASH in lines[3] and r"\_em\_ \*strong\* \`code\` \[l\](u)" in lines[4]
    assert in_markdown("07_evaluation") == "07_evaluation"


def test_latex_escapes_every_special_character():
    text = typeset.latex(NASTY, "100 % of_all", "x")
    assert r"50 \% \& \$x\_1\$ \textbackslash{}frac\{1\}\{2\} \#1 \textasciitilde{} \textasciicircum{}" in text
    assert r"\begin{tabular}{@{}lrr@{}}" in text and r"\caption{100 \% of\_all}" in text and "model name" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert all(row.replace(r"\&", "").count("&") == 2 for row in body.strip().split("\n"))


def test_html_cells_are_text_not_markup():
    class Tags(html.parser.HTMLParser):
        seen: set = set()

        def handle_starttag(self, tag, attrs):
            self.seen.add(tag)

    Tags().feed(typeset.html(NASTY))
    assert Tags.seen == {"table", "thead", "tbody", "tr", "th", "td"}


def test_saving_writes_three_files_and_the_csv_keeps_full_precision(tmp_path):
    stage = tmp_path / "07_evaluation"
    assert t.save_table(NASTY, stage, "models_t1").equals(NASTY)
    assert sorted(path.name for path in (stage / "tables").iterdir()) == [
        "models_t1.csv",
        "models_t1.md",
        "models_t1.tex",
    ]
    assert pd.read_csv(stage / "tables" / "models_t1.csv")["accuracy_last"][0] == 0.51234
    assert r"\label{tab:models-t1}" in (stage / "tables" / "models_t1.tex").read_text()


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("mean_tokens", 54.123, "54.1"), ("coefficient", 0.7, "0.7"), ("n", 256.0, "256"), ("rep4", 0.0, "0"),
        ("rep4", 0.041234, "0.0412"), ("rollout_tokens", 80928, "80,928"), ("x", 12345.6, "12,346"),
        ("x", -0.5, "−0.500"),
        ("p", 0.0002, "<0.001"), ("p_holm", 0.349, "0.349"), ("metric", "accuracy_last", "accuracy, last"),
        ("x", float("nan"), typeset.DASH), ("x", None, typeset.DASH), ("x", True, "yes"), ("x", 3, "3"),
    ],
)  # fmt: skip
def test_rounding_by_column(column, value, shown):
    assert typeset.cell(column, value) == shown


def test_a_value_and_its_bounds_are_one_cell_whatever_the_bounds_are_called():
    frame = pd.DataFrame({
        "a": ["x", "y"], "value": [0.6912, 158.9], "low": [0.632, 152.1], "high": [0.745, 166.3],
        "raw": [0.5, None], "raw, low": [None, None], "raw, high": [None, None], "below": [1, 2],
    })  # fmt: skip
    shown = typeset.shown(frame)
    assert shown.headings == ["a", "value", "raw", "below"] and shown.numeric == [False, True, True, True]
    assert shown.cells == [["x", "0.691 [0.632, 0.745]", "0.500", "1"], ["y", "159 [152, 166]", typeset.DASH, "2"]]
    assert typeset.escape_latex(typeset.BRACKETS) in typeset.latex(
        frame, "Words."
    ) and typeset.BRACKETS in typeset.note(frame)


def models(values: dict[str, float], paired: tuple = (), intervals: dict | None = None, metric: str = "accuracy_last"):
    rows = {name: {"label": name, "sampled_t1": {metric: value, "n": 100}} for name, value in values.items()}
    results = {"models": rows, "paired": list(paired), "intervals": intervals or {}}
    return against.with_intervals(t.model_table(results), results, "sampled_t1")


def test_the_best_is_bold_only_where_it_is_best_beyond_its_interval():
    def fine(low, high):
        return {"a": "fine", "b": "x", "metric": "accuracy_last", "decoding": "sampled_t1", "difference": 0.1} | {
            "low": low, "high": high,
        }  # fmt: skip

    assert models({"fine": 0.9, "x": 0.3}).attrs["best"] == {(0, "accuracy_last")}, "intervals do not overlap"
    assert models({"fine": 0.6, "x": 0.5}).attrs["best"] == set(), "they do"
    assert models({"fine": 0.6, "x": 0.5}, [fine(0.02, 0.18)]).attrs["best"] == {(0, "accuracy_last")}, "paired"
    assert models({"fine": 0.9, "x": 0.3}, [fine(-0.1, 0.3)]).attrs["best"] == set(), "paired counts, overlap does not"
    assert models({"fine": 0.9, "x": 0.9}).attrs["best"] == set() and models({"fine": 0.9}).attrs["best"] == set()
    shown = typeset.markdown(models({"fine": 0.9, "x": 0.3}))
    assert shown.count("**") == 2 and "**0.900" in shown
    assert typeset.latex(models({"fine": 0.9, "x": 0.3})).count(r"\textbf{0.900 [") == 1


def test_intervals_of_07_are_taken_where_there_are_any_and_wilsons_of_shares_otherwise():
    bare = models({"fine": 0.69, "x": 0.5})
    found = stats.wilson(69, 100)
    assert bare["accuracy_last, low"][0] == found.low and bare["accuracy_last, high"][0] == found.high
    assert "Wilson" in bare.attrs["note"]
    recorded = {name: {"sampled_t1": {"rep4": {"value": v, "low": v - 0.1, "high": v + 0.1}}} for name, v in PLAIN}
    frame = models(dict(PLAIN), intervals=recorded, metric="rep4")
    assert frame["rep4, low"][0] == 0.1 and frame.attrs["best"] == {(0, "rep4")}, "less repetition is better"
    assert "Wilson" not in frame.attrs["note"]


def test_shares_of_answers_in_a_sweep_get_their_intervals(run, hub):
    frame = against.shares_with_intervals(t.sweep_table(run))
    row = frame[frame["coefficient"] == 0.7].iloc[0]
    assert (row["accuracy_last, low"], row["accuracy_last, high"]) == tuple(stats.wilson(0.88 * 128, 128)[1:3])
    unchecked = against.shares_with_intervals(t.sweep_table(hub)).columns
    assert "eos_rate, low" in unchecked and "accuracy_last, low" not in unchecked


def test_intervals_stand_below_their_values_in_html_where_a_table_is_wide():
    def table(count):
        columns = [(f"m{k}{end}", [0.5 + shift]) for k in range(count) for end, shift in ENDS]
        return typeset.html(pd.DataFrame({"model": ["<a [b>"]} | dict(columns)))

    assert "<br>" not in table(3) and table(6).count("0.500<br><small>[0.400, 0.600]</small>") == 6
    assert "&lt;a [b&gt;" in table(6)


ENDS = (("", 0), (", low", -0.1), (", high", 0.1))


PLAIN = (("fine", 0.2), ("x", 0.6))


def test_of_a_long_table_only_the_csv_is_written(tmp_path):
    long = pd.DataFrame({"k": range(t.LONG + 1)})
    t.save_table(long[:-1], tmp_path, "sweep")
    t.save_table(long, tmp_path, "sweep")
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["sweep.csv"]


def test_a_wide_table_spans_two_columns_and_a_wider_one_is_continued_below():
    def wide(columns):
        return pd.DataFrame({"model": ["a", "b"]} | {f"quantity {k}": [0.123 * k, 0.2] for k in range(1, columns)})

    one, two, below = (typeset.latex(wide(columns)) for columns in (4, 10, 30))
    assert r"\begin{table}" in one and r"\begin{table*}" in two and r"\begin{table*}" in below
    assert (two.count("tabular}{"), below.count("tabular}{")) == (1, below.count("model")) and below.count("model") > 1


def test_what_is_the_same_in_every_row_is_said_once_in_the_caption():
    frame = pd.DataFrame({"model": ["a", "b", "c"], "n": [256] * 3, "utility": [None] * 3, "rep4": [0.1, 0.2, 0.3]})
    text = typeset.latex(frame, "All models.")
    assert r"\caption{All models. In every row: n 256. Not known: utility.}" in text and "{@{}lr@{}}" in text


HOSTILE = r"""\input{/etc/passwd} $x$ 100 % #1 ~^_{}& <b> "q" `v` \write18 é 你 ⟨U+202E⟩ -- """ + "w" * 150


def test_tex_sets_every_table_within_its_columns(run, tmp_path):
    nasty = pd.DataFrame({"model": [HOSTILE, "b"], "words": ["plain", HOSTILE], "n": [1, 2]})
    t.save_table(nasty, tmp_path, "nasty", HOSTILE)
    for path in run.glob("*/results.json"):
        for key, make, caption in contents.tables_of(path.parent.name, json.loads(path.read_text())):
            if len(frame := make()):
                t.save_table(frame, tmp_path, f"{path.parent.name[:2]}_{key}", caption)
    tex.check(tmp_path / "tables")
    assert r"\begin{table*}" in (tmp_path / "tables" / "07_models_greedy.tex").read_text(), "two columns, not more"
    wide = "\\begin{tabular}{r}" + "x" * 900 + "\\end{tabular}"
    (tmp_path / "tables" / "wide.tex").write_text(f"\\begin{{table}}{wide}\\end{{table}}")
    with pytest.raises(AssertionError, match="Overfull"):
        tex.check(tmp_path / "tables")


@pytest.mark.slow
def test_tex_sets_every_table_of_a_finished_run(smoke_run, tmp_path, monkeypatch):
    monkeypatch.setattr(build._Builder, "_figure", lambda *_: None)
    tex.check(build.build(smoke_run, tmp_path / "report").parent / "tables")
