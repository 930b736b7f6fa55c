"""The example on real data runs from the file of pairs to the report, as its text says, at a much smaller size."""

import subprocess
import sys

import pytest
import yaml
from finished_runs import ROOT, finished, results, rows, surroundings

from c2f_utils.domain.preferences import HUMAN
from c2f_utils.files import read_mapping
from c2f_utils.settings.config import STAGES
from c2f_utils.settings.load import load_settings

SMALL = {
    "data": {"max_prompt_tokens": 120, "validation_prompts": 6, "test_prompts": 8},
    "reward": {"pairs": 48, "held_out_pairs": 12, "max_tokens": 384},
    "coarse": {
        "iterations": 2, "prompts": 8, "evaluate_every": 1, "evaluation_prompts": 4, "evaluation_tokens": 24,
        "law": {"name": "clock", "shape": "linear", "start": 8, "maximum": 24, "duration": 2}, "checkpoint_every": 1,
    },
    "schedules": {"laws": {
        "fixed_short": {"name": "fixed", "limit": 8}, "fixed_long": {"name": "fixed", "limit": 24},
        "clock_linear": {"name": "clock", "shape": "linear", "start": 8, "maximum": 24, "duration": 2},
    }},
    "evaluation": {"max_tokens": 24, "prefixes": [8, 16], "samples_kept": 4},
}  # fmt: skip


def small(changes: dict) -> dict:
    """The example's overrides with other sizes."""
    settings = read_mapping(ROOT / "examples" / "own_model.yaml")
    for section, values in changes.items():
        settings[section] = settings.get(section, {}) | values
    return settings


@pytest.mark.slow
def test_the_example_goes_from_real_pairs_to_a_report(real_data, tmp_path):
    pairs = real_data / "hh_rlhf" / "harmless_base.jsonl.gz"
    size = ("--tokens", "20000", "--hidden", "32", "--layers", "2", "--vocabulary", "400")
    command = [sys.executable, "examples/own_model.py", str(pairs), "--out", str(tmp_path / "models"), *size]
    made = subprocess.run(command, cwd=ROOT, env=surroundings(tmp_path), capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    settings = small(SMALL)
    settings["models"] |= {name: str(tmp_path / "models" / name) for name in ("base", "instruct")}
    settings["data"]["preferences"] = str(pairs)
    overrides = tmp_path / "o.yaml"
    overrides.write_text(yaml.safe_dump(settings))
    finished(tmp_path, "run", "all", "--profile", "small_gpu", "--overrides", str(overrides), "--run-id", "own")
    for name in STAGES:
        assert read_mapping(tmp_path / "own" / name / "status.json")["status"] == "done", name
    assert {"instruct", "instruct_raw", "fine", "fine_raw"} <= set(results(tmp_path / "own", "07")["models"])
    for row in rows(tmp_path / "own" / "07_evaluation" / "samples.jsonl"):
        assert HUMAN not in row["text"]
    assert (tmp_path / "own" / "report" / "report.md").is_file()


def test_the_examples_overrides_are_settings_of_the_profile_it_names(tmp_path):
    import offline_mistral

    overrides = read_mapping(offline_mistral.build(tmp_path / "models", tmp_path / "o.yaml", "float32"))
    settings = small({"data": {"preferences": overrides["data"]["preferences"]}, "reward": {"max_tokens": 200}})
    settings["models"] |= {name: overrides["models"][name] for name in ("base", "instruct")}
    settings["models"]["instruct_form"] = "raw"
    loaded = load_settings("small_gpu", overrides=settings)
    assert loaded.data.stop_strings == [HUMAN] and loaded.models.lora is None
