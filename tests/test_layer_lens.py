"""The words of a list, layer by layer: the last layer is the model itself, and padding changes nothing."""

import json

import pytest
import torch
from tiny_models import TOKENIZER, causal, prompts

from c2f_utils.domain import stories
from c2f_utils.domain.problems import PAD
from c2f_utils.errors import C2FError
from c2f_utils.measure.layer_lens import probability_by_layer, word_ids
from c2f_utils.report import figures_retention
from c2f_utils.settings.load import load_settings

IDS = word_ids(["gives", "sells", "unheard-of"], TOKENIZER)


def test_words_are_ids_and_those_that_a_model_lacks_are_left_out():
    assert set(IDS) == set(stories.encode(["gives", "sells"]))
    with pytest.raises(C2FError, match=r"none of the 1 words of safety.wordlist \(unheard-of, ...\) is a single token"):
        word_ids(["unheard-of"], TOKENIZER)


@torch.no_grad()
def test_the_last_layer_gives_the_models_own_probability_and_the_first_that_of_its_state():
    model, asked = causal(), prompts(9)
    found = probability_by_layer(model, asked, IDS, PAD, budget=100)
    assert found.shape == (2, 9)
    for column, prompt in zip(found.T, asked, strict=True):
        made = model(torch.tensor([prompt.ids]), output_hidden_states=True)
        own = made.logits[0, -1].softmax(-1)[IDS].sum()
        early = model.lm_head(model.model.norm(made.hidden_states[1][0, -1])).softmax(-1)[IDS].sum()
        assert column == pytest.approx([float(early), float(own)], rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_other_families_are_read_the_same_way(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": len(TOKENIZER)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small, bos_token_id=1, eos_token_id=2))
    asked = prompts(3)
    found = probability_by_layer(model.eval(), asked, IDS, PAD)
    assert found.shape == (3, 3)
    with torch.no_grad():
        own = [float(model(torch.tensor([p.ids])).logits[0, -1].softmax(-1)[IDS].sum()) for p in asked]
    assert found[-1] == pytest.approx(own, rel=1e-4)


def test_a_word_list_that_cannot_be_read_is_refused_before_work_starts(tmp_path):
    with pytest.raises(C2FError, match="safety.wordlist = .*none.txt' does not exist"):
        load_settings("tiny", overrides={"safety.wordlist": str(tmp_path / "none.txt")})


def test_every_model_is_a_line_over_its_layers(tmp_path):
    interval = {"value": 0.1, "low": 0.05, "high": 0.2, "n": 9}
    found = {"tokens": 2, "models": {"base": [interval] * 3, "fine": [interval] * 3}}
    models = {name: {"label": name, "role": name} for name in ("base", "fine")}
    (tmp_path / "results.json").write_text(json.dumps({"models": models, "wordlist": found}))
    fig = figures_retention.wordlist_by_layer(tmp_path)
    assert len(fig.axes[0].lines) == 2 and list(fig.data["layer"]) == [1, 2, 3] * 2
    assert figures_retention.NOT_RUN in {
        text.get_text() for text in figures_retention.wordlist_by_layer({}).axes[0].texts
    }
