"""Any causal model is sampled and trained as itself, or refused in a sentence; planted errors are seen."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from tiny_models import LAWS, TOKENIZER, PrefixReward, causal, prompts
from transformers import AutoModelForSequenceClassification

from c2f_utils.coarse import heads
from c2f_utils.coarse.actor_critic import ActorCritic, Critic
from c2f_utils.coarse.trainer import CoarseTrainer
from c2f_utils.domain import stories
from c2f_utils.errors import C2FError
from c2f_utils.models import rewards
from c2f_utils.models.loading import add_lora
from c2f_utils.models.packing import collate
from c2f_utils.rollout import check, choice, decoder
from c2f_utils.rollout.anatomy import trunk_of
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.rollout.library import LibrarySampler
from c2f_utils.rollout.proxy import ProxyDecoder
from c2f_utils.settings.config import Coarse, Lora
from c2f_utils.settings.laws import make_law

FILE = Path(__file__).parent.parent / "benchmarks" / "layouts.py"
spec = importlib.util.spec_from_file_location("layouts", FILE)
layouts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layouts)

OURS = {"llama", "mistral", "qwen2"}
REFUSED = {
    "bart": "nats (at most 0.0001)",  # it takes no position ids, so left padding moves its positions
    "bert": "gives no cache whose rows can be dropped",
    "recurrent_gemma": "gives no cache whose rows can be dropped",
    "llama4_text": "nats (at most 0.0001)",  # the library's chunks move with left padding
}
OWN_HEAD = {"gemma2", "granite", "cohere", "cohere2", "phi", "nanochat"}


def scorer(model, head=None):
    head = head or heads.Head(model)
    return lambda answers: head.score(model, collate(answers, 0))


def moved(model):
    """The same model with adapters that have been trained."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def adapted(kind: str, targets: list[str], also=None):
    torch.manual_seed(1)
    return moved(add_lora(layouts.model_of(kind), Lora(rank=2, alpha=4, targets=targets), also=also))


@pytest.mark.parametrize("kind", layouts.LAYOUTS)
def test_a_class_is_sampled_and_trained_as_itself_or_refused_in_a_sentence(kind):
    row = layouts.row_of(kind)
    if kind in REFUSED:
        assert REFUSED[kind] in row["refused"] and row["class"] in row["refused"]
        return
    assert row["sampler"] == ("KVDecoder" if kind in OURS else "LibrarySampler")
    assert row["greedy_equal"] == "20/20" and row["own_head"] == (kind in OWN_HEAD)
    assert row["sampler_error"] <= 1e-4 and row["trainer_error"] <= 1e-4


# What our decoder leaves out of each: forced upon it, the self-check must see it.
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("qwen3", id="norm"),
        pytest.param("granite", id="scale"),
        pytest.param("gemma2", id="soft cap"),
        pytest.param("smollm3", id="NoPE"),
    ],
)
def test_our_decoder_forced_upon_a_layout_that_it_does_not_compute_is_caught(kind, monkeypatch):
    model = layouts.model_of(kind)
    model.config.sliding_window = 128
    monkeypatch.setattr(decoder, "unlike_llama", lambda model: "")
    with pytest.raises(C2FError, match=f"self-check failed: {type(model).__name__}.*through KVDecoder.*sampler"):
        check.agree(model, KVDecoder(model, layouts.Numbers()), layouts.prompts())


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: layouts.model_of("granite"), id="scale"),
        pytest.param(lambda: layouts.model_of("gemma2"), id="soft cap"),
        pytest.param(lambda: layouts.model_of("phi"), id="bias"),
        pytest.param(lambda: adapted("llama", ["q_proj", "lm_head"]), id="adapter on head"),
    ],
)
def test_a_trainer_that_passes_by_the_models_own_head_is_caught(model):
    made = model()
    sampler, head = choice.choose(made, layouts.Numbers()), heads.Head(made)
    assert check.agree(made, sampler, layouts.prompts(), scorer(made, head)).holds
    head.plain = True
    with pytest.raises(C2FError, match="self-check failed: .*trainer"):
        check.agree(made, sampler, layouts.prompts(), scorer(made, head))


def test_a_soft_cap_too_wide_for_the_logits_at_hand_is_still_seen():
    model = layouts.model_of("gemma2")
    model.config.final_logit_softcapping = 50.0
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.01)
    assert not heads.Head(model).plain


