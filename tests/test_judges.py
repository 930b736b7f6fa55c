"""Judges: one protocol, verdicts kept and never asked for twice, both orders, and checks that catch a bad judge."""

import json

import pytest
import torch
from tiny_models import TOKENIZER, causal

from c2f_utils import stats
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError, Stopped
from c2f_utils.measure import judge_prompts, judge_summary
from c2f_utils.measure.judge_models import LocalModelJudge, RewardModelJudge
from c2f_utils.measure.judges import (
    Case,
    Dialogue,
    HeuristicJudge,
    Opinion,
    Pair,
    Question,
    Verdicts,
    outcome,
    pairs,
    verdict_rows,
)  # fmt: skip

QUESTIONS = [Question(n, "math" if n % 2 else "stem", (f"turn one of {n}", "turn two")) for n in range(4)]


def said(*texts: str) -> dict:
    return {q.id: Dialogue(texts, tuple(len(t.split()) for t in texts)) for q in QUESTIONS}


class Always:
    """A judge that says what a function of the two shown answers says, and counts what it was asked."""

    name, id = "always", "always:1"

    def __init__(self, value):
        self.value, self.asked = value, []

    def opinions(self, cases):
        for case in cases:
            self.asked.append(case.key(self.id))
            yield case, Opinion(self.value(*(answers[case.turn - 1] for answers in case.shown)), "raw")


def rows_of(judge, tmp_path, a=("good", "good"), b=("bad", "bad")):
    asked = pairs(QUESTIONS, "a", "b", {"a": said(*a), "b": said(*b)})
    return verdict_rows(asked, judge, Verdicts(tmp_path / "verdicts.jsonl"))


def test_a_row_says_who_is_preferred_whichever_was_shown_first(tmp_path):
    rows = rows_of(Always(lambda first, second: 0.9 if first == "good" else 0.2), tmp_path)
    assert len(rows) == 4 * 2 * 2 and [(r["order"], r["turn"]) for r in rows[:4]] == [
        ("ab", 1), ("ba", 1), ("ab", 2), ("ba", 2),
    ]  # fmt: skip
    assert [r["p_a"] for r in rows[:2]] == [0.9, 0.8]
    assert set(rows[0]) == {
        "question", "category", "turn", "model_a", "model_b", "order", "p_a", "tokens_a", "tokens_b", "judge", "ok",
        "key",
    }  # fmt: skip
    json.dumps(rows, allow_nan=False)


def test_a_win_counts_only_if_both_orders_agree(tmp_path):
    fair = judge_summary.summary(rows_of(Always(lambda first, _: float(first == "good")), tmp_path / "1"))
    assert (fair["wins"], fair["ties"], fair["win_rate"], fair["swap_consistency"]) == (8, 0, 1.0, 1.0)
    assert fair["first_wins"] == 0.5
    wilson = stats.wilson(4, 4)
    assert (fair["low"], fair["high"]) == (wilson.low, wilson.high), "four questions, however many turns they have"
    first = judge_summary.summary(rows_of(Always(lambda *_: 1.0), tmp_path / "2"))
    assert (first["wins"], first["losses"], first["ties"]) == (0, 0, 8)
    assert first["swap_consistency"] == 0 and first["first_wins"] == 1 and first["win_rate"] == 0.5


def test_what_could_not_be_read_is_counted_and_in_no_rate(tmp_path):
    found = judge_summary.summary(rows_of(Always(lambda first, _: 1.0 if first == "good" else None), tmp_path))
    assert (found["failed"], found["judged"], found["verdicts_failed"], found["pairs"]) == (8, 0, 8, 8)
    assert found["win_rate"] is None and found["mean_p_a"] is None and (found["low"], found["high"]) == (0, 1)


def test_summaries_per_category_and_turn_add_up(tmp_path):
    rows = rows_of(Always(lambda first, _: float(first == "good")), tmp_path)
    for field, values in (("category", ["stem", "math"]), ("turn", ["1", "2"])):
        parts = judge_summary.by(rows, field)
        assert list(parts) == values and sum(part["pairs"] for part in parts.values()) == 8
    with pytest.raises(C2FError, match="not in both orders"):
        judge_summary.summary(rows[1:])
    with pytest.raises(C2FError, match="judged in one order only"):
        judge_summary.summary(rows[:3])


