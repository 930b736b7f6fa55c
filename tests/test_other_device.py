"""Everything of the embedded path gives on another device what it gives on the CPU, and mixes no devices on the way."""

import copy

import pytest
import torch
from other_device import DEVICE, OtherDevice
from safetensors.torch import save_file
from tiny_models import SHAPE, TOKENIZER, causal, prompts
from torch.utils._python_dispatch import _disable_current_modes
from transformers import MistralForSequenceClassification

from c2f_utils import limits
from c2f_utils.coarse import actor_critic, checkpoints
from c2f_utils.coarse.trainer import CoarseTrainer
from c2f_utils.domain.problems import PAD
from c2f_utils.models import instruct, loading, pretrain, rewards
from c2f_utils.rollout import check
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.rollout.proxy import ProxyDecoder
from c2f_utils.runs.run import Run
from c2f_utils.settings.config import Coarse, Lora
from c2f_utils.settings.laws import Law
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import (
    base_model,
    coarse_rlhf,
    evaluation,
    instruction_model,
    length_schedules,
    residue_merging,
    reward_model,
)

PLACES = (torch.device("cpu"), DEVICE)


def test_it_refuses_what_a_gpu_refuses_and_passes_what_it_passes():
    with OtherDevice():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        with pytest.raises(RuntimeError, match="same device, found meta and cpu"):
            there + here
        with pytest.raises(RuntimeError, match="same device"):
            torch.nn.Linear(3, 3)(there)
        there[torch.tensor([0])] = 2 * here.sum()
        assert (there + here.to(DEVICE)).tolist() == [7.0, 2.0, 2.0] and there.device == DEVICE


def test_the_library_fills_what_no_file_holds(tmp_path):
    """It asks for the device of its context by making a tensor, and leaves buffers as they are where that is wrong."""
    causal().save_pretrained(tmp_path)
    torch.use_deterministic_algorithms(True)  # what is not filled is NaN, not what happens to stand there
    try:
        with OtherDevice():
            assert torch.empty(3).isnan().all()
            model = loading.load_causal(tmp_path, load_settings("smoke").models)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_pretraining_happens_on_the_chosen_device(monkeypatch):
    settings, found = load_settings("smoke", overrides={"pretrain.tokens": 6000}), []
    for place in PLACES:
        monkeypatch.setattr(pretrain, "device", lambda models, place=place: place)
        rows: list[dict] = []
        with OtherDevice():
            model = pretrain.pretrain(settings, rows.append)
            found.append((rows, model.lm_head.weight.detach().cpu()))
        assert model.device == place
    (rows, weight), (others, other) = found
    assert [row["loss"] for row in others] == pytest.approx([row["loss"] for row in rows], abs=1e-4)
    assert torch.allclose(weight, other, atol=1e-3)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["CPU's loop", "GPU's loop"])
@pytest.mark.parametrize("coefficient", [None, 0.0, 0.5], ids=["one model", "proxy, c = 0", "proxy, c = 1/2"])
def test_answers_are_the_same(coefficient, on_gpu):
    found = []
    for place in PLACES:
        with OtherDevice():
            trio = [causal(seed).to(place) for seed in (1, 2, 3)]
            decoder = KVDecoder(trio[0], TOKENIZER)
            if coefficient is not None:
                decoder = ProxyDecoder(*trio, TOKENIZER, coefficient)
            generator = torch.Generator(device=place).manual_seed(3)
            found.append(decoder.answer(prompts(6), [9, 12, 3, 15, 20, 20], 1.0, generator, on_gpu))
    assert [s.ids for s in found[0]] == [s.ids for s in found[1]]
    assert all(torch.allclose(a.logps, b.logps, atol=1e-4) for a, b in zip(*found, strict=True))


def scorer(place: torch.device) -> rewards.RewardModel:
    shape = copy.deepcopy(causal().config)
    shape.num_labels = 1
    torch.manual_seed(0)
    return rewards.RewardModel(MistralForSequenceClassification(shape).eval().to(place), PAD)