@pytest.mark.parametrize("also", [None, ["lm_head"]], ids=["lora", "in full"])
def test_adapters_on_the_head_learn_and_the_reference_has_none(also):
    model = adapted("llama", ["q_proj"] if also else ["q_proj", "lm_head"], also)
    policy = ActorCritic(model, Critic(32))
    answers = LibrarySampler(model, layouts.Numbers())(layouts.prompts(4), 8)
    batch = collate(answers, 0)
    logps, _, _ = policy(batch)
    assert (logps - torch.cat([s.logps for s in answers])).abs().max() < 1e-4
    logps.sum().backward()
    learning = [n for n, p in model.named_parameters() if "lm_head" in n and p.grad is not None and p.grad.any()]
    assert learning and all("lora" in n or "modules_to_save" in n for n in learning)
    plain = scorer(layouts.model_of("llama"))(answers)
    assert (policy.reference_logps(batch) - plain).abs().max() < 1e-4 < (logps - plain).abs().max()


def test_an_adapter_on_a_head_that_is_also_the_embedding_is_refused():
    with pytest.raises(C2FError, match="shares with its embedding"):
        ActorCritic(adapted("gemma2", ["q_proj", "lm_head"]), Critic(32))


@pytest.mark.parametrize("above", [4096, 50], ids=["whole", "in pieces"])
def test_the_models_own_head_has_the_gradients_of_its_forward(above, monkeypatch):
    monkeypatch.setattr(heads, "CHUNKED_ABOVE", above)
    monkeypatch.setattr(heads, "CHUNK", 7)
    model = layouts.model_of("gemma2")
    batch = collate(LibrarySampler(model, layouts.Numbers())(layouts.prompts(4), 9), 0)
    found = ActorCritic(model, Critic(32))(batch, 0.7)[0]
    full = (model(batch.ids).logits[batch.rows, batch.columns] / 0.7).log_softmax(-1)
    expected = full.gather(-1, batch.targets[:, None])[:, 0]
    assert (found - expected).abs().max() < 1e-5
    gradients = [torch.autograd.grad(x.sum(), list(model.parameters()), retain_graph=True) for x in (found, expected)]
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-4) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "olmo3", "gpt_oss", "qwen3_next"])
def test_a_static_cache_gives_the_same_answers(kind):
    model = layouts.model_of(kind)
    asked, limits = layouts.prompts(9), [1, 3, 20, 5, 20, 2, 16, 20, 8]
    sampler = LibrarySampler(model, layouts.Numbers())
    ours = sampler(asked, limits, temperature=0.0)
    static = sampler.answer(asked, limits, 0.0, torch.Generator(), on_gpu=True)
    assert [(s.ids, s.stop) for s in static] == [(s.ids, s.stop) for s in ours]
    assert all((a.logps - b.logps).abs().max() < 1e-4 for a, b in zip(static, ours, strict=True))


def test_both_samplers_draw_the_same_answers_and_end_them_alike():
    model, asked = causal(), prompts(8)
    word = stories.VOCABULARY[KVDecoder(model, TOKENIZER)(asked, 9, seed=2)[0].ids[2]]
    for settings in ({}, {"stop_strings": [word]}, {"tokens_in_cache": 200}):
        ours, theirs = (
            kind(model, TOKENIZER, **settings)(asked, [4, 30, 9, 30, 1, 30, 30, 12], temperature=0.8, seed=2)
            for kind in (KVDecoder, LibrarySampler)
        )
        assert [(s.ids, s.stop, s.text, s.limit) for s in ours] == [(s.ids, s.stop, s.text, s.limit) for s in theirs]
        assert all((a.logps - b.logps).abs().max() < 1e-4 for a, b in zip(ours, theirs, strict=True))
        assert not settings.get("stop_strings") or "string" in {s.stop for s in ours}


def test_a_model_that_recomputes_activations_is_sampled_and_trains_on():
    model = layouts.model_of("qwen3")
    before = LibrarySampler(model, layouts.Numbers())(layouts.prompts(4), 8, temperature=0.0)
    policy = ActorCritic(model, Critic(32))
    policy.recompute_activations()
    after = LibrarySampler(model, layouts.Numbers())(layouts.prompts(4), 8, temperature=0.0)
    assert [s.ids for s in before] == [s.ids for s in after] and model.training


def test_the_choice_is_ours_for_the_embedded_layout_and_says_why_it_is_not(capsys):
    choice._say.cache_clear()
    assert type(choice.choose(causal(), TOKENIZER)) is KVDecoder
    assert type(choice.choose(causal(), TOKENIZER, engine="library")) is LibrarySampler
    assert capsys.readouterr().out == ""
    windowed = causal()
    windowed.config.sliding_window = 40
    assert type(choice.choose(windowed, TOKENIZER, longest=40)) is KVDecoder
    for _ in range(2):
        assert type(choice.choose(windowed, TOKENIZER, longest=41)) is LibrarySampler
    said = capsys.readouterr().out
    assert said.count("MistralForCausalLM is sampled") == 1 and "sliding window of 40 tokens" in said


def extended(model):
    model.model.layers[0].self_attn.q_norm = torch.nn.Identity()
    return model


