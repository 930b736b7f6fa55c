"""The instruction model: learns answers, not questions, and learns that they end."""

import pytest
import torch
from tiny_models import TOKENIZER, causal

from c2f_utils.domain import stories
from c2f_utils.domain.problems import EOS
from c2f_utils.domain.samples import make_prompts
from c2f_utils.errors import C2FError
from c2f_utils.measure import answers
from c2f_utils.models import instruct, loading
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import instruction_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    loading.save_model(causal(scale=1.0), TOKENIZER, folder)
    return folder


def settings(tokens: int = 6000, seed: int = 0, **changes: object):
    return load_settings("smoke", seed=seed, overrides={"instruct.tokens": tokens, **changes})


def test_the_loss_counts_answer_tokens_only(base, monkeypatch):
    import trl

    batches: list[dict] = []

    class Spy(trl.SFTTrainer):
        def compute_loss(self, model, inputs, *rest, **options):
            batches.append({key: inputs[key].clone() for key in ("input_ids", "labels", "attention_mask")})
            return super().compute_loss(model, inputs, *rest, **options)

    monkeypatch.setattr(trl, "SFTTrainer", Spy)
    _, count = instruct.train(base, TOKENIZER, settings(3000))
    examples = {tuple(p + a): len(p) for p, a in stories.instructions(3000, 0.35, 0, (3, 5))}
    seen = set()
    for batch in batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            real = tuple(ids[mask.bool()].tolist())
            prompt = examples[real]
            seen.add(real)
            assert (labels[:prompt] == -100).all(), "the question is masked"
            assert labels[prompt : len(real)].tolist() == list(real[prompt:]), "the answer with its end is not"
            assert real[-1] == EOS and (labels[len(real) :] == -100).all()
    assert seen == set(examples) and count == len(examples)


def test_beside_bfloat16_the_weights_that_are_trained_are_float32(base, tmp_path, monkeypatch):
    import trl

    trained = set()

    class Spy(trl.SFTTrainer):
        def compute_loss(self, model, *rest, **options):
            trained.update(p.dtype for p in model.parameters())
            return super().compute_loss(model, *rest, **options)

    monkeypatch.setattr(trl, "SFTTrainer", Spy)
    model, _ = instruct.train(base, TOKENIZER, settings(1000, **{"models.dtype": "bfloat16"}))
    assert trained == {torch.float32} and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    loading.save_model(model, TOKENIZER, tmp_path / "model")
    ids = torch.arange(1, 40)[None]
    again = loading.load_causal(tmp_path / "model", settings(**{"models.dtype": "bfloat16"}).models)
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_a_model_of_another_family_in_the_same_shape_is_refused():
    ours, tuned, stranger = causal(0), causal(0), causal(1)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.1 * weight.abs().mean() * torch.randn_like(weight)
    assert instruction_model._refuse_strangers(ours, tuned, "tuned") > 0.95
    with pytest.raises(C2FError, match="'stranger' has the base model's shape and other weights.*cosine.* expected"):
        instruction_model._refuse_strangers(ours, stranger, "stranger")
    del stranger.lm_head
    with pytest.raises(C2FError, match="not of the base model's shape: 1 tensors differ, the first is lm_head.weight"):
        instruction_model._refuse_strangers(ours, stranger, "stranger")


def test_it_learns_to_end_its_answers(base):
    bare = {"instruct.learning_rate": 5e-3, "instruct.worked_share": 0.0}
    losses: list[dict] = []
    model, _ = instruct.train(base, TOKENIZER, settings(60_000, **bare), losses.append)
    assert losses[-1]["loss"] < 0.6 * losses[0]["loss"] and not model.training
    prompts = make_prompts(stories.problems("validation", 16, 0))
    ends = [
        answers.measure(answers.answers(m, TOKENIZER, prompts, "sampled_t1", 40, 0))["eos_rate"]
        for m in (loading.load_causal(base, settings().models), model)
    ]
    assert ends[1] > 0.9 > ends[0]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(base):
    one, two, other = (instruct.train(base, TOKENIZER, settings(2000, seed))[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
