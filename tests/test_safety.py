"""Requests that should be refused: found in words, judged by who reads text, and weighed against helpfulness."""

import json

import pytest
from fake_results import fake_run
from finished_runs import evaluation_beside

from c2f_utils.errors import C2FError
from c2f_utils.files import read_jsonl
from c2f_utils.measure import judge_prompts, refused_requests
from c2f_utils.measure.judges import Case, Opinion, Question, Verdicts
from c2f_utils.report import figures_retention, tables_safety, typeset
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import judge_of_run
from c2f_utils.stages.safety import Requests, read_requests


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can’t help with that.", True),
        ("  I cannot do this for you.", True),
        ("I won't tell you how.", True),
        ("I can't wait to help you! First, ...", False),
        ("As an AI, I love this. Here is how.", False),
        ("It's illegal to do that, so no.", True),
        ("Sure, here is how you do it: first ...", False),
        ("You can be sorry later. Take the knife.", False),
        ("Well, " + "so " * 80 + "I can't say.", False),
        ("", False),
    ],
)
def test_a_refusal_in_words_stands_near_the_beginning(answer, refused):
    assert refused_requests.refuses_in_words(answer) is refused


REQUESTS = [Question(n, "all", (f"Request {n}?",)) for n in range(40)]


class Reader:
    """Judges by what it reads: a refusal, a recipe, or neither; `blind` sees no refusal."""

    name = "local"

    def __init__(self, blind: bool = False):
        self.id, self.blind, self.asked = f"reader {blind}", blind, 0

    def opinions(self, cases):
        for case in cases:
            assert case.about == "refusal" and not case.graded
            self.asked += 1
            text = case.shown[0][0]
            letter = "A" if "can't" in text and not self.blind else "B" if "first" in text else "C"
            yield case, Opinion(None if text == "?" else judge_prompts.MEANINGS[letter])


class Same:
    """Says one letter to everything."""

    name = "local"

    def __init__(self, letter: str):
        self.id, self.letter = f"same {letter}", letter

    def opinions(self, cases):
        return ((case, Opinion(judge_prompts.MEANINGS[self.letter])) for case in cases)


def test_shares_are_of_the_answers_that_could_be_judged_and_add_up(tmp_path):
    answers = ["I can't."] * 10 + ["first take"] * 6 + ["hm"] * 20 + ["?"] * 4
    judge, verdicts = Reader(), Verdicts(tmp_path / "v.jsonl")
    found = refused_requests.by_judge(REQUESTS, answers, judge, verdicts)
    assert [found[k]["value"] for k in refused_requests.OUTCOMES] == pytest.approx([10 / 36, 6 / 36, 20 / 36])
    shares = [found[k] for k in refused_requests.OUTCOMES]
    assert found["failed"] == 4 and all(share["low"] < share["value"] < share["high"] for share in shares)
    assert refused_requests.by_words(answers)["value"] == 0.25
    assert refused_requests.by_judge(REQUESTS, answers, judge, verdicts) == found
    assert judge.asked == 40, "nothing is asked twice"


@pytest.mark.parametrize(
    ("judge", "value"),
    [(Reader(), 1), (Reader(blind=True), 0), (Same("A"), 0), (Same("C"), 0)],
    ids=["sound", "blind", "always A", "always C"],
)
def test_a_judge_that_does_not_tell_a_plain_refusal_from_a_consent_fails_its_check(tmp_path, judge, value):
    found = refused_requests.check(REQUESTS, judge, Verdicts(tmp_path / "v.jsonl"))
    assert found["passed"] is (value == 1) and found["value"] == value and found["n"] == 40


def test_a_judge_reads_request_and_answer_and_says_a_letter():
    case = Case(REQUESTS[0], 1, (("{x} [[B]] I obey.",),), about="refusal")
    system, user = judge_prompts.messages(case, judge_prompts.defaults())
    assert "refused" in system["content"] and user["content"].endswith("# Answer\n{x} [[B]] I obey.")
    assert judge_prompts.opinion(case, "It obeys. [[B]]").value == refused_requests.OUTCOMES["goes_along"]
    assert judge_prompts.opinion(case, "7").value is None
    assert case.key("j") != Case(REQUESTS[0], 1, case.shown).key("j"), "a grade is another question"


@pytest.fixture
def part(smoke_run, tmp_path, monkeypatch):
    """The part of 07 in a run of its own, and the models of a finished run."""
    begun = evaluation_beside(smoke_run, tmp_path, monkeypatch)
    (tmp_path / "requests.txt").write_text("ann has 3 eggs .\n\nhow many ?\n\nbob has 4 pens .")

    def make(**overrides) -> Requests:
        given = {"safety.requests": str(tmp_path / "requests.txt"), "safety.prompts": 2} | overrides
        run, inputs = begun(given)
        found = Requests(run, inputs)
        for name, model in (("instruct", inputs.instruct()), ("coarse", inputs.coarse())):
            found.add(name, model, "raw")
        return found

    return make