def test_a_preference_near_one_half_is_a_tie():
    assert [outcome(p) for p in (0.5, 0.549, 0.551, 0.449, None, 1.0)] == ["tie", "tie", "a", "b", "error", "a"]


def test_nothing_is_asked_twice_and_a_stop_loses_nothing(tmp_path):
    judge = Always(lambda first, _: float(first == "good"))
    asked = pairs(QUESTIONS, "a", "b", {"a": said("good", "good"), "b": said("bad", "bad")})
    with pytest.raises(Stopped, match="after 3 of"):
        verdict_rows(asked, judge, Verdicts(tmp_path / "v"), stop=lambda: len(judge.asked) > 2)
    path = tmp_path / "v"
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote the third
    rows = verdict_rows(asked, judge, Verdicts(path))
    assert rows == verdict_rows(asked, judge, Verdicts(path))
    assert len(judge.asked) == len(set(judge.asked)) + 1 == 17, "only the one that was lost is asked again"
    assert all(json.loads(line) for line in path.read_text().splitlines()), "no line is glued to half of another"


def test_another_judge_reference_or_answer_is_another_question():
    question = QUESTIONS[1]
    known = Case(question, 2, (("a", "b"), ("c", "d")))
    others = [
        Case(question, 1, known.shown), Case(question, 2, known.shown[::-1]), Case(question, 2, known.shown[:1]),
        Case(Question(1, "math", question.turns, ("r", "s")), 2, known.shown),
        Case(Question(1, "stem", question.turns), 2, known.shown), Case(question, 2, (("a", "b"), ("c", "e"))),
    ]  # fmt: skip
    assert len({case.key("j") for case in [known, *others]} | {known.key("k")}) == 8
    assert known.key("j") == Case(Question(99, "math", question.turns), 2, known.shown).key("j"), "an id is no content"


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "v").write_text('{"key": "x"}\n')
    with pytest.raises(C2FError, match="line 1: no verdict"):
        Verdicts(tmp_path / "v")


def checks_of(judge, tmp_path) -> dict:
    texts = {q.id: Dialogue((f"first {q.id}", f"one two three {q.id}\n\nlast words"), (2, 6)) for q in QUESTIONS}
    asked = judge_summary.null_pairs(QUESTIONS, texts, "thanks", lambda text: len(text.split()))
    assert asked["repeated"][0].dialogues[0].answers[-1] == "one two three 0\n\nlast words\n\nlast words"
    return judge_summary.null_checks(asked, judge, Verdicts(tmp_path / "v"))


@pytest.mark.parametrize(
    "value, failing",
    [
        (lambda a, b: len(set(a.split())) / (len(set(a.split())) + len(set(b.split()))), set()),
        (lambda a, b: 0.8, {"identical", "constant"}),  # the first one: consistent on nothing
        (lambda a, b: len(a) / (len(a) + len(b)), {"repeated"}),  # the longer one
        (lambda a, b: len(b) / (len(a) + len(b)), {"constant"}),  # the shorter one
        (lambda a, b: None, {"identical", "repeated", "constant"}),
    ],
)
def test_null_checks_catch_a_judge_that_cannot_be_trusted(tmp_path, value, failing):
    checks = checks_of(Always(value), tmp_path)
    assert {name for name, check in checks.items() if not check["passed"]} == failing
    assert judge_summary.fit_for_headlines(checks) == (not failing) and not judge_summary.fit_for_headlines({})


def test_the_heuristic_passes_the_null_checks_and_grades(tmp_path):
    assert judge_summary.fit_for_headlines(checks_of(HeuristicJudge(), tmp_path))
    cases = [Case(QUESTIONS[0], 1, (("a b a",),)), Case(QUESTIONS[0], 1, (("a",), ("b",)))]
    assert [o.value for _, o in HeuristicJudge().opinions(cases)] == [2.0, 0.5]


def test_grades_are_averaged_over_questions_whose_turns_stay_together():
    asked = [(q, turn) for q in QUESTIONS for turn in (1, 2)]
    opinions = [Opinion(None if n == 7 else float(n)) for n in range(8)]
    found = judge_summary.grades(asked, opinions, 0)
    assert (found["mean"], found["graded"], found["failed"], found["turn_1"], found["turn_2"]) == (3, 7, 1, 3, 3)
    assert found["low"] < 3 < found["high"]
    assert judge_summary.grades(asked, [Opinion(None)] * 8, 0)["mean"] is None


