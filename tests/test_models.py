"""Loading, saving and wrapping: nothing foreign is run, nothing is resized, nothing is lost on the way to disk."""

import json
import shutil

import offline_mistral
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import TOKENIZER, causal, samples

from c2f_utils.coarse import actor_critic, heads
from c2f_utils.domain.problems import PAD
from c2f_utils.errors import C2FError
from c2f_utils.models import loading, packing, rewards
from c2f_utils.settings.config import Lora, Models
from c2f_utils.settings.load import load_settings

CPU = Models(device="cpu")
WORDS = ["\n\nHuman: hello there\n\nAssistant: hello", "some other words"]


@pytest.fixture
def base(tmp_path):
    loading.save_model(causal(), TOKENIZER, tmp_path / "base")
    return tmp_path / "base"


# Tokenizers


def save_tokenizer(folder, **changes):
    tokenizer = offline_mistral.tokenizer(WORDS)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_tokenizer_without_pad_borrows_an_existing_id_that_is_not_eos(tmp_path):
    made = save_tokenizer(tmp_path)
    assert made.pad_token_id is None
    loaded = loading.load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.unk_token_id != loaded.eos_token_id
    assert len(loaded) == len(made), "no token was added, so no embedding is resized"
    assert loaded.padding_side == "right"


def test_a_pad_that_is_eos_is_replaced_or_no_answer_would_ever_end(tmp_path):
    save_tokenizer(tmp_path, pad_token="</s>")
    loaded = loading.load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.unk_token_id != loaded.eos_token_id


@pytest.mark.parametrize(("lacking", "expected"), [(("unk_token",), "<s>"), (("unk_token", "bos_token"), "<unk>")])
def test_without_unk_the_pad_is_bos_or_the_first_other_id(tmp_path, lacking, expected):
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for name in lacking:
        config.pop(name)
    path.write_text(json.dumps(config))
    loaded = loading.load_tokenizer(tmp_path)
    assert loaded.convert_ids_to_tokens(loaded.pad_token_id) == expected and loaded.pad_token_id != loaded.eos_token_id


def test_a_pad_of_its_own_is_kept(base):
    assert loading.load_tokenizer(base).pad_token_id == PAD


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("eos_token")
    path.write_text(json.dumps(config))
    with pytest.raises(C2FError, match="no EOS token; answers could never end"):
        loading.load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(C2FError, match="tokenizer of .* cannot be loaded"):
        loading.load_tokenizer(tmp_path)


# Models


def test_a_loaded_model_has_no_dropout_and_the_dtype_asked_for(tmp_path):
    offline_mistral.model(300, attention_dropout=0.3).save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        model = loading.load_causal(tmp_path, Models(device="cpu", dtype=dtype))
        assert not model.training and model.dtype == getattr(torch, dtype)
        model.train()
        ids = torch.arange(20)[None]
        assert torch.equal(model(ids).logits, model(ids).logits), "dropout is off even in training mode"


@pytest.mark.parametrize("kind", ["pickled", "damaged", "none"])
def test_only_safetensors_are_loaded(base, kind):
    weights = base / "model.safetensors"
    if kind == "pickled":
        torch.save(load_file(weights), base / "pytorch_model.bin")
    if kind == "damaged":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.unlink()
    with pytest.raises(C2FError, match="damaged|pickled checkpoints are not loaded"):
        loading.load_causal(base, CPU)


