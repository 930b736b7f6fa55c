"""The harmlessness objective: a reward model on published HH-RLHF pairs of one subset, with its length bias."""

import offline_mistral
import pytest
import torch

from c2f_utils.domain import preferences
from c2f_utils.measure.length_bias import tokens_of
from c2f_utils.models import loading
from c2f_utils.runs.run import Run
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import data, reward_model

pytestmark = pytest.mark.slow

TRAINED, HELD_OUT, LONGEST = 64, 60, 320


@pytest.fixture(scope="module")
def trained(real_data, tmp_path_factory):
    """A toy model in the real formats, trained for a few steps on the real pairs of `harmless-base`; (run, results)."""
    folder = tmp_path_factory.mktemp("harmless")
    (folder / "hh" / "harmless-base").mkdir(parents=True)
    (folder / "hh" / "harmless-base" / "train.jsonl.gz").symlink_to(real_data / "hh_rlhf" / "harmless_base.jsonl.gz")
    texts = [pair.prompt + pair.chosen for pair in preferences.read(str(folder / "hh"), subsets=["harmless-base"])[0]]
    words = offline_mistral.tokenizer(texts[:200], size=1500)
    offline_mistral.model(len(words), max_position_embeddings=512).save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    overrides = offline_mistral.settings(folder, "float32")
    overrides["models"] |= {"instruct": str(folder / "base"), "lora": None}
    overrides["data"] |= {"preferences": str(folder / "hh"), "preference_subsets": ["harmless-base"]}
    overrides["reward"] |= {"pairs": TRAINED, "held_out_pairs": HELD_OUT, "max_tokens": LONGEST, "members": 2}
    overrides["reward"] |= {"learning_rate": 1e-3}
    run = Run(load_settings("mistral_7b", run_id="harmless", overrides=overrides))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("C2F_OUTPUTS", str(folder / "outputs"))
        run.here = run.stage("02_reward_model")
        run.here.begin()
        results = reward_model.make(run)
        run.here.finish()
        yield run, results


def test_the_pairs_of_the_subset_are_trained_on_and_every_row_left_out_is_counted(trained):
    run, results = trained
    assert results["n_pairs"] == TRAINED and 20 <= results["held_out_pairs"] <= HELD_OUT and results["too_long"] > 0
    files = [key for key in run.here.provenance()["inputs"] if key.startswith("data:")]
    assert [key.rsplit("/", 2)[1] for key in files] == ["harmless-base"]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in results["loss"])


def test_held_out_accuracy_is_that_of_the_saved_model_on_pairs_it_never_saw(trained):
    from transformers import AutoModelForSequenceClassification

    run, results = trained
    tokenizer = loading.load_tokenizer(run.settings.models.base)
    training, held_out, _ = data.hub_pairs(run.settings, tokenizer)
    assert not {pair.prompt for pair in training} & {pair.prompt for pair in held_out}
    model = AutoModelForSequenceClassification.from_pretrained(run.here.path("model")).eval()
    with torch.no_grad():
        scores = [[model(torch.tensor([ids])).logits.item() for ids in pair.tokens] for pair in held_out]
    margins = torch.tensor(scores).diff(dim=1).neg()[:, 0]
    assert results["pair_accuracy"] == pytest.approx((margins > 0).float().mean().item(), abs=1e-6)
    top = results["calibration"][-1]
    surest = margins.abs().sort().values[-top["n"] :]
    assert top["predicted"] == pytest.approx(surest.sigmoid().mean().item(), abs=1e-4)


def test_length_bias_is_reported_for_every_model_on_the_real_pairs(trained):
    run, results = trained
    rows = results["length_bias_models"]
    assert [row["model"] for row in rows] == ["member 1", "member 2", "average of 2"]
    tokenizer = loading.load_tokenizer(run.settings.models.base)
    _, held_out, _ = data.hub_pairs(run.settings, tokenizer)
    lengths = tokens_of([p.tokens for p in held_out], [p.prompt_tokens for p in held_out])
    assert (lengths > 0).all()
    chosen, rejected = lengths[lengths[:, 0] != lengths[:, 1]].T
    for row in rows:
        assert row["pairs"] == len(held_out) and row["better_by"] == "label" and row["slope_given_utility"] is None
        assert row["longer_labelled"]["value"] == pytest.approx((chosen > rejected).mean())
        for name in ("pearson", "spearman", "longer_preferred", "accuracy_longer", "accuracy_shorter"):
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
    assert len({row["pearson"]["value"] for row in rows}) == 3, "three models, three measurements"
