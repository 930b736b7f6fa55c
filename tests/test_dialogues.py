"""FastChat's files: the published ones are read, ours are written alike, and what is wrong in one is named."""

import json
import re

import pytest

from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.measure import dialogues, judge_prompts
from c2f_utils.measure.dialogues import read_answers, read_questions, with_references
from c2f_utils.measure.judges import Case, Dialogue, Opinion, Pair, Question

GOOD = {"question_id": 1, "category": "math", "turns": ["One and one?", "And one more?"]}
ANSWER = {"question_id": 1, "model_id": "m", "choices": [{"index": 0, "turns": ["2", "3"]}]}
QUESTION = Question(1, "math", ("One and one?", "And one more?"))


def written(path, *rows):
    """A file of these rows: JSON of what is no text, bytes and text as they are."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize(
    "row, said",
    [
        ("{'question_id': 1}", "not valid JSON"),
        ('{"question_id": 1, "turns": ["a"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('["a list"]', "a list instead of a JSON object"),
        ("null", "a NoneType instead of a JSON object"),
        (b'{"question_id": 2, "category": "math", "turns": ["caf\xe9"]}', "not UTF-8 text"),
        (GOOD, "question_id 1 stands in line 1 already"),
        (GOOD | {"question_id": None}, "question_id is None"),
        (GOOD | {"question_id": True}, "question_id is True"),
        (GOOD | {"question_id": ""}, "question_id is ''"),
        (GOOD | {"question_id": 1.5}, "question_id is 1.5"),
        ({"question_id": 2, "category": "math"}, "neither 'turns' .FastChat. nor 'instruction'"),
        (
            GOOD | {"question_id": 2, "category": "cooking"},
            "category 'cooking' is unknown .known: coding, .*humanities",
        ),
        ({"question_id": 2, "turns": ["a"]}, "the field 'category' is missing"),
        (GOOD | {"question_id": 2, "category": 7}, "the field 'category' is 7"),
        (GOOD | {"question_id": 2, "turns": []}, "'turns' is 0 of them, expected a list of one or two"),
        (GOOD | {"question_id": 2, "turns": ["a", "b", "c"]}, "'turns' is 3 of them"),
        (GOOD | {"question_id": 2, "turns": "a"}, "'turns' is 'a'"),
        (GOOD | {"question_id": 2, "turns": ["a", " \n"]}, "turn 2 is empty"),
        (GOOD | {"question_id": 2, "turns": ["a", None]}, "turn 2 is missing"),
        ('{"question_id": 2, "category": "math", "turns": ["\\ud800"]}', "turn 1 holds half of a surrogate pair"),
        ({"instruction": ""}, "the field 'instruction' is empty"),
        ({"instruction": ["a"]}, "the field 'instruction' is .'a'., expected text"),
    ],
)
def test_a_damaged_question_is_named_by_file_and_line(tmp_path, row, said):
    path = written(tmp_path / "question.jsonl", GOOD, "", row)
    with pytest.raises(C2FError, match=f"question.jsonl, line 3: .*{said}"):
        read_questions(path)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"question_id": 9, "model_id": "m", "choices": []}, "question_id 9 is not among the 2 questions"),
        (ANSWER, "question_id 1 stands in line 1 already"),
        (ANSWER | {"question_id": 2, "model_id": "other"}, "model_id is 'other' and was 'm' before"),
        (ANSWER | {"question_id": 2, "model_id": ""}, "the field 'model_id' is empty"),
        (ANSWER | {"question_id": 2, "choices": {}}, "'choices' is no list of objects"),
        (ANSWER | {"question_id": 2, "choices": [7]}, "'choices' is no list of objects"),
        (ANSWER | {"question_id": 2, "choices": [{"index": 0}]}, "'turns' is None"),
        (ANSWER | {"question_id": 2, "choices": [{"turns": ["2"]}]}, "1 answers to the 2 turns of question 2"),
        (ANSWER | {"question_id": 2, "choices": [{"turns": ["2", ""]}]}, "the answer to turn 2 is empty"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_a_damaged_answer_is_named_by_file_and_line(tmp_path, row, said):
    questions = [QUESTION, Question(2, "math", ("a", "b"))]
    path = written(tmp_path / "m.jsonl", ANSWER, row)
    with pytest.raises(C2FError, match=f"m.jsonl, line 2: .*{said}"):
        read_answers(path, questions)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"name": "pair-v2", "system_prompt": "s"}, "'prompt_template' is missing"),
        ({"name": "pair-v2", "prompt_template": "{question}"}, "'system_prompt' is missing"),
        ({"name": "pair-v2", "system_prompt": "s", "prompt_template": "{quest"}, "no template"),
        ({"name": "pair-v2", "system_prompt": "s", "prompt_template": "{question.__class__}"}, "unknown fields"),
        ({"name": "pair-v2", "system_prompt": "s", "prompt_template": "{}"}, "unknown fields"),
    ],
)
def test_a_damaged_judge_prompt_is_named_by_file_and_line(tmp_path, row, said):
    with pytest.raises(C2FError, match=f"p.jsonl, line 1: .*{said}"):
        judge_prompts.read(written(tmp_path / "p.jsonl", row))


def test_files_that_are_no_such_files_are_refused(tmp_path):
    for content in (b"", b"\n\n"):
        (tmp_path / "none.jsonl").write_bytes(content)
        with pytest.raises(C2FError, match="none.jsonl holds no rows"):
            read_questions(tmp_path / "none.jsonl")
    with pytest.raises(C2FError, match="missing.jsonl cannot be read"):
        read_questions(tmp_path / "missing.jsonl")
    for text, said in (('{"a": 1}', "holds a dict; expected an array"), ("[1", "not valid JSON")):
        with pytest.raises(C2FError, match=said):
            read_questions(written(tmp_path / "p.json", text))
    with pytest.raises(C2FError, match="p.json, item 2: the field 'instruction' is empty"):
        read_questions(written(tmp_path / "p.json", '[{"instruction": "a"}, {"instruction": " "}]'))
    twice = {"name": "pair-v2", "system_prompt": "s", "prompt_template": "{question}"}
    with pytest.raises(C2FError, match="p.jsonl, line 2: the prompt 'pair-v2' stands there twice"):
        judge_prompts.read(written(tmp_path / "p.jsonl", twice, twice))
    with pytest.raises(C2FError, match="lacks the prompts pair-v2-multi-turn, .*single-math-v1"):
        judge_prompts.read(written(tmp_path / "p.jsonl", twice))


def test_a_prompt_file_needs_no_ids_and_further_categories_are_allowed(tmp_path):
    rows = [{"instruction": "Why?", "dataset": "koala"}, {"instruction": "How?", "output": "so"}]
    found = read_questions(written(tmp_path / "p.jsonl", *rows))
    assert [(q.id, q.category, q.turns) for q in found] == [(1, "koala", ("Why?",)), (2, "all", ("How?",))]
    (own,) = read_questions(written(tmp_path / "q.jsonl", GOOD | {"category": "cooking"}), ["cooking"])
    assert own.category == "cooking"
    marked = written(tmp_path / "q.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_questions(marked) == [QUESTION], "a byte order mark is no fault"


def test_the_published_files_are_read(real_data):
    folder = real_data / "mt_bench"
    questions = read_questions(folder / "question.jsonl")
    assert len(questions) == 80 and {q.category for q in questions} == set(dialogues.CATEGORIES)
    assert all(len(q.turns) == 2 for q in questions)
    known = with_references(questions, folder / "reference_answer" / "gpt-4.jsonl")
    assert [q.id for q in known if q.reference] == list(range(101, 131))
    assert sum(q.reference_faulty for q in known) == 13 and known[104 - 81].reference_faulty
    prompts = judge_prompts.read(folder / "judge_prompts.jsonl")
    for question in known:
        for turn in (1, 2):
            case = Case(question, turn, (("first {a}", "<second>"), ("other", "<last>")))
            system, user = judge_prompts.messages(case, prompts)
            math = question.category in dialogues.NEED_REFERENCE
            assert judge_prompts.name_of(case) == (
                f"pair{'-math-v1' if math else '-v2'}{'-multi-turn' if turn == 2 else ''}"
            )
            assert question.turns[turn - 1] in user["content"] and "first {a}" in user["content"]
            assert ("<second>" in user["content"]) == ("<last>" in user["content"]) == (turn == 2)
            assert (question.reference[turn - 1] in user["content"]) if math else not question.reference


def test_references_must_answer_every_question_that_needs_one(tmp_path):
    path = written(tmp_path / "r.jsonl", ANSWER)
    assert with_references([QUESTION], path)[0].reference == ("2", "3")
    assert not with_references([QUESTION], path)[0].reference_faulty
    with pytest.raises(C2FError, match="no reference answer to 1 questions of math, reasoning, coding.*being 2"):
        with_references([QUESTION, Question(2, "coding", ("a",))], path)
    gpt4 = written(tmp_path / "r.jsonl", ANSWER | {"model_id": "gpt-4", "question_id": 104})
    assert with_references([Question(104, "reasoning", ("a", "b"))], gpt4)[0].reference_faulty


def test_answers_are_written_as_they_are_read(tmp_path):
    said = {1: Dialogue(("zwei, 'äh'", ""), (3, 1)), "x": Dialogue(("\u202e{",), (1,))}
    questions = [QUESTION, Question("x", "stem", ("a",))]
    dialogues.write_answers(tmp_path / "fine.jsonl", "fine", said)
    assert read_answers(tmp_path / "fine.jsonl", questions, empty=True) == (
        "fine", {place: dialogue.answers for place, dialogue in said.items()},
    )  # fmt: skip
    with pytest.raises(C2FError, match="line 1: the answer to turn 2 is empty"):
        read_answers(tmp_path / "fine.jsonl", questions)
    row = json.loads((tmp_path / "fine.jsonl").read_text().splitlines()[0])
    assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}


def test_pairwise_judgements_are_written_as_they_are_read(tmp_path):
    pair = Pair(QUESTION, 2, ("fine", "base"), (Dialogue(("a", "b"), (1, 1)), Dialogue(("c", "d"), (1, 1))))
    values = [1.0, 0.0, 0.0, 1.0, 0.52, None]  # both for fine; both for base; a tie and nothing
    opinions = [Opinion(value, f"said {value}") for value in values]
    path = tmp_path / "judge_pair.jsonl"
    dialogues.write_pair_judgements(path, [pair] * 3, opinions, ("judge", "pair-v2"))
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["g1_winner"], r["g2_winner"]) for r in raw] == [
        ("model_1", "model_1"), ("model_2", "model_2"), ("tie", "error"),
    ]  # fmt: skip
    rows = dialogues.read_pair_judgements(path, [QUESTION])
    assert [row["p_a"] for row in rows] == [1.0, 1.0, 0.0, 0.0, 0.5, None]
    assert [row["ok"] for row in rows] == [True] * 5 + [False] and rows[1]["order"] == "ba" and rows[0]["turn"] == 2
    for change, said in (
        ({"g1_winner": "me"}, "g1_winner is 'me'"), ({"turn": 3}, "turn is 3"), ({"question_id": 5}, "not among the 1"),
        ({"model_1": None}, "'model_1' is missing"),
    ):  # fmt: skip
        with pytest.raises(C2FError, match=f"line 1: .*{said}"):
            dialogues.read_pair_judgements(written(path, raw[0] | change), [QUESTION])


@pytest.mark.parametrize(
    "reply, value",
    [
        ("A is better. [[A]]", 1.0), ("[[B]]", 0.0), ("a draw [[C]]", 0.5), ("[[A]] or [[B]]? I say [[B]]", 0.0),
        ("A", None), ("[[D]]", None), ("", None), ("[[a]]", None),
    ],
)  # fmt: skip
def test_a_preference_is_read_off_the_last_label(reply, value):
    found = judge_prompts.opinion(Case(QUESTION, 1, (("x",), ("y",))), reply)
    assert (found.value, found.raw, found.final) == (value, reply, True)


@pytest.mark.parametrize(
    "reply, value",
    [("[[7]]", 7.0), ("[[7.5]]", 7.5), ("Rating: [8]", 8.0), ("[[3]] no, [[9]]", 9.0), ("[[11]]", None), ("9", None)],
)
def test_a_grade_is_read_off_the_last_number(reply, value):
    assert judge_prompts.opinion(Case(QUESTION, 1, (("x",),)), reply).value == value


def test_the_second_answer_follows_the_models_own_first_and_temperatures_are_those_of_the_category():
    asked = []

    def prompt(question, said):
        return Prompt((1,), "|".join([*question.turns[: len(said) + 1], *(s.text for s in said)]))

    def answer(prompts, temperature):
        asked.extend((p.text, temperature) for p in prompts)
        return [Sample(p, [5, 2], "eos", 9, text=f" {p.text[:3]}! ") for p in prompts]

    questions = [QUESTION, Question(2, "writing", ("Tell",)), Question(3, "own", ("Say", "More"))]
    found = dialogues.generate(questions, prompt, answer)
    assert asked == [
        ("One and one?", 0.0), ("Tell", 0.7), ("Say", 0.7), ("One and one?|And one more?| One! ", 0.0),
        ("Say|More| Say! ", 0.7),
    ]  # fmt: skip
    assert found[1] == Dialogue(("One!", "One!"), (2, 2)) and found[2].answers == ("Tel!",)


def test_a_dialogue_is_a_transcript_of_the_preference_data():
    assert dialogues.transcript(("a", "b"), (" x ",)) == "\n\nHuman: a\n\nAssistant: x\n\nHuman: b\n\nAssistant:"
    assert re.fullmatch(r"\n\nHuman: a\n\nAssistant:", dialogues.transcript(("a",), ()))
