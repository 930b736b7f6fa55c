"""What is sampled becomes an answer in one place: content up to the stop string, then EOS, and the policy's own tokens
beside it."""

import copy
import json
from collections import Counter
from dataclasses import replace

import offline_mistral
import pytest
import torch
from tiny_models import TOKENIZER, PrefixReward, causal, prompts, trainer

from c2f_utils.coarse.experience import Experience, pool, signals
from c2f_utils.coarse.heads import Head
from c2f_utils.coarse.ranks import Ranks
from c2f_utils.coarse.shaping import last_prefixes
from c2f_utils.domain.problems import EOS, PAD
from c2f_utils.domain.samples import Prompt, Sample, finish
from c2f_utils.files import read_mapping
from c2f_utils.models.packing import collate
from c2f_utils.models.rewards import RewardModel
from c2f_utils.rollout.check import measure
from c2f_utils.rollout.continuous import ContinuousBatching
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.rollout.library import LibrarySampler
from c2f_utils.rollout.sampler import BatchedSampler
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import data

HEADER = "\n\nHuman:"
ANSWERS = (
    " Yes.",
    " Gladly! Start with one small thing",
    "",
    " naïve – 用户 🙂.",
    " a\n\nb\n",
    " It costs 3.50 ",
    "Human:",
)
AFTER = ("", " Why", " I", "用", "\n\nHuman: again")


