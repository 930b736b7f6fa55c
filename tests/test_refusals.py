"""Bad input is refused before training, all of it at once; what goes wrong later stops with the samples and a sound
checkpoint."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import SHAPE, TOKENIZER, causal, distinct_tokens, prompts, trainer, weights
from transformers import MistralConfig, MistralForSequenceClassification, PreTrainedTokenizerFast

from c2f_utils import limits
from c2f_utils.coarse import checkpoints
from c2f_utils.coarse.actor_critic import Critic
from c2f_utils.domain import samples, stories
from c2f_utils.domain.problems import PAD
from c2f_utils.errors import C2FError
from c2f_utils.models import loading, rewards
from c2f_utils.models.loading import load_tokenizer
from c2f_utils.rollout import decoder


def scored(vocabulary: int) -> MistralForSequenceClassification:
    shape = MistralConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    return MistralForSequenceClassification(shape)


def again(process, **changes):
    """The same trainer built anew with other parts."""
    parts = {
        "policy": process.policy,
        "reward": process.reward,
        "sampler": process.sampler,
        "prompts": process.prompts,
        "law": process.law,
    }
    return type(process)(**parts | changes, config=process.config, seed=0, pad_id=PAD)


def test_a_reward_model_with_another_vocabulary_is_refused():
    reward = rewards.RewardModel(scored(len(stories.VOCABULARY) + 8), PAD)
    with pytest.raises(
        C2FError, match=f"reward model has a vocabulary of {len(stories.VOCABULARY) + 8} tokens, the actor one of"
    ):
        again(trainer(), reward=reward)


def test_a_critic_with_another_vocabulary_is_refused():
    process = trainer()
    process.policy.critic = Critic(SHAPE.hidden_size, scored(7).model)
    with pytest.raises(C2FError, match="critic has a vocabulary of 7"):
        again(process)


def test_a_reward_model_with_another_tokenizer_of_equal_size_is_refused(tmp_path):
    other = copy.deepcopy(stories.VOCABULARY)
    swapped = [*other[:-2], other[-1], other[-2]]
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(swapped)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(tmp_path / "swapped")
    TOKENIZER.save_pretrained(tmp_path / "same")
    scored(len(other)).save_pretrained(tmp_path / "same")
    scored(len(other)).save_pretrained(tmp_path / "swapped")
    scored(len(other)).save_pretrained(tmp_path / "bare")
    loading.refuse_other_tokenizer(str(tmp_path / "same"), TOKENIZER)
    loading.refuse_other_tokenizer(str(tmp_path / "bare"), TOKENIZER)
    with pytest.raises(C2FError, match="another tokenizer than the base model: token .* is .* there and .* here"):
        loading.refuse_other_tokenizer(str(tmp_path / "swapped"), TOKENIZER)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    mute = copy.deepcopy(TOKENIZER)
    mute.eos_token = None
    model = causal()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(C2FError, match="no EOS token"):
        decoder.KVDecoder(model, mute)
    mute.save_pretrained(tmp_path)
    with pytest.raises(C2FError, match="no EOS token"):
        load_tokenizer(tmp_path)
    process = trainer()
    process.sampler.eos = frozenset()
    with pytest.raises(C2FError, match="no EOS token"):
        again(process)


def test_every_impossible_prompt_is_named_at_once():
    good = prompts(3)
    bad = [
        *good,
        samples.Prompt((), "empty"),
        samples.Prompt((1, 10_000), "foreign"),
        samples.Prompt((1,) * 120, "long"),
    ]
    with pytest.raises(C2FError) as caught:
        again(trainer("fixed"), prompts=bad)
    said = str(caught.value)
    assert "prompts 3 of 6 are empty" in said and "prompts 4 hold token ids outside" in said
    assert "longest prompt (number 5): a prompt of 120 tokens with a limit of 16 needs 136 positions" in said


def test_a_sliding_window_bounds_the_limit_as_positions_do():
    process = trainer("fixed")
    process.policy.actor.config.sliding_window = 40
    with pytest.raises(C2FError, match="positions, the model has 40"):
        again(process, law=limits.Fixed(30))


def poisoned(process, sample_number: int):
    """Make the log-probabilities of one answer NaN in the training forward from now on."""
    forward = process.policy.forward
    improve = process.improve

    def spoil(e):
        victim = e.samples[sample_number]
        start = [*victim.prompt.ids, *victim.ids]

        def bad(batch, *arguments, **named):
            logps, entropy, values = forward(batch, *arguments, **named)
            row = next((i for i, ids in enumerate(batch.ids.tolist()) if ids[: len(start)] == start), None)
            if row is not None and logps is not None:
                logps = logps * torch.where(batch.rows == row, float("nan"), 1.0)
            return logps, entropy, values

        process.policy.forward = bad
        return improve(e)

    process.improve = spoil


def test_a_non_finite_loss_stops_with_the_iteration_the_sample_and_a_checkpoint_before_the_damage(tmp_path):
    process = trainer("fixed", tmp_path, checkpoint_every=100)
    before = weights(process)
    poisoned(process, 5)
    with pytest.raises(
        C2FError, match=r"non-finite loss in iteration 1, samples \[5\] of 8; checkpoint .*step-00000 is from before it"
    ):
        process.step()
    sound = load_file(checkpoints.latest(tmp_path) / "weights.safetensors")
    assert all(torch.equal(before[name], value) for name, value in sound.items())
    assert trainer("fixed", tmp_path).iteration == 0


def test_a_non_finite_gradient_takes_no_step_and_names_its_samples(tmp_path):
    process = trainer("fixed", tmp_path, minibatches=1)
    e = process.credit(process.judge(process.collect()))
    before = weights(process)
    clip = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = lambda parameters, limit: clip(parameters, limit) * float("inf")
    try:
        with pytest.raises(
            C2FError, match=r"non-finite gradient norm in iteration 1, samples \[0, 1, 2, 3, 4, 5, 6, 7\]"
        ):
            process.improve(e)
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
    assert all(torch.equal(before[n], w) for n, w in weights(process).items())


def test_damaged_weights_are_never_saved(tmp_path):
    process = trainer("fixed", tmp_path)
    process.step()
    with torch.no_grad():
        next(iter(process.policy.trainable().values())).fill_(float("inf"))
    with pytest.raises(C2FError, match="no longer finite .*step-00001"):
        process.save()
    assert checkpoints.latest(tmp_path).name == "step-00001"


def test_there_is_always_a_checkpoint_to_go_back_to(tmp_path):
    process = trainer("fixed", tmp_path, checkpoint_every=100)
    process.step()
    assert checkpoints.latest(tmp_path).name == "step-00000"
    process.reward = lambda batch: distinct_tokens(batch) * float("nan")
    with pytest.raises(C2FError, match="step-00000 is from before it"):
        process.step()