def test_code_that_comes_with_a_model_is_not_run(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(C2FError, match="cannot be loaded"):
        loading.load_causal(base, CPU)
    assert not (tmp_path / "ran").exists()


def test_a_gpu_that_is_not_there_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(C2FError, match="models.device is 'cuda', but torch sees no GPU"):
        loading.device(Models(device="cuda"))
    assert loading.device(Models(device="auto")).type == "cpu"


def test_saving_replaces_the_folder_and_leaves_no_partial_one(base, tmp_path):
    (base / "left_over").touch()
    (tmp_path / ".base.partial").mkdir()
    loading.save_model(causal(3), TOKENIZER, base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"] and not (base / "left_over").exists()
    loaded = loading.load_causal(base, CPU)
    assert torch.equal(loaded.lm_head.weight, causal(3).lm_head.weight)
    assert loading.load_tokenizer(base).get_vocab() == TOKENIZER.get_vocab()


def test_a_saved_adapter_loads_as_the_adapted_model(base, tmp_path):
    actor = loading.add_lora(loading.load_causal(base, CPU), Lora(rank=4, alpha=8))
    with torch.no_grad():
        for name, weight in actor.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    loading.save_model(actor, TOKENIZER, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = loading.load_actor(tmp_path / "adapter", CPU)
    assert type(loaded).__name__ == "MistralForCausalLM" and not any("lora" in n for n, _ in loaded.named_parameters())
    ids = torch.tensor([samples(causal(), 1, 20)[0].ids])
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, actor(ids).logits, atol=1e-4)
        assert not torch.allclose(loaded(ids).logits, causal()(ids).logits, atol=1e-2)


def test_targets_of_adapters_that_the_model_lacks_are_refused_and_what_it_has_is_said():
    """PEFT itself raises only where none matches, and would leave out the rest of fused projections or experts."""
    wanted = Lora(rank=2, alpha=4, targets=["o_proj", "qkv_proj", "gate_up_proj"])
    with pytest.raises(C2FError, match="names qkv_proj, gate_up_proj, which MistralForCausalLM.*gate_proj, k_proj"):
        loading.add_lora(causal(), wanted)
    loading.add_lora(
        causal(), Lora(rank=2, alpha=4, targets=["model.layers.0.mlp.up_proj", "o_proj", "self_attn.q_proj"])
    )


def test_a_full_model_loads_as_an_actor_too(base):
    assert torch.equal(loading.load_actor(base, CPU).lm_head.weight, causal().lm_head.weight)


# Log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logps_equal_the_plain_ones_with_their_gradients(monkeypatch, temperature):
    torch.manual_seed(0)
    vocabulary, size, count = heads.CHUNKED_ABOVE + 905, 16, 37
    targets = torch.randint(vocabulary, (count,))
    results = []
    for above in (heads.CHUNKED_ABOVE, 10**9):
        monkeypatch.setattr(heads, "CHUNKED_ABOVE", above)
        torch.manual_seed(1)
        hidden, weight = torch.randn(count, size, requires_grad=True), torch.randn(vocabulary, size, requires_grad=True)
        logps, entropy = heads.token_logps(hidden, weight, targets, temperature)
        (logps * torch.linspace(-1, 1, count)).sum().backward()
        results.append((logps.detach(), entropy.detach(), hidden.grad, weight.grad))
    for chunked, plain in zip(*results, strict=True):
        assert torch.allclose(chunked, plain, atol=2e-5, rtol=1e-4)


def test_logps_are_those_of_the_tempered_softmax():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    targets = torch.tensor([0, 3, 10, 5, 5])
    logps, entropy = heads.token_logps(hidden, weight, targets, 0.5)
    probabilities = torch.softmax(hidden @ weight.T / 0.5, -1).double()
    assert torch.allclose(logps.double(), probabilities[torch.arange(5), targets].log(), atol=1e-5)
    assert torch.allclose(entropy.double(), -(probabilities * probabilities.log()).sum(-1), atol=1e-5)


# The critic


def test_a_critic_from_the_reward_model_values_every_prefix_as_the_reward_would(base):
    model = rewards.new_reward_model(base, load_settings("smoke"), 0).eval()
    critic = actor_critic.Critic.from_reward(model, mean=0.3, std=2.0)
    scorer = rewards.RewardModel(model, PAD, 0.3, 2.0)
    batch = samples(causal(), 5, 15)
    packed = packing.collate(batch, PAD)
    with torch.no_grad():
        values = critic(critic.trunk(input_ids=packed.ids, use_cache=False).last_hidden_state)
    for row, sample in enumerate(batch):
        start = len(sample.prompt.ids)
        expected = scorer.prefix_scores([sample])[0]
        assert torch.allclose(values[row, start : start + sample.tokens], expected, atol=1e-5)


def test_only_what_training_changes_is_trainable(base):
    policy = actor_critic.ActorCritic(causal(), actor_critic.Critic(32))
    assert {name.partition(".")[0] for name in policy.trainable()} == {"actor", "critic"}
    assert {id(p) for p in policy.parameters()} == {id(p) for p in policy.trainable().values()}, "no reference in it"
    assert not policy.reference_logps(packing.collate(samples(causal(), 2), PAD)).requires_grad
    adapted = actor_critic.ActorCritic(loading.add_lora(causal(), Lora(rank=2, alpha=4)), actor_critic.Critic(32))
    assert all("lora" in name or name.startswith("critic.head") for name in adapted.trainable())


def test_a_checkpoint_folder_survives_its_models_removal(base, tmp_path):
    """An adapter whose base has gone is an error that says so, not a traceback."""
    actor = loading.add_lora(loading.load_causal(base, CPU), Lora(rank=2, alpha=4))
    loading.save_model(actor, TOKENIZER, tmp_path / "adapter")
    shutil.rmtree(base)
    with pytest.raises(C2FError, match="does not exist"):
        loading.load_actor(tmp_path / "adapter", CPU)


@pytest.mark.parametrize("what", ["model", "tokenizer", "reward model"])
def test_a_mistyped_path_that_looks_like_a_hub_id_is_said_to_be_no_folder(monkeypatch, tmp_path, what):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub")

    for kind in ("AutoModelForCausalLM", "AutoTokenizer", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", unreachable)
    monkeypatch.chdir(tmp_path)
    settings = load_settings("smoke")
    load = {
        "model": lambda source: loading.load_causal(source, settings.models),
        "tokenizer": loading.load_tokenizer,
        "reward model": lambda source: rewards.load_reward_model(source, settings, 0),
    }[what]
    with pytest.raises(C2FError) as caught:
        load("models/mybase")
    assert f"there is no folder 'models/mybase' in {tmp_path} or " in str(caught.value)
    assert "the hub has no such model or cannot be reached" in str(caught.value)
