"""The embedded base: a real checkpoint, trained on all its tokens, the same for the same seed."""

import pytest
import torch
from tiny_models import TOKENIZER

from c2f_utils.domain import stories
from c2f_utils.domain.problems import EOS, PAD
from c2f_utils.models import loading, pretrain
from c2f_utils.settings.load import load_settings

# Long enough for the loss to fall, short enough for a test.
SHORT = {"pretrain.tokens": 40_000}


@pytest.fixture(scope="module")
def trained():
    rows: list[dict] = []
    return pretrain.pretrain(load_settings("smoke", overrides=SHORT), rows.append), rows


def test_a_short_run_lowers_the_loss_below_that_of_knowing_nothing(trained):
    _, rows = trained
    untaught = torch.tensor(float(len(stories.VOCABULARY))).log().item()
    assert rows[0]["loss"] == pytest.approx(untaught, abs=0.4)
    assert rows[-1]["loss"] < 0.75 * untaught
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert rows[-1]["tokens"] >= 0.9 * 40_000 and set(rows[0]) == {"step", "tokens", "loss", "lr"}


def test_the_checkpoint_loads_with_transformers_alone(trained, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, _ = trained
    loading.save_model(model, TOKENIZER, tmp_path / "model")
    loaded, words = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    assert loaded.config.model_type == "mistral" and loaded.config.vocab_size == len(words) == len(stories.VOCABULARY)
    assert loaded.config.eos_token_id == EOS and loaded.config.pad_token_id == PAD
    ids = torch.tensor([stories.problems("test", 1, 0)[0].prompt_ids])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def weights(seed: int) -> torch.Tensor:
        settings = load_settings("smoke", seed=seed, overrides={"pretrain.tokens": 8_000})
        return torch.cat([p.flatten() for p in pretrain.pretrain(settings).parameters()])

    one, two, other = weights(0), weights(0), weights(1)
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_batches_hold_every_document_once_within_their_budget():
    settings = load_settings("smoke", overrides=SHORT)
    corpus = list(stories.documents(40_000, 0, settings.data.operations))
    batches = list(pretrain.batches(corpus, settings.pretrain.tokens_per_step, 0))
    documents = sorted(map(tuple, corpus))
    found = sorted(tuple(row[row != PAD].tolist()) for batch in batches for row in batch)
    assert found == documents
    assert all(batch.numel() <= settings.pretrain.tokens_per_step or len(batch) == 1 for batch in batches)
    padding = sum(int((batch == PAD).sum()) for batch in batches) / sum(batch.numel() for batch in batches)
    assert padding < 0.1, "documents of similar length share a batch"


def test_every_weight_belongs_to_one_optimiser():
    settings = load_settings("smoke")
    model = pretrain.new_model(settings.pretrain, 0)
    muon, adam = pretrain.optimisers(model, settings.pretrain)
    held = [id(p) for o in (muon, adam) for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])


def test_the_learning_rate_is_constant_and_then_falls_to_a_twentieth():
    assert pretrain.schedule(0.0) == pretrain.schedule(0.49) == 1.0
    assert pretrain.schedule(0.75) == pytest.approx(0.525) and pretrain.schedule(1.0) == pytest.approx(0.05)
