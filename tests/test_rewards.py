"""The reward model: trained on exactly the tokens it is given, read off at known lengths, averaged and normalised."""

import copy

import pytest
import torch
from tiny_models import SHAPE, TOKENIZER, causal, prompts, samples

from c2f_utils.domain import stories
from c2f_utils.domain.problems import EOS, PAD, check
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError, Stopped
from c2f_utils.models import course, loading, rewards
from c2f_utils.settings.load import load_settings

QUESTION = tuple(stories.problems("train", 1, 0)[0].prompt_ids)


def settings(**changes: object):
    return load_settings("smoke", overrides={"reward.learning_rate": 5e-3, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    loading.save_model(causal(), TOKENIZER, folder)
    return folder


@pytest.fixture
def scorer(base):
    return rewards.RewardModel(rewards.new_reward_model(base, settings(), 0).eval(), PAD)


def pairs(count: int) -> list[rewards.Pair]:
    """The chosen answer speaks of coins; half of the answers are cut, half end."""
    made = []
    for number in range(count):
        ending = [EOS] if number % 2 else []
        good, bad = ([stories.IDS[word]] * (2 + number % 5) + ending for word in ("coins", "not"))
        made.append(([*QUESTION, *good], [*QUESTION, *bad]))
    return made


@pytest.fixture
def seen(monkeypatch):
    """What TRL's trainer was told, and the batches it made of it."""
    import trl

    record: dict = {"batches": []}

    class Spy(trl.RewardTrainer):
        def __init__(self, **arguments):
            record.update(arguments)
            super().__init__(**arguments)

        def compute_loss(self, model, inputs, *rest, **options):
            record["batches"].append({key: value.clone() for key, value in inputs.items()})
            record["trained"] = {p.dtype for p in model.parameters() if p.requires_grad}
            return super().compute_loss(model, inputs, *rest, **options)

    monkeypatch.setattr(trl, "RewardTrainer", Spy)
    return record


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}], ids=["all weights", "adapters"])
def test_beside_bfloat16_what_is_trained_is_float32(base, tmp_path, seen, lora):
    """bfloat16 weights would swallow steps at usual learning rates, and the library's trainer keeps no masters."""
    rows: list[dict] = []
    half = settings(**{"models.dtype": "bfloat16", "models.lora": lora, "reward.learning_rate": 1e-5})
    model = rewards.train(base, pairs(16), TOKENIZER, half, 0, rows.append)
    assert seen["trained"] == {torch.float32} and seen["args"].bf16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and rows
    loading.save_model(model, TOKENIZER, tmp_path / "model")
    ids = torch.arange(1, 40)[None]
    again = rewards.load_reward_model(tmp_path / "model", half, PAD).model
    assert torch.equal(model(ids).logits, again(ids).logits), "as if it had been loaded"


