"""Prompts and pairs: disjoint splits, honest labels, every row that is left out counted."""

import gzip
import json
from pathlib import Path

import offline_mistral
import pytest
from tiny_models import TOKENIZER

from c2f_utils.domain import forms, preferences, stories
from c2f_utils.domain.problems import EOS, check
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.files import sha256
from c2f_utils.models import loading
from c2f_utils.models.pretrain import new_model
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import data

TURN = "\n\nHuman: why?\n\nAssistant:"


def row(chosen: str, rejected: str, before: str = TURN) -> dict[str, str]:
    return {"chosen": before + chosen, "rejected": before + rejected}


def write(path, rows) -> str:
    text = "".join(json.dumps(item) + "\n" for item in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


# Preference files


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.json"])
def test_pairs_are_cut_at_the_last_answer(tmp_path, name):
    longer = TURN + " because\n\nHuman: really?\n\nAssistant:"
    source = write(tmp_path / name, [row(" a", " b"), row(" c", " d", longer)])
    pairs, left_out = preferences.read(source)
    assert left_out == 0
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [(TURN, " a", " b"), (longer, " c", " d")]


@pytest.mark.parametrize(
    "bad",
    [
        row("", " b"),
        row(" a", "  "),
        row(" a", " a"),
        {"chosen": "no header", "rejected": "no header at all"},
        {"chosen": TURN + " a", "rejected": "\n\nHuman: who?\n\nAssistant: b"},
        row(" a", " b\n\nHuman: and?\n\nAssistant: c"),
    ],
    ids=["empty chosen", "blank rejected", "twice the same", "no header", "another dialogue", "more turns"],
)
def test_rows_that_are_no_comparison_are_left_out_and_counted(tmp_path, bad):
    pairs, left_out = preferences.read(write(tmp_path / "p.jsonl", [row(" a", " b"), bad, row(" c", " d")]))
    assert [p.chosen for p in pairs] == [" a", " c"] and left_out == 1


def test_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(row(" a", " b")) + "\n\n   \n")
    assert len(preferences.read(str(tmp_path / "p.jsonl"))[0]) == 1


