"""Metrics: what each counts, checked by hand; unknown ones are null; the same seed gives the same answers."""

import pytest
import torch
from tiny_models import TOKENIZER, causal, prompts

from c2f_utils.domain import stories
from c2f_utils.domain.problems import EOS
from c2f_utils.domain.samples import Prompt, Sample, make_prompts
from c2f_utils.measure import answers

PROBLEM = stories.Problem("anna", "coins", 3, (("finds", 2), ("loses", 1)))
WORKED = "first finds 2 so 3 + 2 = 5 . second loses 1 so 5 - 1 = 4 . answer : 4 ."


def sample(words: str, stop: str = "eos", prompt: Prompt | None = None) -> Sample:
    ids = stories.encode(words.split()) + ([EOS] if stop == "eos" else [])
    return Sample(prompt or make_prompts([PROBLEM])[0], ids, stop, 99)


def foreign(text: str, stop: str = "limit", count: int = 4) -> Sample:
    return Sample(Prompt((1, 2), "a question"), list(range(count)), stop, 99, text=text)


def test_each_metric_counts_what_its_name_says():
    batch = [
        sample(WORKED),  # both steps, right first and last
        sample("answer : 7 . answer : 4 .", "limit"),  # right at last, not at first
        sample("answer : 4 . answer : 4 . answer : 9 .", "string"),  # right at first, not at last; says one thing twice
        sample("so it goes on .", "limit"),  # no answer
        sample("answer : 9 . answer : 4 .", "limit"),  # right at last, not at first
    ]
    found = answers.measure(batch, lambda samples: torch.tensor([1.0, 2.0, 3.0, 6.0, 8.0]))
    assert found["n"] == 5
    assert found["accuracy_last"] == 3 / 5 and found["accuracy_first"] == 2 / 5
    assert found["correct_steps"] == 2 / 5, "two steps in five answers"
    assert found["eos_rate"] == 2 / 5, "a stop string ends an answer, a limit does not"
    assert found["reward"] == 4.0
    assert found["mean_tokens"] == (25 + 8 + 12 + 5 + 8) / 5
    assert found["duplicate_sentences"] == pytest.approx((0 + 0 + 1 / 3 + 0 + 0) / 5, abs=1e-6)
    # Utility: 3 x share of steps + 1.5 or -0.5 for the last answer.
    assert found["utility"] == pytest.approx((4.5 + 1.5 - 0.5 - 0.5 + 1.5) / 5)


def test_repeating_four_words_is_measured():
    once, again = "maybe it is more .", "maybe it is more . maybe it is more . maybe it is more ."
    values = [answers.measure([sample(words, "limit")])["rep4"] for words in (once, again)]
    assert values[0] == 0 and values[1] > 0.4


def test_a_forced_beginning_counts_as_part_of_the_answer():
    prompt = make_prompts([PROBLEM], "answer :")[0]
    found = answers.measure([sample("4 .", "eos", prompt)])
    assert found["accuracy_first"] == 1 and found["mean_tokens"] == 5


def test_without_a_checker_its_metrics_are_null_and_the_rest_is_known():
    batch = [foreign("One. One. Two.", "string"), foreign("Three.", count=8)]
    found = answers.measure(batch)
    assert [found[name] for name in answers.CHECKER_METRICS] == [None] * 4 and found["reward"] is None
    assert found["duplicate_sentences"] == pytest.approx((1 / 3 + 0) / 2, abs=1e-6)
    assert found["eos_rate"] == 0.5 and found["mean_tokens"] == 6 and found["rep4"] == 0


def test_values_per_answer_average_to_the_metrics():
    batch = answers.answers(causal(), TOKENIZER, prompts(8), "sampled_t1", 30, 0)
    single, found = answers.per_answer(batch), answers.measure(batch)
    for name in ("accuracy_last", "accuracy_first", "utility", "rep4"):
        assert sum(single[name]) / 8 == pytest.approx(found[name], abs=1e-5)
    assert sum(single["tokens"]) / 8 == pytest.approx(found["mean_tokens"])
    assert set(answers.per_answer([foreign("a.")])) == {"tokens", "rep4"}


def test_the_same_seed_gives_the_same_answers_and_decodings_share_no_random_numbers(monkeypatch):
    model = causal()

    def texts(decoding: str, seed: int) -> list[list[int]]:
        return [s.ids for s in answers.answers(model, TOKENIZER, prompts(6), decoding, 20, seed)]

    assert texts("sampled_t1", 0) == texts("sampled_t1", 0) != texts("sampled_t1", 1)
    assert texts("greedy", 0) == texts("greedy", 1)
    monkeypatch.setattr(answers, "TEMPERATURES", {"one": 1.0, "another": 1.0})
    assert texts("one", 0) != texts("another", 0), "their temperature is not what makes them differ"


def test_a_lower_temperature_is_closer_to_greedy():
    model = causal(scale=2.0)
    greedy, warm, hot = (
        answers.answers(model, TOKENIZER, prompts(12), decoding, 1, 0)
        for decoding in ("greedy", "sampled_t07", "sampled_t1")
    )
    score = [sum(s.logps.sum().item() for s in batch) for batch in (greedy, warm, hot)]
    assert score[0] > score[1] > score[2], "each under its own temperature"
    for batch, temperature in ((warm, 0.7), (hot, 1.0)):
        for s in batch:
            with torch.no_grad():
                expected = (model(torch.tensor([s.prompt.ids])).logits[0, -1] / temperature).log_softmax(-1)
            assert float(s.logps) == pytest.approx(float(expected[s.ids[0]]), abs=1e-5)


def test_rows_say_everything_about_one_answer():
    batch = [sample(WORKED), sample("so it goes on .", "limit")]
    table = answers.rows(batch, "fine", "greedy", lambda samples: torch.tensor([0.12345678, 1.0]))
    first, second = table
    assert (
        first["model"] == "fine" and first["decoding"] == "greedy" and first["tokens"] == 25 and first["stop"] == "eos"
    )
    assert (first["first_answer"], first["last_answer"], first["gold"], first["correct_steps"]) == (4, 4, 4, 2)
    assert first["reward"] == 0.1235 and first["utility"] == 4.5 and "</s>" not in first["text"]
    assert (second["first_answer"], second["last_answer"], second["stop"]) == (None, None, "limit")


def test_rows_of_foreign_data_have_null_for_what_nobody_knows():
    row = answers.rows([foreign("hello")], "base", "sampled_t1")[0]
    assert row["text"] == "hello" and row["prompt"] == "a question"
    unknown = ("reward", "utility", "correct_steps", "first_answer", "last_answer", "gold")
    assert [row[name] for name in unknown] == [None] * 6


def test_a_prompt_without_answers_right_by_chance_is_not_right():
    assert answers.measure([sample("4 .")])["accuracy_first"] == 0, "a number alone is no answer"


def test_rewards_of_prefixes_are_read_at_equal_length_and_held_after_the_end():
    class Counting:
        def prefix_scores(self, samples):
            return [torch.arange(1.0, s.tokens + 1) for s in samples]

    batch = [foreign("", count=10), foreign("", count=4)]
    assert answers.prefix_rewards(batch, Counting(), [2, 8]) == {"2": 2.0, "8": 6.0}
    assert answers.prefix_rewards(batch, lambda samples: torch.zeros(2), [2]) is None
