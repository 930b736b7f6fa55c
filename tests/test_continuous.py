"""The second sampler keeps the first one's promises: the same greedy answers, limits per request, log-probabilities,
fresh weights.
"""

import pytest
import torch
from tiny_models import SHAPE, TOKENIZER, causal, prompts, trainer

from c2f_utils.coarse.actor_critic import ActorCritic, Critic
from c2f_utils.domain import stories
from c2f_utils.domain.problems import PAD
from c2f_utils.domain.samples import Prompt
from c2f_utils.errors import C2FError
from c2f_utils.models.loading import add_lora
from c2f_utils.models.packing import collate
from c2f_utils.rollout.continuous import ContinuousBatching
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.settings.config import Lora

CACHE = 1024


@pytest.fixture(scope="module")
def model():
    return causal()


def test_greedy_answers_and_their_logps_equal_our_decoders(model):
    limits = [1, 3, 24, 5, 24, 2]
    ours = KVDecoder(model, TOKENIZER)(prompts(6), limits, temperature=0.0)
    theirs = ContinuousBatching(model, TOKENIZER, CACHE)(prompts(6), limits, temperature=0.0)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.ids, a.stop, a.limit, a.text) == (b.ids, b.stop, b.limit, b.text)
        assert torch.allclose(a.logps, b.logps, atol=1e-4)


def test_a_small_cache_queues_requests_and_changes_no_greedy_answer(model):
    large = ContinuousBatching(model, TOKENIZER, 4096)(prompts(9), 20, temperature=0.0)
    small = ContinuousBatching(model, TOKENIZER, 96)(prompts(9), 20, temperature=0.0)
    assert [s.ids for s in large] == [s.ids for s in small]


def test_sampled_logps_are_those_of_the_tempered_policy(model):
    drawn = ContinuousBatching(model, TOKENIZER, CACHE)(prompts(6), 20, temperature=0.7, seed=4)
    with torch.no_grad():
        flat = ActorCritic(model, Critic(SHAPE.hidden_size))(collate(drawn, PAD), 0.7)[0]
    assert (flat - torch.cat([s.logps for s in drawn])).abs().max() < 1e-4


def test_the_same_seed_repeats_another_does_not_and_no_other_random_number_is_touched(model):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = (ContinuousBatching(model, TOKENIZER, CACHE)(prompts(6), 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert [s.ids for s in first] == [s.ids for s in again] != [s.ids for s in other]


def test_new_weights_are_seen_at_the_next_call():
    model = causal()
    sampler = ContinuousBatching(model, TOKENIZER, CACHE)
    before = sampler(prompts(4), 16, temperature=0.0)
    model.load_state_dict(causal(7).state_dict())
    after = sampler(prompts(4), 16, temperature=0.0)
    assert [s.ids for s in after] == [s.ids for s in KVDecoder(model, TOKENIZER)(prompts(4), 16, temperature=0.0)]
    assert [s.ids for s in after] != [s.ids for s in before]


def test_stop_strings_are_cut_where_our_decoder_stops(model):
    free = KVDecoder(model, TOKENIZER)(prompts(6), 24, temperature=0.0)
    word = stories.VOCABULARY[free[0].ids[2]]
    ours = KVDecoder(model, TOKENIZER, stop_strings=[word])(prompts(6), 24, temperature=0.0)
    theirs = ContinuousBatching(model, TOKENIZER, CACHE, stop_strings=[word])(prompts(6), 24, temperature=0.0)
    assert any(s.stop == "string" for s in theirs)
    assert [(s.ids, s.stop, s.text, len(s.logps)) for s in theirs] == [
        (s.ids, s.stop, s.text, len(s.logps)) for s in ours
    ]


def test_adapters_are_part_of_the_policy_and_the_model_trains_on_afterwards():
    torch.manual_seed(0)
    model = add_lora(causal(), Lora(rank=4, alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    attention = model.config._attn_implementation
    ours = KVDecoder(model, TOKENIZER)(prompts(4), 16, temperature=0.0)
    theirs = ContinuousBatching(model, TOKENIZER, CACHE)(prompts(4), 16, temperature=0.0)
    assert [s.ids for s in ours] == [s.ids for s in theirs] and model.config._attn_implementation == attention


def test_a_model_that_recomputes_activations_still_does_so_afterwards():
    model = causal()
    policy = ActorCritic(model, Critic(SHAPE.hidden_size))
    policy.recompute_activations()
    ContinuousBatching(model, TOKENIZER, CACHE)(prompts(2), 4)
    assert all(layer.training and layer.gradient_checkpointing for layer in model.model.layers)


def test_a_trainer_runs_on_it_and_its_first_ratio_is_one():
    process = trainer("fixed")
    process.sampler = ContinuousBatching(process.policy.actor, TOKENIZER, CACHE)
    rows = [process.step() for _ in range(2)]
    assert rows[0]["ratio_error"] < 1e-3 and rows[1]["ratio_error"] < 1e-3


def test_what_cannot_be_decoded_is_refused_before_decoding(model):
    sampler = ContinuousBatching(model, TOKENIZER, CACHE)
    with pytest.raises(C2FError, match="128"):
        sampler(prompts(2), 120)
    with pytest.raises(C2FError, match="empty prompt"):
        sampler([Prompt((), "")], 4)
    with pytest.raises(C2FError, match="cannot be batched continuously"):
        ContinuousBatching(torch.nn.Linear(2, 2), TOKENIZER)
