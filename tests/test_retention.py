"""Perplexity and forward KL: the formulas, what they are taken on, and a text file of the user's that is not one."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from fake_results import fake_run
from tiny_models import TOKENIZER, causal, prompts

from c2f_utils.coarse.heads import Head
from c2f_utils.domain import user_text
from c2f_utils.domain.problems import PAD
from c2f_utils.errors import C2FError
from c2f_utils.measure import retention as r
from c2f_utils.models.packing import collate
from c2f_utils.report import figures_retention, tables_retention
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.settings.config import Settings
from c2f_utils.settings.load import load_settings

RNG = np.random.default_rng(0)
LOGPS = [-RNG.exponential(size=n) for n in (3, 40, 7, 12, 25)]


def test_perplexity_weighs_tokens_and_its_interval_resamples_documents():
    found = r.perplexity(r.scored(LOGPS))
    assert found.value == pytest.approx(math.exp(-np.concatenate(LOGPS).mean()))
    assert found.value != pytest.approx(math.exp(-np.mean([document.mean() for document in LOGPS])))
    assert found.low < found.value < found.high and found.n == 5
    # Documents that agree within but not with each other: tokens would give a far narrower interval.
    unlike = [np.full(200, -level) for level in (0.5, 1.0, 1.5, 2.0)]
    between, tokens = r.perplexity(r.scored(unlike)), r.perplexity(r.scored([[x] for d in unlike for x in d]))
    assert between.high - between.low > 5 * (tokens.high - tokens.low)
    assert r.perplexity(r.scored([[-1.0, -2.0]])) == (pytest.approx(math.exp(1.5)), None, None, 1)


def test_a_ratio_of_perplexities_is_paired_and_one_for_the_same_model():
    mine, other = r.scored(LOGPS), r.scored([document - 0.1 for document in LOGPS])
    found = r.perplexity_ratio(other, mine)
    assert found[:3] == pytest.approx((math.exp(0.1),) * 3), "the same step on every token leaves no doubt"
    assert r.perplexity_ratio(mine, mine)[:3] == (1.0, 1.0, 1.0)
    assert r.forward_kl(mine, mine)[:3] == (0.0, 0.0, 0.0)
    with pytest.raises(C2FError, match="5 documents of 87 tokens are compared with 1 of 3; expected the same"):
        r.forward_kl(mine, r.scored([[-1.0] * 3]))


@pytest.mark.parametrize(
    ("logps", "said"),
    [([], "0 of 0 documents"), ([[-1.0], []], "1 of 2 documents"), ([[-1.0], [float("nan")]], "1 of 2 .* not finite")],
)
def test_documents_that_cannot_be_scored_are_refused(logps, said):
    with pytest.raises(C2FError, match=said):
        r.scored(logps)


@torch.no_grad()
def test_forward_kl_by_sampling_is_the_one_over_the_whole_vocabulary():
    mine, other = causal(0, 3.0), causal(1, 3.0)
    answers = KVDecoder(mine, TOKENIZER)(prompts(3) * 400, 8, seed=0)
    batch = collate(answers, PAD, sampled=True)
    scores = [r.scored([row.tolist() for row in batch.split(Head(m).score(m, batch))]) for m in (other, mine)]
    found = r.forward_kl(*scores)
    full = [m(input_ids=batch.ids).logits[batch.rows, batch.columns].float().log_softmax(-1) for m in (mine, other)]
    exact = float((full[0].exp() * (full[0] - full[1])).sum(-1).mean())
    assert found.low < exact < found.high and exact > 0.1
    assert found.high - found.low < 0.2 * exact


# A text file of the user's


def test_documents_are_what_empty_lines_part(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeffOne\nstill one.\r\n\r\n  Two: \u00fc.\n \t\n\n\nThree.".encode())
    assert user_text.read(str(file), "retention.text") == ["One\nstill one.", "Two: \u00fc.", "Three."]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("folder", "cannot be read"),
        (b"", "holds no text"),
        (b" \n\n\t\n", "holds no text"),
        (b"fine\nfine\nna\xefve\n", "line 3: byte 0xef is not UTF-8"),
        ("\u00e9t\u00e9".encode("latin-1"), "line 1: byte 0xe9 is not UTF-8"),
        ("text".encode("utf-16"), "is UTF-16"),
        (gzip.compress(b"text", mtime=0), "compressed with gzip"),
        (b"text\n\0\0", "line 2: holds a zero byte"),
    ],
)
def test_a_file_that_is_no_text_is_refused_before_work_starts(tmp_path, content, said):
    file = tmp_path / "text.txt"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(C2FError, match=said) as error:
        user_text.read(str(file), "retention.text")
    assert f"retention.text = {str(file)!r}" in str(error.value) and "UTF-8" in str(error.value)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(
        json.dumps({side: f"\n\nHuman: {n}?\n\nAssistant: {side}" for side in ("chosen", "rejected")}) + "\n"
        for n in range(8)
    ))  # fmt: skip
    changes = {"data.preferences": str(pairs), "retention.text": str(file)}
    with pytest.raises(C2FError, match=said):
        load_settings("mistral_7b", overrides=changes)


def test_the_embedded_domain_reads_no_text():
    with pytest.raises(C2FError, match="retention.text = 'x.txt' is not read: the embedded domain"):
        load_settings("tiny", overrides={"retention.text": "x.txt"})


# Results on disk


def test_an_older_stage_counts_with_the_defaults_of_what_it_did_not_have():
    settings = load_settings("tiny")
    old = settings.for_stage("07_evaluation")
    del old["retention"], old["sampling"]
    assert Settings.recorded(old, "07_evaluation") == settings.for_stage("07_evaluation")
    other = load_settings("tiny", overrides={"retention.documents": 5})
    assert Settings.recorded(old, "07_evaluation") != other.for_stage("07_evaluation")


def measured() -> dict:
    """Results of 07 with a made-up part on what is kept."""
    interval = {"value": 1.1, "low": 1.0, "high": 1.3, "n": 9}
    names = ("base", "instruct", "fine", "interpolation")
    row = {"perplexity": {"corpus": interval}, "ratio": {"corpus": interval}, "forward_kl": interval}
    gains = [
        {"a": name, "b": "instruct", "metric": "reward", "difference": 0.2, "low": 0.1, "high": 0.3}
        for name in names
        if name != "instruct"
    ]
    return {
        "models": {name: {"label": f"<{name}>", "role": name} for name in names},
        "retention": {"kinds": {"corpus": {"label": "the base corpus"}}, "models": dict.fromkeys(names, row)},
        "gains": gains,
    }


def test_every_model_has_its_rows_and_its_point():
    table = tables_retention.retention_table(measured())
    assert len(table) == 4 * 3 and set(table["model"]) == {"<base>", "<instruct>", "<fine>", "<interpolation>"}
    for loss in ("forward_kl", "corpus"):
        fig = figures_retention.gain_against_loss(measured(), loss)
        assert list(fig.data["model"]) == ["base", "instruct", "fine", "interpolation"]
        assert list(fig.data["gain"]) == [0.2, 0.0, 0.2, 0.2] and set(fig.data["loss"]) == {1.1}
        texts = {text.get_text() for text in fig.axes[0].texts}
        assert {"<base>", "<instruct>", "<fine>", "<interpolation>"} <= texts


@pytest.mark.parametrize("results", [{}, {"retention": {"kinds": {}, "models": {}}}])
def test_a_run_without_these_parts_says_so(results):
    for make in (tables_retention.retention_table, tables_retention.sampling_table,
                 tables_retention.sampling_differences, tables_retention.redundancy_table):  # fmt: skip
        assert make(results).empty
    for fig in (figures_retention.gain_against_loss(results), figures_retention.pass_at_k(results)):
        assert figures_retention.NOT_RUN in {text.get_text() for ax in fig.axes for text in ax.texts}
    assert figures_retention.of_report(None, results) == []


def test_an_older_run_on_disk_has_neither(tmp_path):
    run = fake_run(tmp_path)
    assert tables_retention.retention_table(run).empty
    assert figures_retention.pass_at_k(run).data.empty
