"""The GPU's decoding loop, uncaptured on the CPU: the same greedy answers, log-probabilities and endings as the plain
loop.
"""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import TOKENIZER, causal, prompts

from c2f_utils import limits
from c2f_utils.domain import stories
from c2f_utils.errors import C2FError
from c2f_utils.models import loading
from c2f_utils.models.loading import add_lora, device, fuse_norms
from c2f_utils.rollout import decoder_gpu, loops
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.rollout.proxy import ProxyDecoder
from c2f_utils.settings.config import Lora, Models
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import coarse_rlhf


def adapted(**options) -> torch.nn.Module:
    """A tiny model whose adapters have moved."""
    torch.manual_seed(0)
    model = add_lora(causal(), Lora(rank=4, alpha=8), **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def both(model, limits, count=9, temperature=0.0, stop_strings=()):
    """Answers of the plain loop and of the other one."""
    decoder = KVDecoder(model, TOKENIZER, stop_strings=stop_strings)
    limits = [limits] * count if isinstance(limits, int) else limits
    generator = torch.Generator().manual_seed(3)
    return (
        decoder(prompts(count), limits, temperature=temperature, seed=3),
        decoder.answer(prompts(count), limits, temperature, generator, on_gpu=True),
    )


def same(ours, theirs) -> bool:
    assert [(s.ids, s.stop, s.limit) for s in ours] == [(s.ids, s.stop, s.limit) for s in theirs]
    return all(torch.allclose(a.logps, b.logps, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("check", [1, 3, 8])
def test_answers_and_their_logps_equal_the_plain_loops_however_rarely_it_looks(check, monkeypatch):
    monkeypatch.setattr(loops, "CHECK", check)
    ours, theirs = both(causal(), [1, 3, 30, 5, 30, 2, 16, 40, 8])
    assert same(ours, theirs) and {s.stop for s in ours} == {"eos", "limit"}


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["never", "at once"])
def test_dropping_finished_rows_changes_no_answer(share, monkeypatch):
    monkeypatch.setattr(loops, "COMPACT", share)
    assert same(*both(causal(), [4, 9, 30, 5, 30, 2, 16, 40, 8]))


def test_adapters_are_part_of_the_policy_and_plain_layers_share_one_product():
    model = adapted()
    first = decoder_gpu.GraphLayer(model.get_base_model().model.layers[0], model.get_base_model().config)
    assert first.qkv.fused and first.qkv.down.shape[0] == 12 and first.down.fused
    assert same(*both(model, 24))
    with model.disable_adapter():
        without = both(model, 24)
    assert same(*without) and [s.ids for s in without[0]] != [s.ids for s in both(model, 24)[0]]


def test_proxy_tuning_reads_three_buffers_that_every_replay_overwrites(monkeypatch):
    plain = decoder_gpu.Wave.__call__

    def replayed(wave, token, column):
        """As a captured step does: the same memory holds every step's logits."""
        logits = plain(wave, token, column)
        wave.logits = logits if wave.logits is None or len(wave.logits) != len(logits) else wave.logits.copy_(logits)
        return wave.logits

    monkeypatch.setattr(decoder_gpu.Wave, "__call__", replayed)
    trio, generator = [causal(seed) for seed in (5, 6, 7)], torch.Generator()
    answers = {}
    for c in (0.0, 0.5, 1.0):
        decoder = ProxyDecoder(*trio, TOKENIZER, c)
        ours, theirs = (
            decoder.answer(prompts(6), [4, 9, 30, 5, 30, 16], 0.0, generator, on_gpu) for on_gpu in (False, True)
        )
        assert same(ours, theirs)
        answers[c] = [s.ids for s in theirs]
    assert answers[0.0] != answers[0.5] != answers[1.0]


def test_stop_strings_end_answers_at_the_same_token():
    free = both(causal(), 24)[0]
    late = max(free, key=lambda s: s.tokens).ids
    words = [stories.VOCABULARY[free[0].ids[2]], stories.VOCABULARY[late[9]]]
    ours, theirs = both(causal(), [24, 24, 3, 24, 24, 24, 24, 1, 24], stop_strings=words)
    assert same(ours, theirs) and {s.stop for s in ours} >= {"string", "limit"}


def test_sampling_draws_from_the_tempered_policy_and_repeats_with_its_seed():
    ours, theirs = both(causal(), 20, temperature=0.7)
    again = both(causal(), 20, temperature=0.7)[1]
    assert [s.ids for s in theirs] == [s.ids for s in again]
    # Until the first row ends both loops draw for the same rows, and so with the same random numbers.
    until = min(s.tokens for s in ours)
    assert [s.ids[:until] for s in ours] == [s.ids[:until] for s in theirs]


def test_float32_products_may_use_tf32_only_beside_bfloat16_weights_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_float32_matmul_precision()
    try:
        device(Models(dtype="float32"))
        assert torch.get_float32_matmul_precision() == before
        device(Models(dtype="bfloat16", device="cpu"))
        assert torch.get_float32_matmul_precision() == before
        device(Models(dtype="bfloat16"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_fused_norms_compute_the_same_and_are_saved_under_the_same_names(monkeypatch):
    model = causal()
    ids = torch.tensor([prompts(1)[0].ids])
    with torch.no_grad():
        before, names = model(ids).logits, set(model.state_dict())
        monkeypatch.setattr(loading, "_fusible", lambda model: True)  # a private seam: there is no GPU to ask
        fuse_norms(model)
        assert sum(type(m) is torch.nn.RMSNorm for m in model.modules()) == 5
        assert torch.allclose(model(ids).logits, before, atol=1e-5) and set(model.state_dict()) == names
    assert same(*both(model, 24))


def test_adapters_can_be_of_the_models_type():
    kinds = {
        alike: {p.dtype for n, p in add_lora(causal().to(torch.bfloat16), Lora(rank=4), alike=alike).named_parameters()
                if "lora_" in n}
        for alike in (False, True)
    }  # fmt: skip
    assert kinds == {False: {torch.float32}, True: {torch.bfloat16}}


@pytest.mark.parametrize("changes", [{"models.device": "cpu"}, {"coarse.engine": "continuous"}])
def test_compiling_where_it_cannot_be_is_refused(changes, tmp_path):
    with pytest.raises(C2FError, match="models.compile = true with"):
        load_settings("smoke", overrides={"models.compile": True} | changes)
    settings = load_settings("smoke", overrides={"models.compile": True})
    if not torch.cuda.is_available():
        with pytest.raises(C2FError, match="torch sees no GPU"):
            coarse_rlhf.trainer(SimpleNamespace(settings=settings), limits.Fixed(8), tmp_path)
