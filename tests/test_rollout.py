"""Decoding: the same distribution as the training forward, per-row limits, explicit stops, no influence of padding."""

import pytest
import torch
from tiny_models import SHAPE, TOKENIZER, causal, prompts, samples

from c2f_utils.coarse.actor_critic import ActorCritic, Critic
from c2f_utils.domain import stories
from c2f_utils.domain.problems import EOS, PAD
from c2f_utils.domain.samples import Prompt
from c2f_utils.errors import C2FError
from c2f_utils.models.loading import add_lora
from c2f_utils.models.packing import collate
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.settings.config import Lora


@pytest.fixture(scope="module")
def model():
    return causal()


def recomputed(model, batch):
    policy = ActorCritic(model, Critic(SHAPE.hidden_size))
    with torch.no_grad():
        flat, entropy, _ = policy(collate(batch, PAD))
    return flat, torch.cat([s.logps for s in batch])


def test_recorded_logps_are_those_of_the_training_forward(model):
    flat, recorded = recomputed(model, samples(model, 12, 40))
    assert (flat - recorded).abs().max() < 1e-5


def test_recorded_logps_are_those_of_an_adapter_that_has_moved():
    torch.manual_seed(0)
    model = add_lora(causal(), Lora(rank=4, alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    flat, recorded = recomputed(model, samples(model, 8, 30))
    assert (flat - recorded).abs().max() < 1e-5


def test_greedy_answers_equal_those_of_the_library(model):
    ours = KVDecoder(model, TOKENIZER)(prompts(6), 24, temperature=0.0)
    for sample in ours:
        ids = torch.tensor([sample.prompt.ids])
        theirs = model.generate(
            ids, max_new_tokens=24, do_sample=False, pad_token_id=PAD, attention_mask=torch.ones_like(ids)
        )
        assert sample.ids == theirs[0, ids.shape[1] :].tolist()


def test_what_else_is_in_the_batch_does_not_change_an_answer(model):
    together = KVDecoder(model, TOKENIZER)(prompts(6), 24, temperature=0.0)
    for prompt, sample in zip(prompts(6), together, strict=True):
        alone = KVDecoder(model, TOKENIZER)([prompt], 24, temperature=0.0)[0]
        assert alone.ids == sample.ids and torch.allclose(alone.logps, sample.logps, atol=1e-5)


def test_every_answer_keeps_its_own_limit_and_says_why_it_stopped(model):
    limits = [1, 3, 30, 5, 30, 2]
    for sample, limit in zip(samples(model, 6, limits), limits, strict=True):
        assert sample.limit == limit and 1 <= sample.tokens <= limit
        assert sample.stop == ("eos" if sample.ids[-1] == EOS else "limit")
        assert sample.cut == (sample.stop == "limit") and (sample.tokens == limit or not sample.cut)
        assert EOS not in sample.ids[:-1] and len(sample.logps) == sample.tokens


def test_an_answer_that_ends_on_its_last_allowed_token_is_not_called_cut(model):
    long = next(s for s in samples(model, 12, 60) if s.stop == "eos")
    index = [p.ids for p in prompts(12)].index(long.prompt.ids)
    exact = [60] * 12
    exact[index] = long.tokens
    again = KVDecoder(model, TOKENIZER)(prompts(12), exact, seed=0)[index]
    assert again.ids == long.ids and again.stop == "eos"


def test_waves_under_a_small_cache_give_greedy_answers_unchanged(model):
    large = KVDecoder(model, TOKENIZER)(prompts(9), 20, temperature=0.0)
    small = KVDecoder(model, TOKENIZER, tokens_in_cache=120)(prompts(9), 20, temperature=0.0)
    assert [s.ids for s in large] == [s.ids for s in small]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_models_probabilities_at_its_temperature(model, temperature):
    prompt = prompts(1)[0]
    sampler = KVDecoder(model, TOKENIZER, tokens_in_cache=10**9)
    drawn = sampler([prompt] * 4000, 1, temperature=temperature, seed=3)
    counts = torch.bincount(torch.tensor([s.ids[0] for s in drawn]), minlength=len(stories.VOCABULARY)) / 4000
    with torch.no_grad():
        expected = (model(torch.tensor([prompt.ids])).logits[0, -1] / temperature).softmax(-1)
    assert (counts - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5
    assert all(float(s.logps) == pytest.approx(float(expected[s.ids[0]].log()), abs=1e-5) for s in drawn)


def test_the_same_seed_repeats_and_another_does_not(model):
    first, again, other = (samples(model, 6, 20, seed) for seed in (1, 1, 2))
    assert [s.ids for s in first] == [s.ids for s in again] != [s.ids for s in other]


def test_a_stop_string_ends_an_answer_and_is_not_shown(model):
    free = KVDecoder(model, TOKENIZER)(prompts(6), 24, temperature=0.0)
    word = stories.VOCABULARY[free[0].ids[2]]
    stopped = KVDecoder(model, TOKENIZER, stop_strings=[word])(prompts(6), 24, temperature=0.0)[0]
    assert stopped.stop == "string" and not stopped.cut and word not in stopped.text
    assert stopped.sampled == free[0].ids[: len(stopped.sampled)] and len(stopped.sampled) <= 3


def test_a_stop_string_of_several_tokens_ends_an_answer(model):
    free = next(s for seed in range(99) for s in samples(model, 1, 24, seed) if len({*s.ids[:7]} - {EOS}) == 7)
    words = " ".join(stories.VOCABULARY[i] for i in free.ids[4:7])
    stopped = KVDecoder(model, TOKENIZER, stop_strings=[words])
    found = next(s for seed in range(99) for s in stopped([free.prompt], 24, seed=seed) if s.sampled == free.ids[:7])
    assert found.stop == "string" and found.ids == [*free.ids[:4], EOS] and words not in found.text


def test_the_cache_never_holds_more_positions_than_asked_for():
    model, held = causal(), []
    model.model.rotary_emb.register_forward_hook(lambda _, given, found: held.append(given[1].shape[1]))
    rows = []
    model.model.embed_tokens.register_forward_hook(lambda _, given, found: rows.append(given[0].shape))
    KVDecoder(model, TOKENIZER, tokens_in_cache=150)(prompts(9), [4, 20, 20, 90, 4, 4, 4, 20, 4])
    waves = [shape[0] for shape in rows if shape[1] > 1]
    assert sum(waves) == 9 and len(waves) == len(held)
    assert all(count * length <= 150 or count == 1 for count, length in zip(waves, held, strict=True))


def test_new_weights_are_seen_at_the_next_call():
    model = causal()
    decoder = KVDecoder(model, TOKENIZER)
    before = decoder(prompts(4), 16, temperature=0.0)
    model.load_state_dict(causal(7).state_dict())
    after = decoder(prompts(4), 16, temperature=0.0)
    fresh = KVDecoder(model, TOKENIZER)(prompts(4), 16, temperature=0.0)
    assert [s.ids for s in after] == [s.ids for s in fresh] != [s.ids for s in before]


def test_what_cannot_be_decoded_is_refused_before_decoding(model):
    decoder = KVDecoder(model, TOKENIZER)
    with pytest.raises(C2FError, match="128"):
        decoder(prompts(2), 120)
    with pytest.raises(C2FError, match="empty prompt"):
        decoder([Prompt((), "")], 4)


def test_a_sliding_window_counts_as_the_models_positions():
    model = causal()
    model.config.sliding_window = 40
    prompt = prompts(1)[0]
    room = 40 - len(prompt.ids)
    KVDecoder(model, TOKENIZER)([prompt], room)
    with pytest.raises(C2FError, match="needs 41 positions, the model has 40"):
        KVDecoder(model, TOKENIZER)([prompt], room + 1)