def bpe(words: str):
    """A BPE trained on real-looking transcripts: `words` as GPT-2 cuts them, none (a token may hold a full stop, the
    header and more), or with a space before the text, as SentencePiece's Llama tokenizer puts one."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [row[key] for row in offline_mistral.pairs(200) for key in ("chosen", "rejected")]
    if words == "cut":
        return offline_mistral.tokenizer(texts)
    if words == "uncut":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
        special = ["<unk>", "<s>", "</s>"]
        texts += [f"{a}.{HEADER}{b}" for a in "abcdefgh" for b in "ijklmnop"] * 9
    else:
        raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet, special = [], ["<unk>", "<s>", "</s>"]
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    )
    if words == "space before":  # what the texts lack is spelled in bytes
        learnt = json.loads(raw.to_str())["model"]
        known = learnt["vocab"]
        known |= {f"<0x{byte:02X}>": len(known) + byte for byte in range(256)}
        merges = [tuple(pair) for pair in learnt["merges"]]
        raw.model = models.BPE(vocab=known, merges=merges, unk_token="<unk>", byte_fallback=True)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["cut", "uncut", "space before"])
def tokenizer(request):
    return bpe(request.param)


def finished(tokenizer, ids, stop="string", limit=99, **changes) -> Sample:
    eos = frozenset({tokenizer.eos_token_id})
    given = {"eos": eos, "stop_strings": (HEADER,)} | changes
    return finish(Prompt((5,), "p"), ids, stop, limit, torch.zeros(len(ids)), tokenizer, **given)


def read(tokenizer, ids) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_is_its_content_and_then_eos_wherever_the_stop_string_lies_in_the_tokens(tokenizer, answer, after):
    ids = tokenizer.encode(answer + HEADER + after, add_special_tokens=False)
    wanted = read(tokenizer, ids).split(HEADER)[0]
    found = finished(tokenizer, ids)
    assert found.ids[-1] == tokenizer.eos_token_id not in found.ids[:-1]
    assert read(tokenizer, found.ids[:-1]) == found.text == wanted
    assert found.sampled == ids and found.stop == "string" and found.tokens == len(found.ids)


def test_a_full_stop_that_shares_a_token_with_the_header_is_kept_and_only_that_token_is_new():
    uncut = bpe("uncut")
    shared = [i for i in range(len(uncut)) if uncut.decode([i]).startswith(f".{HEADER}")]
    assert shared, "this tokenizer has a token that holds a full stop and the header"
    before = [i for word in (" S", "ta", "rt") for i in uncut.encode(word)]
    found = finished(uncut, [*before, shared[0]])
    assert found.text == " Start."
    assert found.ids[: len(before)] == before, "what was sampled before it stays as it was sampled"


def test_a_cut_answer_gets_no_eos_and_another_end_of_the_model_becomes_the_tokenizers(tokenizer):
    ids = tokenizer.encode(" Gladly! Start", add_special_tokens=False)
    cut = finished(tokenizer, ids, "limit")
    assert cut.ids == cut.sampled == ids and cut.cut
    other = finished(tokenizer, [*ids, 7], "eos", eos=frozenset({7, tokenizer.eos_token_id}))
    assert other.ids == [*ids, tokenizer.eos_token_id] and other.sampled == [*ids, 7]
    own = finished(tokenizer, [*ids, tokenizer.eos_token_id], "eos")
    assert own.ids == own.sampled


def test_without_stop_strings_the_answer_is_what_was_sampled():
    for sample in KVDecoder(causal(), TOKENIZER)(prompts(12), 40):
        assert sample.ids == sample.sampled
        assert sample.text == TOKENIZER.decode([i for i in sample.ids if i != EOS], skip_special_tokens=True)


def model_that_meets_a_stop_string():
    """(model, tokenizer, prompts, string): some greedy answers of 40 tokens contain the string; EOS is rare."""
    words = bpe("cut")
    model = offline_mistral.model(len(words), seed=3).eval()
    with torch.no_grad():
        model.lm_head.weight[words.eos_token_id].div_(6)
    asked = [Prompt(tuple(words(row["chosen"][:40])["input_ids"]), "") for row in offline_mistral.pairs(12)]
    free = KVDecoder(model, words)(asked, 40, temperature=0.0)
    string = next(s.text[n : n + 3] for s in free for n in range(6, len(s.text) - 3) if s.text[n : n + 3].isalpha())
    return model, words, asked, string


@pytest.mark.parametrize("sampler", [KVDecoder, ContinuousBatching])
def test_samplers_hand_over_finished_answers_with_the_log_probabilities_of_what_they_sampled(sampler):
    model, words, asked, string = model_that_meets_a_stop_string()
    found = sampler(model, words, 4096, stop_strings=[string])(asked, 40, temperature=0.0)
    assert any(s.stop == "string" for s in found)
    for sample in found:
        assert len(sample.logps) == len(sample.sampled) and string not in sample.text
        assert (sample.ids[-1] == words.eos_token_id) == (not sample.cut)
        assert sample.text == words.decode(sample.ids, skip_special_tokens=True)


def test_the_self_check_goes_by_what_was_sampled():
    model, words, asked, string = model_that_meets_a_stop_string()
    head = Head(model)
    for kind in (KVDecoder, LibrarySampler):
        sampler = kind(model, words, stop_strings=[string])
        assert any(s.stop == "string" for s in sampler(asked, 40, temperature=0.0))
        found = measure(model, sampler, asked, lambda a: head.score(model, collate(a, 0, sampled=True)), tokens=40)
        assert found.holds and found.sampler_error < 1e-4 and found.trainer_error < 1e-4, found


def test_a_stop_string_of_wide_characters_is_seen_though_each_of_its_bytes_is_a_token():
    words = bpe("cut")
    spelled = words.encode("用户:")
    assert len(spelled) >= 6

    class Spelt:
        """A wave whose policy writes these tokens and nothing else."""

        def prefill(self, tokens):
            return self(None, tokens.shape[1] - 1)

        def __call__(self, token, column):
            place = column - 1  # the prompt has two tokens
            return torch.full((1, len(words)), -99.0).index_fill_(1, torch.tensor(written[place]), 99.0)

    class Spelling(BatchedSampler):
        def open(self, pads, length, on_gpu):
            return Spelt()

    written = [*words.encode(" a"), *spelled, *words.encode(" and more")]
    model = offline_mistral.model(len(words)).eval()
    (found,) = Spelling(model, words, stop_strings=["用户:"])([Prompt((5, 6), "")], 99 - 80)
    assert found.stop == "string" and found.text == " a" and found.sampled[-1] == spelled[-1]


def test_an_answer_scores_the_same_with_the_header_and_with_eos():
    from transformers import MistralForSequenceClassification

    words = bpe("uncut")
    torch.manual_seed(0)
    config = offline_mistral.model(len(words)).config
    config.num_labels, config.pad_token_id = 1, 0
    reward = RewardModel(MistralForSequenceClassification(config).eval(), 0)
    for answer in ANSWERS:
        plain = words.encode(answer, add_special_tokens=False)
        eos = finished(words, [*plain, words.eos_token_id], "eos")
        header = finished(words, [*plain, *words.encode(HEADER)])
        dirty = replace(header, ids=header.sampled)
        score = reward([eos]), reward([header]), reward([dirty])
        assert torch.equal(score[0], score[1]) and not torch.equal(score[0], score[2])


@pytest.fixture(scope="module")
def stopped():
    """A trainer whose policy often ends by a stop string of several tokens, and an iteration up to its credit."""
    process = trainer("fixed", kl_coefficient=0.0, lambda_policy=1.0, lambda_critic=1.0, token_price=0.01, prompts=16)
    free = process.collect().samples[::2]
    process.sampler.stop_strings = tuple({" ".join(s.text.split()[2:4]) for s in free if len(s.text.split()) > 3})
    e = process.credit(process.judge(process.collect()))
    assert Counter(s.stop for s in e.samples)["string"] >= 3
    assert any(len(s.sampled) > s.tokens for s in e.samples)
    return process, e


def test_the_policy_is_trained_on_what_it_sampled_and_paid_on_the_last_of_it(stopped):
    process, e = stopped
    lengths = [len(s.sampled) for s in e.samples]
    assert e.mask.sum(1).tolist() == lengths
    for row, sample, n in zip(range(len(lengths)), e.samples, lengths, strict=True):
        assert torch.allclose(e.logps[row, :n], sample.logps, atol=1e-5)
        # Undiscounted, with lambda 1 and no KL: the whole reward reaches every token, none is behind the last.
        assert torch.allclose(e.returns[row, :n], e.shaped[row].expand(n), atol=1e-5)
        assert not e.returns[row, n:].any()
    again = copy.deepcopy(process.policy)
    flat = again(collate(e.samples, PAD, sampled=True))[0]
    assert torch.allclose(flat, torch.cat([s.logps for s in e.samples]), atol=1e-5)
    assert process.improve(e)["ratio_error"] < 1e-4


def test_price_length_and_prefixes_go_by_the_content(stopped):
    process, e = stopped
    paid = torch.tensor([r - 0.01 * s.tokens for r, s in zip(e.rewards.tolist(), e.samples, strict=True)])
    assert torch.allclose(e.shaped, paid, atol=1e-5)
    assert [len(row) for row in e.prefix_rewards] == [s.tokens for s in e.samples]
    assert torch.equal(torch.stack([row[-1] for row in e.prefix_rewards]), e.rewards)
    row = process.advance(e, {})
    assert row["mean_tokens"] == pytest.approx(sum(s.tokens for s in e.samples) / len(e.samples))
    assert row["rollout_tokens"] == sum(len(s.sampled) for s in e.samples), "what was generated was paid for"


def test_a_law_hears_the_same_of_an_answer_whichever_way_it_ended():
    def heard(tail: list[int], stop: str):
        samples = [
            Sample(prompts(1)[0], [4, 5, 6, 7, EOS], stop, 16, sampled=[4, 5, 6, 7, *tail]),
            Sample(prompts(1)[0], list(range(4, 20)), "limit", 16),
        ]
        for sample in samples:
            sample.logps = torch.zeros(len(sample.sampled))
        e = Experience(samples, 16)
        e.prefix_rewards = PrefixReward().prefix_scores(samples)
        e.rewards = e.earned = PrefixReward()(samples)
        e.mask = torch.arange(16)[None] < torch.tensor([[len(s.sampled)] for s in samples])
        e.values = e.returns = e.logps = e.reference = torch.zeros(2, 16)
        found = signals(e, 0, lambda tokens, limits: 0.1 * tokens)
        return found.tail_return, found.useful_length, found.rewards, last_prefixes(e).tolist()

    assert heard([EOS], "eos") == heard([8, 9, 10, 11], "string")


def test_several_processes_pool_what_was_sampled_beside_the_answers():
    class Two(Ranks):
        world = 2

        def gather(self, rows):
            return rows

    mine = [finished(bpe("cut"), bpe("cut").encode(" Yes." + HEADER)), finished(bpe("cut"), [9, 10], "limit")]
    whole, _ = pool(Two(), [s.prompt for s in mine], mine, {})
    assert [(s.ids, s.sampled, s.text, s.stop) for s in whole] == [(s.ids, s.sampled, s.text, s.stop) for s in mine]


def test_the_reward_model_sees_in_training_what_it_scores_later(tmp_path):
    rows = offline_mistral.pairs()
    rows[0]["chosen"] += HEADER + " And"  # a turn that was begun
    overrides = offline_mistral.build(tmp_path / "models", tmp_path / "o.yaml")
    (tmp_path / "models" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = load_settings("mistral_7b", overrides=read_mapping(overrides))
    words = offline_mistral.tokenizer([row["chosen"] for row in rows])
    training, held_out, _ = data.hub_pairs(settings, words)
    trained_on = Counter(ids[-1] for pair in training + held_out for ids in pair.tokens)
    whole = [words.decode(ids[pair.prompt_tokens :]) for pair in training + held_out for ids in pair.tokens]
    assert not any(HEADER in text for text in whole)
    scored = Counter(
        finished(words, [*words.encode(row["rejected"][-20:]), *end], stop).ids[-1]
        for row in rows
        for stop, end in (("eos", [words.eos_token_id]), ("string", words.encode(HEADER)))
    )
    share = [{token: n / found.total() for token, n in found.items()} for found in (trained_on, scored)]
    assert share[0] == share[1] == {words.eos_token_id: 1.0}


def test_an_answer_is_never_longer_than_its_limit_though_its_end_is_tokenised_again():
    uncut = bpe("uncut")
    shared = next(i for i in range(len(uncut)) if uncut.decode([i]).startswith(f".{HEADER}"))
    sampled = [*uncut.encode(" S"), *uncut.encode("ta"), shared]
    found = finished(uncut, sampled, limit=len(sampled))
    assert len(found.ids) <= len(sampled) and found.ids[-1] == uncut.eos_token_id
    assert found.text == uncut.decode(found.ids, skip_special_tokens=True)
