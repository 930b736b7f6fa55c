"""The profile `gpu_demo`: all notebooks headless on the wide domain, shrunk for a CPU; with a GPU it is used."""

import json

import pytest
import yaml
from finished_runs import check_metrics, finished, results

from c2f_utils.domain import stories
from c2f_utils.settings.config import STAGES
from c2f_utils.settings.load import load_settings

# Every path of the profile, nothing learnt: its sizes only.
SMALL = {
    "models": {"device": "auto"},
    "data": {"validation_prompts": 8, "test_prompts": 8},
    "pretrain": {
        "hidden_size": 32, "layers": 2, "heads": 2, "key_value_heads": 1, "intermediate_size": 64, "tokens": 30_000,
        "tokens_per_step": 2048, "warmup_steps": 2,
    },
    "reward": {"pairs": 48, "held_out_pairs": 24},
    "coarse": {
        "law": {"name": "logistic", "start": 12, "maximum": 32, "step": 8}, "iterations": 2, "prompts": 8,
        "evaluate_every": 2, "evaluation_prompts": 8, "evaluation_tokens": 32, "checkpoint_every": 2, "probes": 2,
    },
    "schedules": {
        "laws": {
            "fixed_short": {"name": "fixed", "limit": 12}, "fixed_long": {"name": "fixed", "limit": 32},
            "clock_linear": {"name": "clock", "shape": "linear", "start": 12, "maximum": 32, "duration": 2},
        }
    },
    "instruct": {"tokens": 6000, "examples_per_step": 16},
    "merge": {"coefficients": [0.4, 0.8]},
    "evaluation": {"max_tokens": 40, "prefixes": [16, 32], "samples_kept": 6},
}  # fmt: skip


def test_it_is_as_large_as_it_says_and_needs_no_hub():
    settings = load_settings("gpu_demo")
    shape, words = settings.pretrain, len(stories.vocabulary(settings.data.world))
    kept = shape.hidden_size * shape.key_value_heads // shape.heads
    layer = 2 * shape.hidden_size * (shape.hidden_size + kept) + 3 * shape.hidden_size * shape.intermediate_size
    assert 20e6 <= shape.layers * layer + 2 * words * shape.hidden_size <= 60e6
    assert settings.embedded and settings.data.vocabulary == "wide"


@pytest.mark.slow
def test_all_notebooks_run_headless_through_merge_and_report(tmp_path):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    outputs = tmp_path / "outputs"
    given = ("--profile", "gpu_demo", "--run-id", "g", "--overrides", str(tmp_path / "small.yaml"))
    finished(outputs, "run", "all", *given)
    run = outputs / "g"
    for stage in STAGES:
        assert json.loads((run / stage / "status.json").read_text())["status"] == "done"
    words = stories.vocabulary(load_settings("gpu_demo").data.world)
    assert results(run, "00")["sizes"]["words in the vocabulary"] == len(words)
    tokenizer = json.loads((run / "01_base_model" / "model" / "tokenizer.json").read_text())
    assert tokenizer["model"]["vocab"] == {word: index for index, word in enumerate(words)}
    for model in results(run, "07")["models"].values():
        check_metrics(model["sampled_t1"], longest=SMALL["evaluation"]["max_tokens"] + 6)
    assert (run / "report" / "report.md").stat().st_size > 0
