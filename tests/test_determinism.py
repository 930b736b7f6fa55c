"""Same seed, same thread count, same machine: every results.json is the same byte for byte, wherever the run lies."""

import pytest
from finished_runs import finished, rows


def contents(run) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in run.glob("*/results.json")}


@pytest.mark.slow
def test_a_second_run_with_the_same_seed_in_another_folder_is_identical(smoke_run, tmp_path):
    finished(tmp_path / "elsewhere", "run", "all", "--profile", "smoke", "--run-id", "other-name")
    other = tmp_path / "elsewhere" / "other-name"
    first, second = contents(smoke_run), contents(other)
    assert len(first) >= 8 and first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    for path in smoke_run.glob("*/samples.jsonl"):
        assert path.read_bytes() == (other / path.relative_to(smoke_run)).read_bytes(), path
    for path in smoke_run.glob("*/model/*.safetensors"):
        assert path.read_bytes() == (other / path.relative_to(smoke_run)).read_bytes(), path


@pytest.mark.slow
def test_another_seed_gives_other_results_on_questions_of_its_own(smoke_run, tmp_path):
    stages = ("01", "02", "03")
    finished(tmp_path, "run", *stages, "--profile", "smoke", "--run-id", "s1", "--seed", "1")
    other = contents(tmp_path / "s1")
    assert len(other) == 3
    for name, content in other.items():
        assert content != contents(smoke_run)[name], name
    prompts = [
        [row["prompt"] for row in rows(run / "03_coarse_rlhf" / "samples.jsonl")]
        for run in (smoke_run, tmp_path / "s1")
    ]
    assert prompts[0] and not set(prompts[0]) & set(prompts[1])