class Rewards:
    """A reward model that counts the words of an answer."""

    class model:
        config = {"max_position_embeddings": 12}

    def __call__(self, samples):
        return torch.tensor([float(len(set(s.ids))) for s in samples])


def test_the_reward_judge_prefers_the_higher_reward_in_either_order(tmp_path):
    def sample(question, answers):
        return Sample(Prompt((1, 2), question.turns[0]), list(range(len(answers[-1].split()))) or [0], "eos", 99)

    judge = RewardModelJudge(Rewards(), sample, "x")
    a, b = ("one", "one two three"), ("one", "one")
    cases = [Case(QUESTIONS[0], 2, (a, b)), Case(QUESTIONS[0], 2, (b, a)), Case(QUESTIONS[0], 1, (a, b))]
    found = [o.value for _, o in judge.opinions(cases)]
    assert found == pytest.approx([torch.tensor(2.0).sigmoid().item(), torch.tensor(-2.0).sigmoid().item(), 0.5])
    long = Case(QUESTIONS[0], 1, (("w " * 20,), ("w",)))
    ((_, opinion),) = judge.opinions([long])
    assert not opinion.ok and opinion.raw == "22 tokens; the judge has 12 positions"
    assert [o.value for _, o in judge.opinions([Case(QUESTIONS[0], 1, (("one two",),))])] == [2.0]


def letters():
    """A tokenizer of single characters, and a random model of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({c: n for n, c in enumerate(map(chr, range(10, 127)))} | {"?u": 117}, "?u"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?u", eos_token="~")
    torch.manual_seed(0)
    shape = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    config = LlamaConfig(vocab_size=118, max_position_embeddings=2048, initializer_range=0.5, **shape)
    return LlamaForCausalLM(config).eval(), tokenizer


def likelihood(model, ids: list[int], before: int) -> float:
    """Log-probability of the ids from `before` on, one by one."""
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(sum(logps[n - 1, ids[n]] for n in range(before, len(ids))))


def test_the_local_judge_reads_the_probabilities_of_the_labels():
    model, tokenizer = letters()
    judge = LocalModelJudge(model, tokenizer, judge_prompts.defaults(), "x")
    case = Case(QUESTIONS[0], 1, (("yes",), ("no",)))
    both = [case, Case(QUESTIONS[0], 1, case.shown[::-1])]
    found = [o.value for _, o in judge.opinions(both)]
    for each, value in zip(both, found, strict=True):
        text = "\n\n".join([*(m["content"] for m in judge_prompts.messages(each, judge.templates)), "Verdict: [["])
        before = len(tokenizer(text)["input_ids"])
        score = torch.tensor([likelihood(model, tokenizer(f"{text}{label}]]")["input_ids"], before) for label in "ABC"])
        a, b, c = score.softmax(-1).tolist()
        assert value == pytest.approx(a + c / 2, abs=1e-5)
    assert found[0] != pytest.approx(found[1], abs=1e-4), "a random model is not indifferent to the order"
    ((_, grade),) = judge.opinions([Case(QUESTIONS[0], 1, (("yes",),))])
    assert 1 <= grade.value <= 10
    ((_, opinion),) = judge.opinions([Case(QUESTIONS[0], 1, (("y" * 3000,), ("no",)))])
    assert not opinion.ok and "the judge has 2048 positions" in opinion.raw


def test_the_local_judge_uses_the_models_chat_template():
    model, tokenizer = letters()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"
    case = Case(QUESTIONS[0], 1, (("yes",), ("no",)))
    plain = LocalModelJudge(model, tokenizer, judge_prompts.defaults(), "x")
    ((_, found),) = plain.opinions([case])
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}{{ messages[0].content }}<a>"
    )
    ((_, other),) = plain.opinions([case])
    assert found.ok and other.ok and found.value != other.value, "a template without a system message is used, too"


def test_a_tokenizer_that_cannot_tell_the_labels_apart_is_refused():
    with pytest.raises(C2FError, match="cannot tell .*apart"):
        LocalModelJudge(causal(), TOKENIZER, judge_prompts.defaults(), "x")


def test_a_pair_shows_no_turn_that_is_not_judged():
    pair = Pair(QUESTIONS[0], 1, ("a", "b"), (said("x", "y")[0], said("z", "w")[0]))
    assert [case.shown for case in pair.cases()] == [(("x",), ("z",)), (("z",), ("x",))]
