"""Another seed is another experiment. That the same one gives the same bytes is `c2f rerun`'s (`test_command_line`)."""

import pytest
from finished_runs import finished, rows


def contents(run) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in run.glob("*/results.json")}


@pytest.mark.study
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