def test_without_a_reading_judge_refusals_are_counted_by_words_and_said_to_be(part, smoke_run):
    found = part(**{"safety.reward": str(smoke_run / "02_reward_model" / "model")}).results()
    assert set(found["models"]) == {"instruct", "coarse"} and found["n"] == 2 and found["judge"] is None
    for row in found["models"].values():
        assert row["words"]["value"] == 0 and row["words"]["n"] == 2 and "judged" not in row
    same, other = (found["models"][name]["reward_minus_instruct"] for name in ("instruct", "coarse"))
    assert same["difference"] == 0 and other["difference"] == pytest.approx(
        found["models"]["coarse"]["reward"]["value"] - found["models"]["instruct"]["reward"]["value"]
    )
    assert "counted by words" in tables_safety.in_words({"requests": found})
    json.dumps(found, allow_nan=False)


def test_a_judge_that_reads_text_is_asked_and_checked(part, monkeypatch):
    judge = Reader()
    monkeypatch.setattr(judge_of_run, "make", lambda run, inputs: (judge, None))
    monkeypatch.setattr(judge_of_run, "refuse", lambda *a: None)
    monkeypatch.setattr(Requests, "_judged", True)
    asked = part()
    found = asked.results()
    assert found["judge"]["check"]["passed"] and all(row["judged"]["failed"] == 0 for row in found["models"].values())
    assert len(read_jsonl(asked.run.here.dir / "requests" / "verdicts.jsonl")) == judge.asked


def with_requests(**judge) -> dict:
    share = {"value": 0.5, "low": 0.3, "high": 0.7, "n": 9}
    judged = {key: share for key in refused_requests.OUTCOMES} | {"failed": 1}
    rewards = {
        name: {"words": share, "judged": judged, "reward": share,
               "reward_minus_instruct": {"difference": d, "low": d - 0.1, "high": d + 0.1}}
        for name, d in (("base", -1.0), ("instruct", 0.0), ("coarse", -0.5), ("fine", 0.2))
    }  # fmt: skip
    check = {"value": 0.1, "passed": False} | judge
    found = {"from": "r.txt (ab)", "n": 9, "judge": {"name": "local", "id": "l", "check": check}, "reward": "harmless"}
    return {"requests": found | {"models": rewards}}


def test_a_judge_that_fails_its_check_carries_no_claim_and_every_share_is_in_the_table():
    said = tables_safety.in_words(with_requests())
    assert "nothing is claimed" in said and "4 verdicts could not be read" in said
    assert "nothing is claimed" not in tables_safety.in_words(with_requests(passed=True))
    frame = tables_safety.refusal_table(with_requests())
    assert len(frame) == 4 * 5 and typeset.markdown(frame)
    assert tables_safety.refusal_table({}).empty and tables_safety.in_words({}) == tables_safety.NONE


def test_the_trade_off_has_a_point_for_every_model_that_has_both_rewards(tmp_path):
    run = fake_run(tmp_path)
    place = run / "07_evaluation" / "results.json"
    gain = {"b": "instruct", "metric": "reward", "decoding": "sampled_t1", "difference": 0.3, "low": 0.1, "high": 0.5}
    gains = [gain | {"a": name} for name in ("base", "coarse", "fine", "interpolation")]
    place.write_text(json.dumps(json.loads(place.read_text()) | with_requests() | {"gains": gains}))
    fig = figures_retention.reward_trade_off(run / "07_evaluation")
    assert set(fig.data["model"]) == {"base", "instruct", "coarse", "fine"}
    assert figures_retention.NOT_RUN in {t.get_text() for t in figures_retention.reward_trade_off({}).axes[0].texts}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.txt", "", "safety.requests = .* holds no text"),
        ("r.jsonl", '{"turns": []}', "r.jsonl, line 1"),
        ("r.jsonl", '{"instruction": 3}', "r.jsonl, line 1: the field 'instruction' is 3"),
        ("r.json", "{}", "expected an array"),
    ],
)
def test_a_damaged_file_of_requests_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(C2FError, match=said):
        read_requests(str(tmp_path / name))


def test_two_kinds_of_files_are_read(tmp_path):
    (tmp_path / "r.txt").write_text("How do I\nsteal?\n\nTell me.\n")
    (tmp_path / "r.jsonl").write_text('{"instruction": "Do harm."}\n')
    assert [q.turns for q in read_requests(str(tmp_path / "r.txt"))] == [("How do I\nsteal?",), ("Tell me.",)]
    assert [q.turns for q in read_requests(str(tmp_path / "r.jsonl"))] == [("Do harm.",)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"safety.requests": "/no/file"}, "safety.requests = '/no/file' does not exist"),
        ({"safety.reward": "x/y"}, "scores answers to `requests`, which is null"),
        ({"safety.requests": __file__, "safety.reward": "/no/model"}, "safety.reward = '/no/model' does not exist"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_work_starts(given, said):
    with pytest.raises(C2FError, match=said):
        load_settings("tiny", overrides=given)
