"""The third sampler against a fake of vLLM's interface (`fake_vllm.py`): the same promises as the other two, weights
that arrive, and a training in which the engine computes another policy than the trainer.
"""

import importlib.util
import os
import random
import sys
from types import SimpleNamespace

import fake_vllm
import numpy as np
import pytest
import torch
from test_clean_answers import model_that_meets_a_stop_string
from tiny_models import SHAPE, TOKENIZER, causal, prompts, trainer
from transformers import AutoModelForCausalLM

from c2f_utils.coarse.actor_critic import ActorCritic, Critic
from c2f_utils.domain.problems import EOS, PAD
from c2f_utils.domain.samples import Prompt
from c2f_utils.errors import C2FError
from c2f_utils.models.loading import add_lora
from c2f_utils.models.packing import collate
from c2f_utils.rollout import vllm
from c2f_utils.rollout.check import agree
from c2f_utils.rollout.choice import choose
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.rollout.library import LibrarySampler
from c2f_utils.rollout.sampler import sample_of
from c2f_utils.rollout.vllm import VLLMSampler
from c2f_utils.settings.config import Lora
from c2f_utils.settings.load import load_settings
from c2f_utils.stages.inputs import Inputs


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    """The fake in the place of the package, and no engine from before."""
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setattr(fake_vllm.LLM, "started", [])
    vllm.engine.cache_clear()
    yield fake_vllm.LLM
    vllm.engine.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as it lies on disk."""
    place = tmp_path_factory.mktemp("model")
    causal().save_pretrained(place)
    TOKENIZER.save_pretrained(place)
    return place


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def adapted(model):
    """The model with adapters that have moved."""
    torch.manual_seed(0)
    model = add_lora(model, Lora(rank=4, alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def same(ours, theirs) -> bool:
    facts = [[(s.ids, s.sampled, s.stop, s.limit, s.text) for s in answers] for answers in (ours, theirs)]
    return facts[0] == facts[1] and torch.allclose(
        torch.cat([s.logps for s in ours]), torch.cat([s.logps for s in theirs]), atol=1e-4
    )


def test_greedy_answers_and_their_logps_are_the_librarys_under_a_limit_for_each(model):
    limits = [1, 3, 24, 5, 24, 2]
    ours = LibrarySampler(model, TOKENIZER)(prompts(6), limits, temperature=0.0)
    theirs = VLLMSampler(model, TOKENIZER)(prompts(6), limits, temperature=0.0)
    assert same(ours, theirs) and {s.stop for s in theirs} == {"eos", "limit"}


def test_sampled_logps_are_those_of_the_tempered_policy(model):
    drawn = VLLMSampler(model, TOKENIZER)(prompts(6), 20, temperature=0.7, seed=4)
    with torch.no_grad():
        flat = ActorCritic(model, Critic(SHAPE.hidden_size))(collate(drawn, PAD), 0.7)[0]
    assert (flat - torch.cat([s.logps for s in drawn])).abs().max() < 1e-4


def test_the_same_seed_repeats_another_does_not_and_every_answer_has_its_own(model):
    asked = [prompts(1)[0]] * 4
    first, again, other = (VLLMSampler(model, TOKENIZER)(asked, 20, seed=seed) for seed in (2**61, 2**61, 2))
    assert [s.ids for s in first] == [s.ids for s in again] != [s.ids for s in other]
    assert len({tuple(s.ids) for s in first}) > 1


def test_an_engine_that_starts_touches_nobodys_random_numbers(model, engine):
    def numbers():
        return random.random(), np.random.rand(), float(torch.rand(()))

    def seeded():
        random.seed(3), np.random.seed(3), torch.manual_seed(3)

    seeded()
    expected = numbers()
    seeded()
    VLLMSampler(model, TOKENIZER)(prompts(2), 4)
    assert numbers() == expected and len(engine.started) == 1


def test_new_weights_are_seen_at_the_next_call(model):
    sampler = VLLMSampler(model, TOKENIZER)
    before = sampler(prompts(4), 16, temperature=0.0)
    model.load_state_dict(causal(7).state_dict())
    after = sampler(prompts(4), 16, temperature=0.0)
    assert same(after, KVDecoder(model, TOKENIZER)(prompts(4), 16, temperature=0.0))
    assert [s.ids for s in after] != [s.ids for s in before]


def test_a_prefix_cache_that_stays_is_refused(model, engine, monkeypatch):
    monkeypatch.setattr(engine, "reset_prefix_cache", lambda self: False)
    with pytest.raises(C2FError, match="older weights"):
        VLLMSampler(model, TOKENIZER)(prompts(2), 4)


def test_adapters_are_merged_on_the_way_and_the_actors_own_weights_are_untouched(model):
    plain = KVDecoder(model, TOKENIZER)(prompts(4), 16, temperature=0.0)
    actor = adapted(model)
    own = {name: weight.clone() for name, weight in actor.state_dict().items()}
    ours = KVDecoder(actor, TOKENIZER)(prompts(4), 16, temperature=0.0)
    sampler = VLLMSampler(actor, TOKENIZER)
    assert same(ours, sampler(prompts(4), 16, temperature=0.0)) and not same(ours, plain)
    with actor.disable_adapter():
        assert same(plain, sampler(prompts(4), 16, temperature=0.0))
    assert own.keys() == actor.state_dict().keys()
    assert all(torch.equal(own[name], weight) for name, weight in actor.state_dict().items())


def test_stop_strings_end_answers_where_our_decoder_ends_them(tmp_path):
    made, words, asked, string = model_that_meets_a_stop_string()
    made.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = KVDecoder(model, words, stop_strings=[string])(asked, 40, temperature=0.0)
    theirs = VLLMSampler(model, words, stop_strings=[string])(asked, 40, temperature=0.0)
    assert same(ours, theirs) and any(s.stop == "string" for s in theirs)
    assert any(s.sampled != s.ids[:-1] for s in theirs if s.stop == "string"), "the string's own tokens stay sampled"


def test_an_engine_stops_at_a_stop_string_though_it_is_a_special_token(model, engine, monkeypatch):
    made, generate = [], engine.generate
    monkeypatch.setattr(engine, "generate", lambda *a, **k: made.extend(generate(*a, **k)) or made)
    with torch.no_grad():
        model.lm_head.weight[0] = 3 * model.lm_head.weight[EOS]
        model.lm_head.weight[EOS] = 0
    word = TOKENIZER.decode([0])
    assert word in TOKENIZER.all_special_tokens
    ours = KVDecoder(model, TOKENIZER, stop_strings=[word])(prompts(6), 24, temperature=0.0)
    theirs = VLLMSampler(model, TOKENIZER, stop_strings=[word])(prompts(6), 24, temperature=0.0)
    assert same(ours, theirs) and any(s.stop == "string" for s in theirs)
    assert [o.outputs[0].token_ids for o in made] == [s.sampled for s in theirs]


def test_what_an_engine_saw_as_a_stop_string_is_no_cut():
    """Engines read tokens with the prompt before them, where a tokenizer may show a space that ours swallows."""
    ids = [i for i in range(5, 9) if i != EOS]
    known = TOKENIZER, frozenset({EOS}), ("never there",)
    assert sample_of(prompts(1)[0], 9, ids, torch.zeros(len(ids)), *known).stop == "string"
    assert sample_of(prompts(1)[0], len(ids), ids, torch.zeros(len(ids)), *known).stop == "limit"


def test_one_engine_serves_every_sampler_of_a_process(model, engine, folder):
    first = choose(model, TOKENIZER, 4096, engine="vllm", memory=0.2)
    other = choose(AutoModelForCausalLM.from_pretrained(folder), TOKENIZER, 4096, engine="vllm", memory=0.2)
    assert type(first) is type(other) is VLLMSampler and not engine.started, "no engine before there is work"
    first(prompts(2), 4), other(prompts(2), 4), first([], 4)
    assert engine.started == [{"model": str(folder), "dtype": "float32", "memory": 0.2, "revision": None}]
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_the_self_check_passes_it_and_catches_weights_that_do_not_arrive(model, engine, monkeypatch):
    assert agree(model, VLLMSampler(model, TOKENIZER), prompts(6)).holds
    monkeypatch.setattr(engine, "deaf", True)
    vllm.engine.cache_clear()
    with pytest.raises(C2FError, match="self-check failed: .* through VLLMSampler"):
        agree(model, VLLMSampler(model, TOKENIZER), prompts(6))


def test_a_model_whose_weights_the_engine_does_not_know_is_refused_by_the_self_check(model):
    model.stray = torch.nn.Linear(2, 2)
    with pytest.raises(C2FError, match=r"named 'stray.weight'(.|\n)*set coarse.engine to 'library'"):
        agree(model, VLLMSampler(model, TOKENIZER), prompts(6))


def test_in_bfloat16_the_self_check_goes_by_the_mean(folder):
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    found = agree(half, VLLMSampler(half, TOKENIZER), prompts(6))
    assert found.holds and found.dtype == "bfloat16"


def test_what_it_cannot_serve_is_refused(model, engine, monkeypatch):
    sampler = VLLMSampler(model, TOKENIZER)
    with pytest.raises(C2FError, match="128"):
        sampler(prompts(2), 120)
    with pytest.raises(C2FError, match="empty prompt"):
        sampler([Prompt((), "")], 4)
    with pytest.raises(C2FError, match="loaded from no folder"):
        VLLMSampler(causal(), TOKENIZER)
    with pytest.raises(C2FError, match=r"max_model_len(.|\n)*coarse.engine_memory \(7\)"):
        VLLMSampler(model, TOKENIZER, memory=7)(prompts(2), 4)
    lost = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[], logprobs=[], finish_reason="abort")])
    monkeypatch.setattr(engine, "generate", lambda self, asked, *_, **__: [lost] * len(asked))
    with pytest.raises(C2FError, match="no token .abort."):
        sampler(prompts(2), 4)


def test_without_the_package_the_remedy_is_said_before_any_work(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(C2FError, match=r"pip install -e '.\[vllm\]'"):
        VLLMSampler(model, TOKENIZER)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(C2FError, match=r"coarse.engine = 'vllm' needs the package(.|\n)*'.\[vllm\]'"):
        load_settings("smoke", overrides={"coarse.engine": "vllm"})


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"models.device": "cpu"}, "needs a GPU"),
        ({"coarse.processes": 2}, "coarse.processes is 2"),
        ({"coarse.old_logps": "recorded"}, "coarse.old_logps is 'recorded'"),
    ],
)
def test_combinations_that_cannot_be_are_refused(changes, said):
    with pytest.raises(C2FError, match=said):
        load_settings("smoke", overrides={"coarse.engine": "vllm"} | changes)
    assert load_settings("smoke", overrides=changes), "without vLLM there is nothing against it"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_without_a_gpu_it_is_refused(model):
    settings = load_settings("smoke", overrides={"coarse.engine": "vllm"})
    with pytest.raises(C2FError, match="torch sees no GPU"):
        Inputs.sampler(SimpleNamespace(settings=settings), model, settings.coarse, 64)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_training_runs_on_it_with_log_probs_of_the_trainer_and_weights_up_to_the_cap(
    lora, folder, engine, monkeypatch
):
    monkeypatch.setattr(engine, "noise", 0.3)
    process = trainer("logistic", lora=lora, engine="vllm", importance_cap=1.1)
    actor = process.policy.actor
    unwrapped = actor.get_base_model() if lora else actor
    unwrapped.name_or_path = str(folder)
    process.sampler = VLLMSampler(actor, TOKENIZER)
    e = process.judge(process.collect())
    assert not torch.allclose(e.logps, e.sampler_logps, atol=0.01), "in float32, too, the trainer's own"
    assert float(e.weights[e.mask].max()) == pytest.approx(1.1) and float(e.weights[e.mask].min()) < 0.95
    rows = list(process)
    assert len(rows) == 4 and len(engine.started) == 1
    for row in rows:
        assert row["sampler_mismatch"] > 0.01 and 0 < row["truncated_weights"] < 1 and row["ratio_error"] < 1e-4


def test_without_a_mismatch_a_training_on_it_weights_nothing(folder):
    process = trainer("fixed", engine="vllm")
    process.policy.actor.name_or_path = str(folder)
    process.sampler = VLLMSampler(process.policy.actor, TOKENIZER)
    for row in [process.step() for _ in range(2)]:
        assert row["sampler_mismatch"] < 1e-5 and row["truncated_weights"] == 0
