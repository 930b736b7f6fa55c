"""Promises of the report: whole, honest about gaps, escaped, and made from results files alone."""

import hashlib
import html.parser
import json
import re
import subprocess
import sys
from urllib.parse import unquote

import pandas as pd
import pytest
from fake_results import STAGES, fake_run
from matplotlib.figure import Figure

from c2f_utils.errors import C2FError
from c2f_utils.report import build, first_page, results, sources, style, tables, verdicts
from c2f_utils.report.document import Document, to_html, to_markdown
from c2f_utils.report.tables import LONG

PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\x00\x1f\x15\xc4\x89"
    b"\x00\x00\x00\rIDATx\x9cc\xf8\xff\xff?\x00\x05\xfe\x02\xfe\xdc\xccY\xe7\x00\x00\x00\x00IEND\xaeB`\x82"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(style.STYLE, "pdf.fonttype", 3)  # twice as fast; the real type is tested on one figure
        return build.build(run, tmp_path_factory.mktemp("out") / "report").parent


@pytest.fixture
def unpainted(monkeypatch):
    """Figures are still drawn, but not turned into files: that is tested once, in `whole`."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(PNG))


@pytest.fixture
def undrawn(monkeypatch):
    """For promises about words and files: figures are neither drawn nor painted (a private seam: drawing all of them
    takes longer than everything that these tests ask)."""

    def figure(self, name, draw, caption):
        for kind in ("pdf", "png", "csv"):
            style.write_bytes(self.out / "figures" / f"{name}.{kind}", PNG)
            self.written.append(f"figures/{name}.{kind}")
        self.document.figure(name, caption)

    monkeypatch.setattr(build._Builder, "_figure", figure)


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.sources, self.words, self.marked, self._mark = [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._mark |= tag == "mark"
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        self._mark &= tag != "mark"

    def handle_data(self, data):
        self.words.append(data)
        if self._mark:
            self.marked.append(data)


def test_a_finished_run_gives_every_figure_and_table_and_misses_nothing(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["missing"] == []
    assert "Nothing: every stage has been run" in (whole / "report.md").read_text()
    names = {path.stem for path in (whole / "figures").glob("*.png")}
    assert {
        "hero",
        "01_loss",
        "02_calibration",
        "02_length_bias",
        "02_prefix_reward",
        "02_bias_models",
        "03_training",
        "04_schedules",
    } <= names
    assert {"04_tokens_to_target", "06_coefficients", "06_layers", "06_operators", "06_anatomy", "07_prefixes"} <= names
    assert {f"07_{kind}_{way}" for kind in ("length", "redundancy") for way in results.DECODINGS} <= names
    tables = {path.stem for path in (whole / "tables").glob("*.csv")}
    assert {"runs", "models_summary", "04_laws", "06_sweep", "07_models_greedy", "07_paired", "timings"} <= tables


def test_the_manifest_lists_every_file_with_its_hash_and_the_results_behind_them(whole, run):
    manifest = json.loads((whole / "manifest.json").read_text())
    on_disk = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == on_disk
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((whole / name).read_bytes()).hexdigest() == digest
    for kind in ("figures", "tables"):
        ends = {"figures": (".pdf", ".png", ".csv"), "tables": (".csv", ".md", ".tex")}[kind]
        stems = {name.rsplit(".", 1)[0] for name in on_disk if name.startswith(kind)}
        long = {stem for stem in stems if kind == "tables" and len(pd.read_csv(whole / f"{stem}.csv")) > LONG}
        assert {"tables/07_paired"} <= long or kind == "figures"
        assert on_disk >= {stem + end for stem in stems - long for end in ends}
        assert not on_disk & {stem + end for stem in long for end in ends[1:]}
    assert set(manifest["results"]["demo"]) == set(STAGES)


def test_the_html_needs_no_other_file_and_the_markdown_only_files_that_exist(whole):
    page = Page((whole / "report.html").read_text())
    pictures = [source for source in page.sources if source.startswith("data:")]
    assert pictures and all(source.startswith("data:image/png;base64,") for source in pictures)
    files = {unquote(source) for source in page.sources if not source.startswith(("data:", "#"))}
    kept = {str(path.relative_to(whole)) for path in whole.rglob("*.*") if path.parent != whole}
    assert files == kept, "every file behind a figure or table is linked, and nothing else"
    assert "script" not in page.tags and "link" not in page.tags
    text = (whole / "report.md").read_text()
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links and all((whole / unquote(link)).is_file() for link in links if not link.startswith("#"))


def test_the_contents_link_to_every_part_that_follows(whole):
    text = (whole / "report.html").read_text()
    page = Page(text)
    links = [source[1:] for source in page.sources if source.startswith("#")]
    parts = re.findall(r'<h2 id="([\w-]+)">', text)
    assert links == parts[1:] and len(links) > 10, "all but the first page"
    marks = re.findall(r'<a id="([\w-]+)"></a>\n\n## ', (whole / "report.md").read_text())
    assert marks == parts


def first(run, **changes) -> list[str]:
    stages = sources.find_stages(run)
    found = {name: json.loads((path / "results.json").read_text()) for name, path in stages.items()}
    found["07_evaluation"] |= changes
    return first_page.sentences(stages, found)


def test_the_first_page_says_what_was_found_in_at_most_ten_sentences_and_what_it_does_not_show(run):
    evaluated = json.loads((run / "07_evaluation" / "results.json").read_text())
    pairs = [
        row | {"low": -0.3, "high": -0.1, "difference": -0.2}
        for row in evaluated["paired"]
        if row["b"] == "base_forced"
    ]
    lengths = [
        {"a": "fine", "b": "coarse", "metric": "tokens", "decoding": "sampled_t1"}
        | {"difference": -105.0, "low": -110.0, "high": -100.0},
        {"a": "fine", "b": "instruct", "metric": "rep4", "decoding": "sampled_t1"}
        | {"difference": 0.01, "low": -0.01, "high": 0.03},
    ]
    interval = {"value": 1.01, "low": 1.0, "high": 1.02}
    kept = {"kinds": {"own": {"label": "own answers"}}, "models": {"fine": {"ratio": {"own": interval}}}}
    judge = {"name": "reward", "fit": False, "checks": {"repeated": {"passed": False}}}
    said = first(
        run,
        paired=[*pairs, *(row for row in evaluated["paired"] if row["b"] != "base_forced"), *lengths],
        retention=kept,
        dialogue={"judge": judge, "against": {}},
    )
    assert len(re.findall(r"[.](?: [A-Z]|$)", "\n".join(said), re.MULTILINE)) <= 10
    assert said[0].startswith(
        "Better than the Fine Actor on last-answer accuracy: “Base, analysis forced” (difference -0.2"
    )
    text = " ".join(said)
    for words in (
        "-105.0 (95 % interval -110.0 to -100.0)",
        "+0.030), cannot be told apart",
        "own answers 1.010 (95 %",
    ):
        assert words in text
    assert "may not be believed" in text and "One training seed (0) and 256 test prompts" in text
    assert "limited to small models" in said[-1]
    assert first_page.sentences({}, {}) == [first_page.NOTHING]


def test_a_dry_run_gets_its_figures_and_no_verdict(tmp_path, undrawn):
    run = fake_run(tmp_path)
    for path in run.glob("*/config.json"):
        path.write_text(path.read_text().replace('"tiny"', '"smoke"'))
    text = (build.build(run, tmp_path / "report").parent / "report.md").read_text()
    assert text.count("nothing was learnt, so nothing is concluded") == 1 == build.overview(run).count(verdicts.DRY)
    assert not re.search(r"better|rambles|cannot be told|Length and redundancy", text.split("## What is the paper")[0])
    assert "rambles" not in text and "optimum" not in text and "07_models_greedy" in text


def test_the_report_names_runs_seeds_commit_versions_threads_time_and_memory(whole):
    text = (whole / "report.md").read_text()
    for words in ("demo", "0123456789", "torch 2.13.0", "python 3.11.9", "| 970 |", "188 s of wall time", "tiny"):
        assert words in text
    header = next(line for line in text.splitlines() if line.startswith("| run | stage"))
    assert all(name in header for name in ("profile", "seed", "commit", "threads", "device"))
    for title in (
        "What is the paper's and what is ours",
        "What this does not show",
        "What is missing",
        "Time and memory",
    ):
        assert f"## {title}" in text
    assert text.index("## 00 ") < text.index("## 03 ") < text.index("## 07 ")


def test_repeated_words_are_marked_in_the_html(whole):
    page = Page((whole / "report.html").read_text())
    assert page.marked and all("let us think" in part or "start with 7" in part for part in page.marked)


def test_the_same_results_give_the_same_report(run, tmp_path, undrawn):
    first = build.build(run, tmp_path / "a").parent
    second = build.build(run, tmp_path / "b").parent
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def test_what_is_missing_is_named_with_its_notebook(tmp_path, undrawn):
    run = fake_run(tmp_path, skip=("04_length_schedules", "07_evaluation"))
    out = build.build(run, tmp_path / "report").parent
    text = (out / "report.md").read_text()
    missing = json.loads((out / "manifest.json").read_text())["missing"]
    assert [line.split(":")[0] for line in missing] == ["04_length_schedules", "07_evaluation"]
    assert all(f"notebooks/{line.split(':')[0]}.ipynb" in line for line in missing)
    assert text.count("Not run yet: notebooks/") == 2 and "## 07 Evaluation" in text
    settings = json.loads((run / "03_coarse_rlhf" / "config.json").read_text())["settings"]
    asked = f"c2f run 04 --profile {settings['profile']} --seed {settings['seed']} --run-id {run.name}"
    assert asked in missing[0], "as it stands, it continues this run"


def test_a_run_without_any_result_is_refused_with_the_next_step(tmp_path):
    with pytest.raises(C2FError, match="c2f run all"):
        build.build(tmp_path / "nothing", tmp_path / "report")


def test_an_unfinished_stage_and_its_alarms_are_called_that(tmp_path, undrawn):
    run = fake_run(tmp_path)
    path = run / "03_coarse_rlhf" / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "stopped", "alarms": ["KL 14.2 > 10"]}))
    text = (build.build(run, tmp_path / "report").parent / "report.md").read_text()
    assert "This stage is stopped, not done" in text and "KL 14.2" in text
    assert "03_coarse_rlhf: stopped, not done" in text


@pytest.mark.slow
def test_a_damaged_result_costs_its_figure_only_and_is_named(tmp_path, unpainted):
    run = fake_run(tmp_path)
    path = run / "06_residue_merging" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sweep": [{"score": 1}], "anatomy": None}))
    out = build.build(run, tmp_path / "report").parent
    missing = json.loads((out / "manifest.json").read_text())["missing"]
    assert any("figure 06_coefficients: could not be made (not as expected: KeyError" in line for line in missing)
    assert (out / "figures" / "06_operators.png").is_file()


@pytest.mark.parametrize("content", [b"[1]", b'{"cut": ', b"\xff"])
def test_a_damaged_file_of_any_kind_is_named_and_the_rest_is_reported(tmp_path, undrawn, content):
    run = fake_run(tmp_path, skip=("02_reward_model", "04_length_schedules", "06_residue_merging"))
    for stage, file in (
        ("01_base_model", "results.json"),
        ("03_coarse_rlhf", "status.json"),
        ("05_instruction_model", "provenance.json"),
        ("05_instruction_model", "timings.json"),
        ("07_evaluation", "config.json"),
        ("07_evaluation", "samples.jsonl"),
    ):
        (run / stage / file).write_bytes(content)
    out = build.build(run, tmp_path / "report").parent
    missing = json.loads((out / "manifest.json").read_text())["missing"]
    assert "01_base_model: results.json is damaged; run it again" in missing
    for line in ("03_coarse_rlhf: status.json", "05_instruction_model: provenance.json", "07_evaluation: config.json"):
        assert f"{line} is damaged" in missing
    assert "Fine Actor" in (out / "report.md").read_text()
    assert "Fine Actor" in build.overview(run) and "results.json is damaged" in build.overview(run)


def test_a_clock_that_was_set_back_gives_no_negative_time(tmp_path):
    path = fake_run(tmp_path) / "01_base_model" / "status.json"
    status = json.loads(path.read_text())
    path.write_text(json.dumps(status | {"started": status["finished"], "finished": status["started"]}))
    assert tables.timings_table(tmp_path / "demo").set_index("stage").loc["01_base_model", "wall_s"] == 0


@pytest.mark.slow
def test_hub_data_show_rewards_and_say_why(tmp_path, unpainted):
    run = fake_run(tmp_path, "hub", checker=False)
    text = (build.build(run, tmp_path / "report").parent / "report.md").read_text()
    assert "exact checker knows only the embedded domain" in text.split("## What is missing")[1]
    assert "Accuracy is not available" in text and "could not be made" not in text


def test_several_runs_are_shown_each_with_mean_and_interval(tmp_path, undrawn):
    runs = [fake_run(tmp_path, f"s{seed}", seed) for seed in (11, 12, 13)]
    out = build.build(runs[0], tmp_path / "report", runs=["s11", runs[1], str(runs[2]), "absent"]).parent
    text = (out / "report.md").read_text()
    assert "s11 (seed 11), s12 (seed 12), s13 (seed 13)" in text
    assert "rows are in the file only" in text and "3 training seeds (11, 12, 13)" in text
    header = (out / "tables" / "runs_greedy.csv").read_text().splitlines()[0]
    assert header == "model,metric,s11,s12,s13,mean,low,high"
    row = next(line for line in (out / "tables" / "runs_means_greedy.md").read_text().splitlines() if "Fine" in line)
    assert row.count("[") == 9
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["runs"] == ["s11", "s12", "s13"] and manifest["missing"] == ["run absent: no results in absent"]
    assert "share a seed" not in text


def test_copies_of_one_seed_are_not_passed_off_as_seeds(tmp_path, undrawn):
    runs = [fake_run(tmp_path, name, 5) for name in ("a", "b")]
    text = (build.build(runs[0], tmp_path / "report", runs=runs).parent / "report.md").read_text()
    assert "some runs share a seed" in text


def test_stages_lent_by_another_run_are_found_and_named(tmp_path, undrawn):
    fake_run(tmp_path, "lab")
    run = fake_run(tmp_path, "mine", skip=("01_base_model", "03_coarse_rlhf"))
    path = run / "07_evaluation" / "provenance.json"
    lent = {"01_base_model": "lab", "03_coarse_rlhf": "lab"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parents": lent}))
    out = build.build(run, tmp_path / "report").parent
    text = (out / "report.md").read_text()
    assert "03_coarse_rlhf comes from run lab" in text
    assert json.loads((out / "manifest.json").read_text())["missing"] == []


def test_files_of_an_earlier_report_that_are_no_longer_made_go_and_others_stay(tmp_path, undrawn):
    run = fake_run(tmp_path)
    out = build.build(run, tmp_path / "report").parent
    (out / "figures" / "mine.png").write_bytes(PNG)
    (run / "04_length_schedules" / "results.json").unlink()
    build.build(run, out)
    assert not (out / "figures" / "04_schedules.png").exists() and (out / "figures" / "mine.png").exists()


def test_text_of_models_and_data_never_becomes_markup(tmp_path):
    evil = "</pre><script>alert(1)</script> <img src=x onerror=y> ```\n# head | cell | [l](javascript:x)"
    doc = Document(evil)
    doc.heading(evil)
    doc.text(evil)
    doc.bullets([evil])
    doc.code(evil)
    doc.answers(evil, [(evil, [(evil, True), ("end", False)])])
    page = Page(to_html(doc, tmp_path))
    assert not {"script", "img", "a"} & set(page.tags) and page.tags.count("mark") == 1
    assert not page.sources and any("alert(1)" in words for words in page.words)
    text = to_markdown(doc)
    fenced = text.split("````text")
    assert "<script>" not in fenced[0].replace("\\<script\\>", "") and len(fenced) == 5 - 1
    assert "\\[l\\](javascript:x)" in text


def test_the_overview_has_the_models_the_sentences_and_what_is_missing(run, tmp_path):
    text = build.overview(run)
    assert re.search(r"\[[−\d.]+,\u00a0", text) and not re.search(r"\[[−\d.]+, ", text), "no line ends in an interval"
    assert "| Fine Actor |" in text and "**Length laws**" in text and "rambles" in text and "Not run yet" not in text
    partial = build.overview(fake_run(tmp_path, skip=("07_evaluation",)))
    assert "Not run yet: notebooks/07_evaluation.ipynb." in partial and "| Fine Actor |" not in partial
    assert "notebooks/01_base_model.ipynb" in build.overview(tmp_path / "nothing")


def test_the_report_needs_no_torch():
    code = (
        "import sys, c2f_utils.report; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'trl')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
