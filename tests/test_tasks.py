"""The embedded domain: exact checking, disjoint splits, documented mixture."""

import hashlib
import random
import re

import pytest

from c2f_utils.domain import stories
from c2f_utils.domain.problems import EOS, analysis, check, labelled_utility, stated, synthetic_answer
from c2f_utils.domain.worlds import SMALL, WIDE

WORLDS = pytest.mark.parametrize(
    ("world", "operations"), [(SMALL, (3, 5)), (WIDE, (3, 6))], ids=["small world", "wide world"]
)


@pytest.fixture(scope="module")
def problem() -> stories.Problem:
    return stories.Problem("anna", "coins", 7, (("finds", 4), ("loses", 2), ("buys", 3)))


def ids(text: str) -> list[int]:
    return stories.encode(text.split())


WORKED = (
    "let us think . start with 7 . first finds 4 so 7 + 4 = 11 . second loses 2 so 11 - 2 = 9 . "
    "third buys 3 so 9 + 3 = 12 . answer : 12 . </s>"
)


def test_a_right_worked_answer_gets_full_marks(problem):
    verdict = check(problem, ids(WORKED))
    assert (verdict.correct_steps, verdict.wrong_steps, verdict.first_right, verdict.last_right, verdict.ended) == (
        3,
        0,
        True,
        True,
        True,
    )
    assert verdict.utility == pytest.approx(4.5)


def test_utility_follows_its_published_formula(problem):
    text = "let us think . first finds 4 so 7 + 4 = 11 . second loses 2 so 11 - 2 = 8 . answer : 12 . "
    text += "let us check . answer : 5 ."
    verdict = check(problem, ids(text))
    assert (verdict.correct_steps, verdict.wrong_steps, verdict.checks) == (1, 1, 1)
    assert (verdict.first_right, verdict.last_right, verdict.ended) == (True, False, False)
    assert verdict.utility == pytest.approx(3 / 3 - 0.25 - 0.5 + 0.4)


def test_repeating_a_right_step_earns_nothing_more(problem):
    once = "first finds 4 so 7 + 4 = 11 ."
    assert check(problem, ids(once)).correct_steps == check(problem, ids(f"{once} {once} {once}")).correct_steps == 1


@pytest.mark.parametrize(
    "sentence",
    [
        "first finds 3 so 7 + 3 = 10 .",  # another operand than the question's
        "second loses 2 so 7 - 2 = 5 .",  # right arithmetic on the wrong running value
        "first buys 4 so 7 + 4 = 11 .",  # another verb
        "fifth finds 4 so 7 + 4 = 11 .",  # a step that does not exist
    ],
)
def test_a_step_that_is_not_the_problems_is_wrong(problem, sentence):
    verdict = check(problem, ids(sentence))
    assert (verdict.correct_steps, verdict.wrong_steps) == (0, 1)


def test_utility_has_no_length_term(problem):
    filler = "so it goes on . "
    assert check(problem, ids("answer : 12 .")).utility == check(problem, ids(filler * 9 + "answer : 12 .")).utility


def test_length_enters_the_label_and_only_the_label(problem):
    short, long = (check(problem, ids("so it goes on . " * n + "answer : 12 .")) for n in (0, 20))
    label = [labelled_utility(v, random.Random(0), 0.0, 0.002) for v in (short, long)]
    assert label[1] - label[0] == pytest.approx(0.002 * (long.tokens - short.tokens))


@WORLDS
def test_splits_are_disjoint_in_the_numbers_whatever_the_words(world, operations):
    splits = ("train", "validation", "test")
    keys = [{p.values for p in stories.problems(split, 300, 5, operations, world)} for split in splits]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    one = stories.Problem("anna", "coins", 7, (("finds", 4), ("loses", 2), ("buys", 3)))
    assert one.split == stories.Problem("ben", "pens", 7, (("gets", 4), ("sells", 2), ("finds", 3))).split


@WORLDS
def test_corpus_instructions_and_training_prompts_hold_training_problems_only(world, operations):
    held_out = {
        tuple(p.prompt_ids[5:-4])
        for split in ("validation", "test")
        for p in stories.problems(split, 500, 0, operations, world)
    }
    documents = list(stories.documents(60_000, 0, operations, world=world))
    assert all(tuple(d[5 : 5 + len(key)]) != key for d in documents for key in list(held_out)[:50])
    for prompt, _ in stories.instructions(20_000, 0.35, 0, operations, world):
        assert tuple(prompt[5:-4]) not in held_out


@WORLDS
def test_every_running_value_can_be_written_as_one_token(world, operations):
    numbers = set(stories.vocabulary(world))
    for problem in stories.problems("train", 500, 1, operations, world):
        assert all(0 <= value <= world.largest and str(value) in numbers for value in problem.values)