def test_the_trainer_gets_token_ids_and_neither_cuts_nor_ends_them(base, seen):
    given = pairs(24)
    longest = [*QUESTION, *[stories.IDS["coins"]] * 60]  # longer than anything a default limit would let pass
    given.append((longest, list(QUESTION) + [stories.IDS["not"]]))
    rewards.train(base, given, TOKENIZER, settings(**{"reward.epochs": 1}), 0)
    assert seen["args"].max_length is None
    assert set(seen["train_dataset"].column_names) == {"chosen_ids", "rejected_ids"}
    rows = [
        tuple(ids[mask.bool()].tolist())
        for batch in seen["batches"]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    wanted = sorted(tuple(ids) for pair in given for ids in pair)
    assert sorted(rows) == wanted, "every sequence as it was given: no EOS appended, nothing left out"
    assert any(row[-1] != EOS for row in rows) and any(row[-1] == EOS for row in rows)


def test_training_ranks_what_it_was_shown_and_logs_its_loss(base):
    losses: list[dict] = []
    model = rewards.train(base, pairs(96), TOKENIZER, settings(**{"reward.epochs": 2}), 0, losses.append)
    scorer = rewards.RewardModel(model, PAD)
    chosen, rejected = (scorer([_whole(pair[side]) for pair in pairs(10)]) for side in (0, 1))
    assert (chosen > rejected).all()
    assert losses[-1]["loss"] < 0.3 < losses[0]["loss"] and set(losses[0]) == {"step", "loss"}
    assert not model.training


def test_adapters_are_merged_into_an_ordinary_model(base):
    lora = {"rank": 4, "alpha": 8}
    hub = load_settings("smoke", overrides={"reward.learning_rate": 5e-3, "models.lora": lora})
    model = rewards.train(base, pairs(48), TOKENIZER, hub, 0)
    assert type(model).__name__ == "MistralForSequenceClassification"
    assert not any("lora" in name for name, _ in model.named_parameters())
    before = causal().model.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    scorer = rewards.RewardModel(model, PAD)
    assert float((scorer([_whole(c) for c, _ in pairs(8)]) - scorer([_whole(r) for _, r in pairs(8)])).mean()) > 0


def test_the_same_seed_gives_the_same_reward_model(base):
    one, two, other = (rewards.train(base, pairs(24), TOKENIZER, settings(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["score.weight"], other["score.weight"])


@pytest.mark.parametrize("lora", (None, {"rank": 4, "alpha": 8}), ids=("whole", "adapters"))
def test_a_training_that_was_killed_or_stopped_ends_as_one_that_was_not(base, tmp_path, monkeypatch, lora):
    monkeypatch.setattr(course, "EVERY", 0.0)  # a checkpoint after every step
    given, hub = pairs(48), load_settings("smoke", overrides={"reward.learning_rate": 5e-3, "models.lora": lora})
    whole, steps, losses, again = [], [], [], []
    expected = rewards.train(base, given, TOKENIZER, hub, 0, whole.append, progress=lambda at, of: steps.append(of))

    def kill(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewards.train(base, given, TOKENIZER, hub, 0, losses.append, tmp_path, progress=kill)
    assert course.latest(tmp_path).name == "checkpoint-1"
    (tmp_path / "checkpoint-9").mkdir()  # a kill while it was written: nothing says that it is whole
    asked = iter((False, True))
    with pytest.raises(Stopped, match=rf"reward model: stopped after step 3 of {steps[0]}; run again to continue"):
        rewards.train(base, given, TOKENIZER, hub, 0, losses.append, tmp_path, stop=lambda: next(asked))
    model = rewards.train(base, given, TOKENIZER, hub, 0, again.append, tmp_path)
    assert again == whole
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    done = rewards.train(base, given, TOKENIZER, hub, 0, lambda row: None, tmp_path)  # killed just after its end
    assert all(torch.equal(value, wanted[name]) for name, value in done.state_dict().items())


def test_no_pairs_are_refused(base):
    with pytest.raises(C2FError, match="no preference pairs are left"):
        rewards.train(base, [], TOKENIZER, settings(), 0)


def _whole(ids) -> Sample:
    return Sample(Prompt(tuple(ids[:-1]), ""), list(ids[-1:]), "limit", 1)


def test_prefix_scores_equal_the_scores_of_really_cut_answers(scorer):
    batch = samples(causal(), 4, 12)
    for sample, row in zip(batch, scorer.prefix_scores(batch), strict=True):
        assert len(row) == sample.tokens
        for length in range(1, sample.tokens + 1):
            cut = Sample(sample.prompt, sample.ids[:length], "limit", length)
            assert scorer([cut])[0].item() == pytest.approx(row[length - 1].item(), abs=1e-5)


def test_the_score_is_the_one_of_the_librarys_own_forward(scorer):
    for sample in samples(causal(), 6, 20):
        ids = torch.tensor([[*sample.prompt.ids, *sample.ids]])
        with torch.no_grad():
            assert scorer.model(ids).logits[0, 0].item() == pytest.approx(scorer([sample])[0].item(), abs=1e-5)


def test_neither_padding_nor_company_changes_a_score(scorer):
    batch = samples(causal(), 8, [1, 3, 30, 5, 30, 2, 9, 14])
    together = scorer(batch)
    for sample, score in zip(batch, together, strict=True):
        assert scorer([sample])[0].item() == pytest.approx(score.item(), abs=1e-5)
    for budget in (1, 60, 200):
        narrow = rewards.RewardModel(scorer.model, PAD, tokens_per_batch=budget)
        assert torch.allclose(narrow(batch), together, atol=1e-5)
    other_pad = rewards.RewardModel(scorer.model, stories.IDS["coins"])
    assert torch.allclose(other_pad(batch), together, atol=1e-5), "padding is never read"


def test_rewards_are_normalised_on_the_samples_given(scorer):
    batch = samples(causal(), 40, 20)
    normal = scorer.normalised_on(batch)
    values = normal(batch)
    assert values.mean().item() == pytest.approx(0, abs=1e-5) and values.std().item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(normal(batch) * normal.std + normal.mean, scorer(batch), atol=1e-5)
    again = normal.normalised_on(batch)
    assert (again.mean, again.std) == (pytest.approx(normal.mean, abs=1e-5), pytest.approx(normal.std, abs=1e-5))


@pytest.mark.parametrize(("value", "said"), [(0.0, "the same score"), (float("nan"), "non-finite")])
def test_a_reward_model_that_says_nothing_is_refused(scorer, value, said):
    torch.nn.init.constant_(scorer.model.score.weight, value)
    with pytest.raises(C2FError, match=said):
        scorer.normalised_on(samples(causal(), 4, 8))


def test_the_average_of_reward_models_is_the_mean_of_their_weights(base):
    members = [rewards.new_reward_model(base, settings(), seed) for seed in range(3)]
    for number, member in enumerate(members):
        with torch.no_grad():
            for weight in member.parameters():
                weight.add_(0.1 * number)
    kept = [copy.deepcopy(member.state_dict()) for member in members]
    mean = rewards.average(members).state_dict()
    for name, value in mean.items():
        assert torch.allclose(value, sum(state[name] for state in kept) / 3, atol=1e-6), name
    alone = rewards.new_reward_model(base, settings(), 0)
    before = copy.deepcopy(alone.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in rewards.average([alone]).state_dict().items())


def test_a_new_head_is_small_and_follows_the_seed(base):
    heads = [rewards.new_reward_model(base, settings(), seed).score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx((SHAPE.hidden_size + 1) ** -0.5, rel=0.4)


def test_a_finished_reward_model_is_loaded_with_its_normalisation(base, scorer, tmp_path):
    loading.save_model(scorer.model, TOKENIZER, tmp_path / "model")
    loaded = rewards.load_reward_model(tmp_path / "model", settings(), PAD, mean=0.5, std=2.0)
    batch = samples(causal(), 4, 12)
    assert torch.allclose(loaded(batch), (scorer(batch) - 0.5) / 2.0, atol=1e-5)


def test_a_model_with_two_outputs_is_no_reward_model(base, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    loading.save_model(model, TOKENIZER, tmp_path / "two")
    with pytest.raises(C2FError, match="2 outputs; expected one score per sequence"):
        rewards.load_reward_model(tmp_path / "two", settings(), PAD)


def test_a_causal_model_is_no_reward_model(base):
    with pytest.raises(C2FError, match="reward model"):
        rewards.load_reward_model(base, settings(), PAD)


def test_the_verifiable_reward_is_the_utility_and_needs_known_answers():
    batch = samples(causal(), 5, 20)
    expected = [check(sample.prompt.problem, sample.ids).utility for sample in batch]
    assert rewards.verifiable(batch).tolist() == pytest.approx(expected)
    right = stories.encode(f"answer : {batch[0].prompt.problem.answer} .".split())
    better = rewards.verifiable([Sample(batch[0].prompt, right, "limit", 4)])
    assert better.item() > rewards.verifiable([Sample(batch[0].prompt, right[:2], "limit", 2)]).item()
    foreign = [Sample(Prompt(prompts(1)[0].ids, "?"), [5], "limit", 1)]
    with pytest.raises(C2FError, match="use a reward model"):
        rewards.verifiable(foreign)