def test_a_hub_set_that_cannot_be_reached_is_said_to_be_neither_file_nor_set(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("offline\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(C2FError, match="'owner/set' is no local file and cannot be loaded from the hub .offline."):
        preferences.read("owner/set")


def test_a_hub_set_is_read_like_a_file_and_its_columns_are_checked(monkeypatch):
    import datasets

    made = datasets.Dataset.from_list([row(" a", " b")])
    monkeypatch.setattr(datasets, "load_dataset", lambda source, split: made)
    assert preferences.read("owner/set")[0][0].chosen == " a"
    preferences._read.cache_clear()
    monkeypatch.setattr(datasets, "load_dataset", lambda source, split: made.rename_column("chosen", "good"))
    with pytest.raises(C2FError, match="expected 'chosen' and 'rejected'"):
        preferences.read("owner/set")
    turns = [{"role": "user", "content": "Hello?"}]
    lists = datasets.Dataset.from_list([{"chosen": turns, "rejected": turns}])
    preferences._read.cache_clear()
    monkeypatch.setattr(datasets, "load_dataset", lambda source, split: lists)
    with pytest.raises(C2FError, match="owner/set, row 0: 'chosen' and 'rejected' are no texts; expected one JSON"):
        preferences.read("owner/set")


def folder_of_subsets(tmp_path):
    """A local copy laid out as HH-RLHF is on the hub."""
    for subset, answer in (("harmless-base", " no"), ("helpful-base", " yes")):
        (tmp_path / subset).mkdir()
        rows = [row(answer, " hm", f"\n\nHuman: {n}?\n\nAssistant:") for n in "abcd"]
        write(tmp_path / subset / "train.jsonl.gz", rows)
    write(tmp_path / "helpful-base" / "test.jsonl", [row(" held back", " hm")])
    return str(tmp_path)


def test_subsets_choose_the_objective_and_their_order_is_that_of_the_setting(tmp_path):
    source = folder_of_subsets(tmp_path)
    assert [p.chosen for p in preferences.read(source, subsets=["harmless-base"])[0]] == [" no"] * 4
    both = preferences.read(source, "train", ["helpful-base", "harmless-base"])[0]
    assert [p.chosen for p in both] == [" yes"] * 4 + [" no"] * 4
    assert [p.chosen for p in preferences.read(source, "test", ["helpful-base"])[0]] == [" held back"]


@pytest.mark.parametrize(
    ("subsets", "split", "said"),
    [
        (["harmful-base"], "train", "harmful-base/train.jsonl.gz; its subsets are harmless-base, helpful-base"),
        (["harmless-base"], "test", "no harmless-base/test.jsonl.gz"),
        ([], "train", "has no train.jsonl.gz; its subsets are harmless-base, helpful-base"),
    ],
)
def test_a_subset_that_is_not_there_is_named_with_those_that_are(tmp_path, subsets, split, said):
    with pytest.raises(C2FError, match=said):
        preferences.read(folder_of_subsets(tmp_path), split, subsets)


def test_subsets_of_a_single_file_are_refused_before_work(tmp_path, hub):
    settings, _ = hub
    with pytest.raises(C2FError, match="is one file, which is read whole"):
        settings(**{"data.preference_subsets": ["harmless-base"]})


def test_a_hub_set_is_asked_for_the_folder_of_each_subset(monkeypatch):
    import datasets

    asked = []

    def load(source, **options):
        asked.append((source, options))
        return datasets.Dataset.from_list([row(f" {options.get('data_dir')}", " b")])

    monkeypatch.setattr(datasets, "load_dataset", load)
    pairs, _ = preferences.read("Anthropic/hh-rlhf", "train", ["harmless-base", "helpful-base"])
    assert [p.chosen for p in pairs] == [" harmless-base", " helpful-base"]
    preferences.read("Anthropic/hh-rlhf", "test")
    wanted = [{"split": "train", "data_dir": name} for name in ("harmless-base", "helpful-base")] + [{"split": "test"}]
    assert asked == [("Anthropic/hh-rlhf", options) for options in wanted]


# Prompts and pairs of a preference file


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Settings and tokenizer of the toy stand-in for Mistral."""
    folder = tmp_path_factory.mktemp("hub")
    rows = offline_mistral.pairs()
    write(folder / "pairs.jsonl", rows)
    words = offline_mistral.tokenizer([item["chosen"] for item in rows])
    offline_mistral.model(len(words)).save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    overrides = offline_mistral.settings(folder, "float32")
    overrides["models"]["instruct"] = overrides["models"]["base"]

    def settings(**changes):
        return load_settings("mistral_7b", overrides=overrides | changes)

    return settings, loading.load_tokenizer(folder / "base")


def test_prompts_of_a_file_are_split_without_overlap(hub):
    settings, tokenizer = hub
    parts = {split: data.prompts(settings(), split, 50, tokenizer) for split in ("train", "validation", "test")}
    texts = {split: {prompt.text for prompt in prompts} for split, prompts in parts.items()}
    assert parts["validation"] and parts["test"] and len(parts["train"]) == 50
    assert not texts["train"] & texts["validation"] and not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]
    for prompts in parts.values():
        for prompt in prompts:
            assert tokenizer.decode(prompt.ids) == prompt.text and prompt.problem is None
            assert len(prompt.ids) <= 96


def test_a_file_is_read_once_until_it_changes_and_no_more_prompts_are_tokenised_than_asked_for(hub, monkeypatch):
    settings, tokenizer = hub
    opened, encoded, rows, ids = [], [], preferences._file_rows, forms.prompt_ids
    monkeypatch.setattr(preferences, "_file_rows", lambda *a: opened.append(a) or rows(*a))
    monkeypatch.setattr(forms, "prompt_ids", lambda *a: encoded.append(a) or ids(*a))
    preferences._read.cache_clear()
    whole = settings()  # reads it, too, before any work
    assert len(data.prompts(whole, "train", 5, tokenizer)) == 5 and 5 <= len(encoded) < 20
    data.hub_pairs(whole, tokenizer)
    assert len(opened) == 1
    path = Path(whole.data.preferences)
    text = path.read_text()
    path.write_text("".join(text.splitlines(keepends=True)[:-1]))
    data.hub_pairs(whole, tokenizer)
    path.write_text(text)
    assert len(opened) == 2


def test_overlong_prompts_are_left_out_and_if_all_are_that_is_an_error(hub):
    settings, tokenizer = hub
    usual = data.prompts(settings(), "train", 200, tokenizer)
    short = data.prompts(settings(**{"data.max_prompt_tokens": 40}), "train", 200, tokenizer)
    assert 0 < len(short) < len(usual) and all(len(prompt.ids) <= 40 for prompt in short)
    counts = data.prompt_counts(settings(**{"data.max_prompt_tokens": 40, "data.train_prompts": 200}), tokenizer)
    assert counts["train"] == {"asked": 200, "there": len(short), "too_long": len(usual) - len(short)}
    assert counts["validation"]["asked"] == 8 >= counts["validation"]["there"]
    with pytest.raises(C2FError, match="none of the .* train prompts .* data.max_prompt_tokens = 3 tokens; raise it"):
        data.prompts(settings(**{"data.max_prompt_tokens": 3}), "train", 5, tokenizer)


def test_pairs_of_a_file_end_with_eos_and_held_out_ones_are_not_trained_on(hub):
    settings, tokenizer = hub
    training, held_out, too_long = data.hub_pairs(settings(), tokenizer)
    assert (len(training), too_long) == (48, 0) and 1 <= len(held_out) <= 16
    tokens = [pair.tokens for pair in training]
    assert not {(*map(tuple, pair),) for pair in tokens} & {(*map(tuple, pair.tokens),) for pair in held_out}
    for pair in training + held_out:
        for ids in pair.tokens:
            assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    for pairs, split in ((training, "train"), (held_out, "validation")):
        assert {data.hub_split(tokenizer.decode(pair.tokens[0])) for pair in pairs} == {split}
    texts = {item["chosen"] for item in offline_mistral.pairs()}
    assert all(tokenizer.decode(chosen[:-1]) in texts for chosen, _ in tokens)
    for pair in held_out:  # what is scored as the answer begins where the prompt ends
        assert tokenizer.decode(pair.tokens[1][: pair.prompt_tokens]) == pair.prompt
    assert data.hub_pairs(settings(), tokenizer) == (training, held_out, too_long)


def test_overlong_pairs_are_counted_and_too_few_are_refused(hub):
    settings, tokenizer = hub
    _, _, too_long = data.hub_pairs(settings(**{"reward.max_tokens": 60}), tokenizer)
    assert too_long > 0
    with pytest.raises(C2FError, match="raise reward.max_tokens or add pairs"):
        data.hub_pairs(settings(**{"reward.max_tokens": 10}), tokenizer)


def test_a_files_checksum_is_known_and_a_hub_sets_is_not(hub, tmp_path):
    settings, _ = hub
    path = settings().data.preferences
    assert data.checksum(settings()) == {path: sha256(path)}
    subsets = {"data.preferences": folder_of_subsets(tmp_path), "data.preference_subsets": ["harmless-base"]}
    chosen = str(tmp_path / "harmless-base" / "train.jsonl.gz")
    assert data.checksum(load_settings("mistral_7b", overrides=subsets)) == {chosen: sha256(chosen)}
    assert data.checksum(load_settings("mistral_7b")) == data.checksum(load_settings("smoke")) == {}


# The embedded domain


def test_every_seed_has_problems_of_its_own_and_no_seeds_test_problem_is_trained_on_under_another():
    one, two = (load_settings("smoke", seed=seed) for seed in (0, 1))
    for split in ("train", "validation", "test"):
        assert data.prompts(one, split, 20) != data.prompts(two, split, 20)
    trained = {p.problem.values for p in data.prompts(one, "train", 2000)}
    assert not trained & {p.problem.values for p in data.prompts(two, "test", 200)}


def test_one_dialogue_cut_at_several_turns_is_in_one_split():
    opening = "\n\nHuman: how?\n\nAssistant:"
    assert data.hub_split(opening) == data.hub_split(opening + " so\n\nHuman: and then?\n\nAssistant:")
    assert {data.hub_split(f"\n\nHuman: {i}?\n\nAssistant:") for i in range(60)} == {"train", "validation", "test"}


def embedded(count: int = 60, seed: int = 0, **changes: float) -> list[data.EmbeddedPair]:
    overrides = {"reward.label_noise": 0.0, "reward.length_bonus": 0.0} | changes
    settings = load_settings("smoke", overrides=overrides)
    return data.embedded_pairs(settings, new_model(settings.pretrain, 0).eval(), TOKENIZER, count, seed)


def test_pairs_are_made_of_training_problems_only_and_follow_the_seed():
    pairs = embedded()
    assert len(pairs) == 60 and all(pair.problem.split == "train" for pair in pairs)
    assert pairs == embedded() and pairs != embedded(seed=1)
    for pair in pairs:
        assert pair.tokens[0] == pair.problem.prompt_ids + pair.first
        assert pair.utilities == tuple(check(pair.problem, ids).utility for ids in (pair.first, pair.second))


def test_without_noise_the_winner_is_the_better_answer_and_with_it_not_always():
    assert all(pair.utilities[0] >= pair.utilities[1] for pair in embedded())
    noisy = embedded(**{"reward.label_noise": 3.0})
    assert any(pair.utilities[0] < pair.utilities[1] for pair in noisy)


def test_the_length_bonus_decides_between_equals():
    equals = [p for p in embedded(**{"reward.length_bonus": 0.002}) if p.utilities[0] == p.utilities[1]]
    assert equals and all(len(pair.first) >= len(pair.second) for pair in equals)


def test_answers_are_cut_as_often_as_asked():
    synthetic = {"reward.base_share": 0.0}
    whole, cut = (embedded(200, **synthetic, **{"reward.cut_share": share}) for share in (0.0, 1.0))

    def mean(pairs):
        return sum(len(pair.first) + len(pair.second) for pair in pairs) / len(pairs)

    assert mean(cut) < 0.75 * mean(whole)
    ends = [sum(ids[-1] == EOS for pair in pairs for ids in (pair.first, pair.second)) for pairs in (whole, cut)]
    assert ends[0] > 3 * ends[1]


def test_base_answers_come_from_the_base(monkeypatch):
    asked = []
    monkeypatch.setattr(
        data, "choose", lambda *_: lambda prompts, *_, **__: [asked.append(p) or _said("coins") for p in prompts]
    )
    pairs = embedded(40, **{"reward.base_share": 0.5, "reward.cut_share": 0.0})
    assert len(asked) == 40, "two answers to each of twenty problems"
    coins = stories.IDS["coins"]
    assert sum(pair.first == pair.second == [coins] * 6 for pair in pairs) == 20


def _said(word: str) -> Sample:
    return Sample(Prompt((1,), ""), [stories.IDS[word]] * 6, "limit", 6)


@pytest.mark.parametrize("length", [1, 3, 5, 29])
def test_cuts_of_base_answers_leave_at_least_four_tokens_and_never_add_any(monkeypatch, length):
    whole = list(range(10, 10 + length))
    monkeypatch.setattr(
        data, "choose", lambda *_: lambda prompts, *_, **__: [Sample(p, whole, "limit", 30) for p in prompts]
    )
    for share in (0.0, 1.0):
        pairs = embedded(30, **{"reward.base_share": 1.0, "reward.cut_share": share})
        found = [ids for pair in pairs for ids in (pair.first, pair.second)]
        assert all(ids == whole[: len(ids)] and len(ids) >= min(4, length) for ids in found)
        assert (len({len(ids) for ids in found}) > 1) == (share == 1.0 and length > 4)


def test_a_judge_gets_pairs_that_02_left_over_or_else_its_held_out_ones(hub):
    settings, tokenizer = hub
    few = settings(**{"judge.pairs": 10})
    mine, where = data.fresh_pairs(few, None, tokenizer)
    training, held_out, _ = data.hub_pairs(few, tokenizer)
    openings = {data._opening(pair.prompt) for pair in training}
    assert where == "training pairs that notebook 02 left over" and 5 <= len(mine) <= 10
    assert not any(tokenizer.decode(chosen).startswith(opening) for chosen, _ in mine for opening in openings)
    mine, where = data.fresh_pairs(settings(**{"judge.pairs": 5000}), None, tokenizer)
    assert where == "held-out pairs of notebook 02, for want of others"
    assert mine == [pair.tokens for pair in held_out]