def test_a_word_has_one_id_in_every_world_and_no_world_says_what_it_does_not_know():
    assert stories.vocabulary(WIDE)[: len(stories.VOCABULARY)] == stories.VOCABULARY == stories.vocabulary(SMALL)
    assert len(set(stories.vocabulary(WIDE))) == len(stories.vocabulary(WIDE)) > 2 * len(stories.VOCABULARY)
    rng = random.Random(0)
    for world, operations in ((SMALL, (3, 5)), (WIDE, (3, 6))):
        said = [token for d in stories.documents(60_000, 0, operations, world=world) for token in d]
        for problem in stories.problems("train", 300, 1, operations, world):
            said += problem.prompt_ids + synthetic_answer(problem, rng, 0.4)
        assert max(said) < len(stories.vocabulary(world))
    assert max(said) > len(stories.VOCABULARY), "and the wide one does say more"


def test_the_small_world_is_what_it_always_was():
    """Its documents, problems and answers decide every committed number of the embedded domain."""
    rng = random.Random(7)
    made = {
        "words": stories.VOCABULARY,
        "prompts": [p.prompt_ids for split in ("train", "validation", "test") for p in stories.problems(split, 50, 3)],
        "documents": list(stories.documents(20_000, 0)),
        "instructions": list(stories.instructions(5000, 0.35, 0)),
        "answers": [synthetic_answer(p, rng, 0.4) for p in stories.problems("train", 50, 1)],
    }
    assert {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in made.items()} == {
        "words": "50441b4c13ad4571", "prompts": "42f8d3b6d0580baa", "documents": "d88a85b75204b959",
        "instructions": "245efbd7066ced90", "answers": "00a1844ebf3a182e",
    }  # fmt: skip


def test_a_wide_worked_answer_gets_full_marks():
    problem = stories.Problem("wanda", "kites", 41, (("wins", 8), ("donates", 9), *[("finds", 1)] * 4), WIDE.largest)
    words, value = analysis(problem, random.Random(0))
    verdict = check(problem, stories.encode([*words, *stated(value), "</s>"]))
    assert (verdict.correct_steps, verdict.wrong_steps, verdict.last_answer, verdict.ended) == (6, 0, 44, True)
    assert "sixth finds 1 so 43 + 1 = 44 ." in " ".join(words)


@WORLDS
def test_wrong_steps_and_wrong_answers_stay_in_their_world(world, operations):
    rng = random.Random(0)
    for problem in stories.problems("train", 200, 0, operations, world):
        words = [*analysis(problem, rng, error_rate=1.0)[0], *stories.response(problem, rng, kind="bare")]
        assert {int(word) for word in words if word.isdigit()} <= set(range(world.largest + 1))


def test_where_every_answer_ends_its_end_follows_a_result():
    documents = list(stories.documents(20_000, 0, ends=True))
    answers = [d for d in documents if stories.IDS["?"] in d]
    assert answers and all(d[-1] == EOS and EOS not in d[:-1] for d in documents)
    assert all(stories.decode(d[-5:]).startswith("answer :") for d in answers)


def test_the_same_seed_gives_the_same_documents_and_another_seed_others():
    first, again, other = (list(stories.documents(5000, seed)) for seed in (3, 3, 4))
    assert first == again and first != other


def test_the_corpus_seldom_ends_an_analysis():
    rng = random.Random(0)
    problems = stories.problems("train", 600, 0)
    full = [stories.response(p, rng, kind="full") for p in problems]
    assert 0.15 < sum(words[-1] == "</s>" for words in full) / len(full) < 0.35


def test_worked_instructions_are_right_and_end():
    for prompt, answer in stories.instructions(10_000, 1.0, 0):
        assert answer[-1] == EOS
        text = stories.decode(prompt)
        start = int(re.search(r"has (\d+)", text).group(1))
        moves = re.findall(r"(finds|buys|gets|loses|sells|gives) (\d+)", text)
        result = start + sum(int(n) if verb in stories.GAINS else -int(n) for verb, n in moves)
        assert stories.decode(answer).endswith(f"answer : {result} .")


@WORLDS
def test_the_tokenizer_agrees_with_the_checker(tmp_path, world, operations):
    from transformers import AutoTokenizer

    stories.make_tokenizer(world).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    problem = stories.problems("test", 1, 0, operations, world)[0]
    assert tokenizer(" ".join(problem.words))["input_ids"] == problem.prompt_ids
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.decode(problem.prompt_ids, skip_special_tokens=True) == " ".join(problem.words)
