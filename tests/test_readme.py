"""The README keeps what it promises: its length, its paths, its tree and the numbers of its result table."""

import json
import re
from pathlib import Path

import pytest

from c2f_utils.report import riddle_study, tables_laws

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
STUDIES = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
COLUMNS = ("accuracy_last", "accuracy_first", "mean_tokens", "rep4", "eos_rate")
MODELS = {  # as the result tables call them
    "instruct, first words of an analysis forced": "instruct_forced",
    "instruct, analysis forced": "instruct_forced",
    "RLHF from instruct": "ppo_instruct",
    "merge with fixed-long's residue": "fixed_long_residue",
    "**fine actor (the merge)**": "fine",
    "fine actor": "fine",
    "best recipe of all tried": "best_recipe",
    "coarse actor": "coarse",
    "base, analysis forced": "base_forced",
    "instruct": "instruct",
    "interpolation with base, no RL": "interpolation",
    "random residue of equal norm": "random_residue",
    "base": "base",
}
LENGTH = {  # as the study of length calls them
    "growth, cut answers go on (`cut: continue`)": "continued cut",
    "growth, averaged cuts": "averaged cut",
    "growth": "grow 12 %",
    "`useful`": "useful",
    "growth, clip-higher 0.28": "clip-higher",
    "growth, soft overlong punishment": "soft overlong",
    "shrinking clock": "shrinking clock",
    "dual price from the largest limit": "dual price",
    "fixed-long": "fixed long",
    "growth, masked cuts": "masked cut",
}
RIDDLES = ((riddle_study.arms_table, "model"), (riddle_study.differences_table, "fine minus"))
RIDDLE_NAMES = {"**fine actor (the merge)**": "fine actor"}


@pytest.fixture(scope="module")
def found() -> dict:
    return json.loads((ROOT / "benchmarks/results/tiny_seeds_11_to_15.json").read_text(encoding="utf-8"))


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the table that begins with `heading`, without its first two lines."""
    table = text[text.index(heading) :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in table.splitlines()[2:]]


def test_a_stranger_has_it_read_in_five_minutes():
    assert len(README.split()) <= 1200


@pytest.mark.parametrize("folder, text", [(ROOT, README), (ROOT / "benchmarks", STUDIES)])
def test_every_link_and_every_named_file_leads_somewhere(folder, text):
    links = re.findall(r"\]\(([^)#:]+?)(?:#[\w-]+)?\)", text)
    named = re.findall(r"\b(?:c2f_utils|benchmarks|tests|docs)/[\w/]+\.\w+", text)
    assert links and named
    missing = [path for path in links if not (folder / path).exists()]
    assert not missing + [path for path in named if not (ROOT / path).exists()]


def test_every_notebook_is_in_the_table():
    named = {row[0].strip("`") for row in rows(README, "|notebook|asks|")}
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} <= named


def test_the_tree_has_every_wing_and_every_ground_file():
    tree = README[README.index("## Where things are") :]
    package = ROOT / "c2f_utils"
    wings = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)) == wings
    ground = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(re.findall(r"\b\w+\.py\b", tree)) == ground


def test_every_result_is_the_mean_over_the_committed_seeds(found):
    table = rows(STUDIES, "|model|last answer right")
    assert {MODELS[row[0]] for row in table} == set(found["models"]["11"]) - {"best_recipe"}
    for name, *cells, gap in table:
        for column, cell in zip(COLUMNS, cells, strict=True):
            values = [seed[MODELS[name]][column] for seed in found["models"].values()]
            mean = sum(values) / len(values)
            assert cell == (f"{mean:.0f}" if column == "mean_tokens" else f"{mean:.2f}"), (name, column)
        if MODELS[name] != "fine":
            difference = found["fine_minus"][MODELS[name]]["accuracy_last"]
            assert gap == "{mean:+.2f} ({low:+.2f}, {high:+.2f})".format(**difference), name


def interval(row) -> str:
    value, low, high = (row[f"accuracy_last, riddle{end}"] for end in ("", " low", " high"))
    return f"{value:+.2f} ({low:+.2f}, {high:+.2f})"


def test_every_figure_of_the_riddles_is_the_mean_over_the_committed_seeds():
    study = json.loads((ROOT / "benchmarks/results/riddles.json").read_text(encoding="utf-8"))
    frame, gaps = (table(study).set_index(key) for table, key in RIDDLES)
    table = rows(README, "|model|riddles right")
    assert len(table) == 7
    for name, riddles, stories, tokens, generated, gap in table:
        name = RIDDLE_NAMES.get(name, name)
        row = frame.loc[name]
        shown = [row["accuracy_last, riddle"], row["accuracy_last, story"]]
        assert [riddles, stories] == [f"{value:.2f}" for value in shown], name
        paid = row["rl_tokens"] + row["search_tokens"]
        assert (tokens, generated) == (f"{row['mean_tokens']:.0f}", f"{paid:,.0f}"), name
        assert gap == ("" if name == "fine actor" else interval(gaps.loc[name])), name
    assert f"constant guess gets {riddle_study.floor(study):.2f}" in README


def test_what_others_do_about_length_is_the_mean_over_the_committed_seeds():
    study = json.loads((ROOT / "benchmarks/results/law_rivals.json").read_text(encoding="utf-8"))
    overall, each = tables_laws.arms_overall(study).set_index("arm"), tables_laws.arms_table(study)
    last = each.groupby("arm")[["last utility", "last eos_rate", "last mean_tokens", "iterations"]].mean()
    table = rows(STUDIES, "| arm | difference | p | Holm |")
    assert {LENGTH[row[0]] for row in table} == set(last.index)
    for name, difference, p, p_holm, apart, *ends in table:
        arm = LENGTH[name]
        shown = [f"{value:.{digits}f}" for value, digits in zip(last.loc[arm], (2, 2, 0, 1), strict=True)]
        assert ends == shown, name
        if arm == "grow 12 %":
            continue
        row = overall.loc[arm]
        assert difference == f"{row['difference']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})", name
        assert (p, p_holm) == (f"{row['p']:.2f}", f"{row['p_holm']:.2f}"), name
        assert apart == f"{row['higher']}, {row['lower']}", name


def test_the_table_seed_by_seed_is_the_committed_one(found):
    table = rows(STUDIES, "| model | 11 | 12 | 13 | 14 | 15 |")
    assert {MODELS[row[0]] for row in table} == set(found["models"]["11"])
    for name, *cells, utility in table:
        models = [seed[MODELS[name]] for seed in found["models"].values()]
        assert cells == [f"{model['accuracy_last']:.2f}" for model in models], name
        assert utility == f"{sum(model['utility'] for model in models) / len(models):.2f}", name