@pytest.mark.parametrize(
    ("lora", "cut"), [(False, "average"), (True, "bootstrap")], ids=["separate, all weights", "shared, adapters"]
)
def test_training_is_the_same(lora, cut):
    """Rewards, self-check, the five verbs, what a checkpoint holds and a start from it."""
    config = Coarse(
        law=Law(name="fixed", limit=16), iterations=2, prompts=6, tokens_per_micro_batch=300, cut=cut,
        critic="shared" if lora else "separate", critic_head="zero" if lora else "reward",
    )  # fmt: skip
    found = []
    for place in PLACES:
        with OtherDevice():
            torch.manual_seed(0)
            actor = causal().to(place)
            reward = scorer(place)
            reward = reward.normalised_on(KVDecoder(actor, TOKENIZER)(prompts(6), 16))
            if lora:
                actor = loading.add_lora(actor, Lora(rank=4, alpha=8))
                critic = actor_critic.Critic(SHAPE.hidden_size)
            else:
                critic = actor_critic.Critic.from_reward(reward.model, reward.mean, reward.std)
            policy = actor_critic.ActorCritic(actor, critic.to(place))
            decoder = KVDecoder(actor, TOKENIZER)
            check.agree(actor, decoder, prompts(4))
            process = CoarseTrainer(policy, reward, decoder, prompts(), limits.Fixed(16), config, seed=0, pad_id=PAD)
            found.append([process.step()])
            parts = process.state_dict()
            weights, moments = ({n: v.cpu() for n, v in parts[kind].items()} for kind in ("weights", "optimiser"))
            process.updates.load(weights, moments, "a checkpoint, which is on the CPU")
            found[-1].append(process.step())
    for here, there in zip(*found, strict=True):
        numbers = [{k: v for k, v in row.items() if isinstance(v, float) and k != "seconds"} for row in (here, there)]
        assert numbers[1] == pytest.approx(numbers[0], abs=1e-3) and there["rollout_tokens"] == here["rollout_tokens"]


@pytest.fixture
def moved(monkeypatch):
    """The stages' models go to the other device. The library loads, saves and trains by itself on whatever device: it
    is given the CPU to load and save on, and trains nothing here."""

    def loaded(*arguments, **options):
        with _disable_current_modes():
            return load(*arguments, **options)

    def saved(model, tokenizer, folder):
        save(model.cpu(), tokenizer, folder)
        model.to(DEVICE)

    def written(tensors, path):
        save_file({name: value.cpu() for name, value in tensors.items()}, path)

    load, save = loading.pretrained, loading.save_model
    for room in (loading, pretrain, rewards, instruct):
        monkeypatch.setattr(room, "device", lambda models: DEVICE)
    for room in (loading, rewards):
        monkeypatch.setattr(room, "pretrained", loaded)
    for room in (loading, base_model, reward_model, length_schedules, instruction_model):
        monkeypatch.setattr(room, "save_model", saved)
    for room in (checkpoints, coarse_rlhf):
        monkeypatch.setattr(room, "save_file", written)
    monkeypatch.setattr(rewards, "train", lambda source, pairs, words, settings, order, **watch: (
        rewards.new_reward_model(source, settings, order).eval()
    ))  # fmt: skip
    monkeypatch.setattr(instruct, "train", lambda source, words, settings, log, folder, **watch: (
        loading.load_causal(source, settings.models), 1
    ))  # fmt: skip
    with OtherDevice():
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")  # which holds for `meta` as it usually is
def test_every_stage_runs_there(moved, outputs):
    # lm-eval and a judge's server are libraries with devices of their own.
    alone = {"data.vocabulary": "wide", "tasks.suites": [], "judge.name": "none"}
    run = Run(load_settings("smoke", overrides=alone))
    work = {
        "01_base_model": base_model.make,
        "02_reward_model": lambda run: (reward_model.make(run), reward_model.one_pair(run)),
        "03_coarse_rlhf": lambda run: list(coarse_rlhf.train(run)),
        "04_length_schedules": length_schedules.make,
        "05_instruction_model": instruction_model.make,
        "06_residue_merging": lambda run: residue_merging.Merging(run).finish(),
        "07_evaluation": evaluation.make,
    }
    for name, make in work.items():
        run.here = run.stage(name)
        run.here.begin(run.inputs(name)[0])
        make(run)
        run.here.finish()
    assert set(run.here.results()["models"]) >= {"base", "instruct", "coarse", "fine", "ppo_instruct"}