def rescaled(model):
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    return model


@pytest.mark.parametrize(
    ("change", "why"), [(extended, "q_norm"), (rescaled, "'dynamic'")], ids=["another part", "another rotary embedding"]
)
def test_a_known_class_with_something_unknown_in_it_is_not_ours(change, why):
    model = change(causal())
    with pytest.raises(C2FError, match=why):
        KVDecoder(model, TOKENIZER)
    assert type(choice.choose(model, TOKENIZER)) is LibrarySampler


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("shared", [False, True], ids=["critic from the reward", "shared critic"])
def test_an_iteration_of_training_starts_with_ratios_of_one(kind, shared):
    actor = layouts.model_of(kind)
    if shared:
        critic = Critic(32)
    else:
        config = copy.deepcopy(actor.config)
        config.num_labels = 1
        scored = AutoModelForSequenceClassification.from_config(config).eval()
        model = rewards.RewardModel(scored, 0)
        critic = Critic.from_reward(scored, 0.1, 2.0)
        answers = LibrarySampler(actor, layouts.Numbers())(layouts.prompts(4), 8)
        batch = collate(answers, 0)
        values = critic(heads.last_states(critic.trunk, batch))[batch.rows, batch.columns + 1]
        expected = (torch.cat(model.prefix_scores(answers)) - 0.1) / 2.0
        assert (values - expected).abs().max() < 1e-4
    policy = ActorCritic(actor, critic)
    settings = Coarse(
        law=LAWS["fixed"], prompts=8, iterations=1, critic_head="zero", critic="shared" if shared else "separate",
        cut="bootstrap", tokens_per_micro_batch=300,
    )  # fmt: skip
    process = CoarseTrainer(
        policy, PrefixReward(), choice.choose(actor, layouts.Numbers()), layouts.prompts(), make_law(LAWS["fixed"]),
        settings, seed=0, pad_id=0,
    )  # fmt: skip
    before = trunk_of(actor).state_dict()
    before = {name: value.clone() for name, value in before.items()}
    row = process.step()
    assert row["ratio_error"] <= 1e-4 and row["kl_per_token"] < 1e-6
    assert any(not torch.equal(value, before[name]) for name, value in trunk_of(actor).state_dict().items())


def test_what_has_no_reward_model_in_the_library_is_refused_before_notebook_02():
    rewards.refuse_without_scores(layouts.model_of("qwen3").config)
    with pytest.raises(C2FError, match="'granite' model.*no sequence classifier.*models.reward"):
        rewards.refuse_without_scores(layouts.model_of("granite").config)


def test_a_check_in_bfloat16_passes_what_is_right_and_catches_missing_norms(monkeypatch):
    for kind in ("mistral", "qwen3", "gemma2", "qwen3_moe"):
        model = layouts.model_of(kind).to(torch.bfloat16)
        found = check.agree(model, choice.choose(model, layouts.Numbers()), layouts.prompts(), scorer(model))
        assert found.dtype == "bfloat16" and found.holds
    monkeypatch.setattr(decoder, "unlike_llama", lambda model: "")
    model = layouts.model_of("qwen3").to(torch.bfloat16)
    with pytest.raises(C2FError, match="self-check failed"):
        check.agree(model, KVDecoder(model, layouts.Numbers()), layouts.prompts())


def test_a_model_that_is_no_trunk_and_head_is_refused_by_name():
    class Headless(type(causal())):
        def forward(self, *arguments, **named):
            out = super().forward(*arguments, **named)
            out.logits = out.logits + named["input_ids"][..., None]
            return out

    model = causal()
    model.__class__ = Headless
    with pytest.raises(C2FError, match="Headless cannot be trained here: .*no function of its trunk's last states"):
        ActorCritic(model, Critic(32))


def test_a_model_that_gives_no_finite_numbers_is_refused_before_anything_is_made_of_it():
    model = causal()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = torch.nan
    with pytest.raises(C2FError, match="logits that are no finite numbers.*weights are damaged.*float32"):
        heads.Head(model)
    with pytest.raises(C2FError, match="self-check failed"):
        check.agree(model, KVDecoder(model, layouts.Numbers()), layouts.prompts())


def test_proxy_tuning_with_itself_is_the_model_also_beyond_a_sliding_window():
    windowed = causal()
    windowed.config.sliding_window = 8
    for layer in windowed.model.layers:
        layer.self_attn.sliding_window = 8
    proxy = ProxyDecoder(windowed, windowed, windowed, TOKENIZER, 1.0, longest=60)
    assert check.measure(windowed, proxy, prompts(3), tokens=24).sampler_error < 1e-4
    shorter = causal()
    shorter.config.max_position_embeddings = 40
    assert ProxyDecoder(causal(), causal(), shorter, TOKENIZER, 1.0).positions == 40
