"""Reading blind, asking, and following a question through training."""

import json
import re

import pytest
from bs4 import BeautifulSoup
from finished_runs import rows

from c2f_utils import stats
from c2f_utils.errors import C2FError
from c2f_utils.notebook import tally, vote
from c2f_utils.runs.run import Run
from c2f_utils.settings.load import load_settings

PROMPTS = [f"prompt {number}" for number in range(6)]


@pytest.fixture
def run(outputs):
    run = Run(load_settings("smoke", run_id="a"))
    kept = [
        {"model": model, "decoding": "sampled_t1", "prompt": prompt, "text": f"{letter}{prompt} <b>", "tokens": 7,
         "stop": "limit", "limit": 50, "reward": 0.123, "utility": 4.5, "correct_steps": 2}
        for model, letter in (("fine", "F"), ("instruct", "I"), ("base", "B")) for prompt in PROMPTS
    ]  # fmt: skip
    path = run.dir / "07_evaluation" / "samples.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return run


def read(view) -> tuple[str, str, str]:
    """The prompt and the texts of A and B."""
    page = BeautifulSoup(view._repr_html_(), "html.parser")
    return page.find("b").get_text(), *(cell.get_text() for cell in page.find_all("td"))


def test_a_pair_gives_no_model_away(run):
    view = vote(run)
    page = view._repr_html_()
    prompt, a, b = read(view)
    assert prompt in PROMPTS and {a, b} == {f"F{prompt} <b>", f"I{prompt} <b>"}
    assert not re.search(r"fine|instruct|token|limit|cut|eos|0\.12|4\.5|steps|border-bottom|<mark", page)
    assert (vote(run).markup, len(vote(run).markup)) == (view.markup, len(view.markup)), "until it is answered"


def test_every_pair_is_seen_once_before_one_comes_again_and_letters_are_mixed(run):
    seen, letters = [], []
    view = vote(run)
    for _ in range(18):
        prompt, a, _b = read(view)
        seen.append(prompt)
        letters.append(a[0])
        view = vote(run, "A")
    assert all(sorted(seen[i : i + 6]) == PROMPTS for i in (0, 6, 12)) and set(letters) == {"F", "I"}
    assert seen[:6] != seen[6:12], "in another order"
    other = [read(vote(run, models=("base", "fine"), seed=5))[0]]
    assert other[0] in PROMPTS and len(rows(run.dir / "07_evaluation" / "votes.jsonl")) == 18


def test_choices_are_kept_with_notes_and_counted_with_an_interval(run):
    view, wanted = vote(run), ["F", "F", "I", "tie"]
    for want in wanted:
        _, a, _b = read(view)
        view = vote(run, "tie" if want == "tie" else "A" if a[0] == want else "B", note=f"<i>{want}")
        assert "preferred" not in view.markup, "a tally between two pairs would say who was A"
    kept = rows(run.dir / "07_evaluation" / "votes.jsonl")
    assert [row["note"] for row in kept] == [f"<i>{want}" for want in wanted] and kept[0]["models"] == [
        "fine",
        "instruct",
    ]
    said = tally(run)
    bounds = stats.wilson(2.5, 4)
    assert "fine 2, instruct 1, tie 1" in said.text and f"{bounds.low:.0%} to {bounds.high:.0%}" in said.text
    assert "&lt;i&gt;F" in said.markup and "No votes" in tally(run, seed=1).markup


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"choice": "A"}, "no pair is shown that waits for 'A'; look first"),
        ({"choice": "C"}, "choice = 'C'; expected one of A, B, tie"),
        ({"models": ("fine", "fine")}, "expected two different ones"),
        ({"models": ("fine", "nobody")}, "models names 'nobody' under sampled_t1; there are fine, instruct, base"),
        ({"decoding": "greedy"}, "has no such answers: run 07 first"),
    ],
)
def test_votes_that_mean_nothing_are_refused(run, arguments, said):
    with pytest.raises(C2FError, match=re.escape(said)):
        vote(run, **arguments)
    assert not (run.dir / "07_evaluation" / "votes.jsonl").exists()


def test_a_vote_on_a_pair_that_was_answered_elsewhere_is_refused(run):
    vote(run)
    path = run.dir / "07_evaluation" / "votes.jsonl"
    vote(run, "A")
    path.write_text("".join(2 * path.read_text()))  # another notebook voted, too
    with pytest.raises(C2FError, match="look first"):
        vote(run, "B")


def test_nothing_happens_without_a_reader(run, monkeypatch):
    monkeypatch.setenv("C2F_HEADLESS", "1")
    assert vote(run) is None and tally(run) is None


# Asking and following


@pytest.fixture
def finished(smoke_run, monkeypatch):
    monkeypatch.setenv("C2F_OUTPUTS", str(smoke_run.parent))
    run = Run(load_settings("smoke", run_id="smoke"))
    run.here = run.stage("07_evaluation")
    run.here.loaded = True
    return run


QUESTION = "question : hana has 9 books . first finds 4 . how many books ?"


def test_a_typed_question_is_answered_by_the_models_that_are_chosen(finished):
    from c2f_utils.stages import reading

    before = sorted((path, path.stat().st_mtime_ns) for path in finished.dir.rglob("*"))
    page = BeautifulSoup(reading.ask(finished, QUESTION, models=("fine", "ppo_instruct", "base")).markup, "html.parser")
    assert [cell.get_text() for cell in page.find_all("th")] == ["fine", "ppo_instruct", "base"]
    assert QUESTION in page.get_text()
    for text, models, said in (
        ("question : who is zorg ?", ("fine",), "'who', 'zorg': no words of the embedded domain"),
        ("</s>", ("fine",), "'</s>': no words"),
        (" ", ("fine",), "the prompt is ' '; expected words"),
        (QUESTION, ("nobody",), "models names 'nobody'; expected some of base, instruct, coarse, fine, "),
        (f"{QUESTION} " * 300, ("fine",), "positions"),
    ):
        with pytest.raises(C2FError, match=re.escape(said)):
            reading.ask(finished, text, models=models)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in finished.dir.rglob("*"))


def test_a_test_question_is_followed_through_the_snapshots(finished, monkeypatch):
    from c2f_utils.stages import reading

    page = BeautifulSoup(reading.follow(finished, 2).markup, "html.parser")
    kept = sorted((finished.dir / "03_coarse_rlhf" / "snapshots").iterdir())
    iterations = [0, *(int(path.stem.rpartition("-")[2]) for path in kept)]
    assert [cell.get_text() for cell in page.find_all("th")] == [f"iteration {number}" for number in iterations]
    with pytest.raises(C2FError, match="prompt number 99; expected 0 to"):
        reading.follow(finished, 99)
    monkeypatch.setattr(type(kept[0]), "glob", lambda *_: iter(()))
    assert "kept no snapshots" in reading.follow(finished, 0).markup
