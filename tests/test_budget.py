"""Memory: a step survives running out of it with the same gradient, and impossible sizes are found before training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import trainer, weights

from c2f_utils import limits
from c2f_utils.coarse import budget
from c2f_utils.coarse.ranks import Ranks
from c2f_utils.errors import C2FError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


class Scarce:
    """A policy's forward that runs out of memory above so many padded tokens, as a GPU would."""

    def __init__(self, policy, tokens: int, error: Exception = FULL):
        self.forward, self.tokens, self.error, self.refused = policy.forward, tokens, error, 0
        policy.forward = self

    def __call__(self, batch, *arguments, **named):
        if batch.ids.numel() > self.tokens:
            self.refused += 1
            raise self.error
        return self.forward(batch, *arguments, **named)


def step_gradient(process, e) -> torch.Tensor:
    """The gradient that `improve` would step with, and no step."""
    kept = {}

    def keep():
        kept["g"] = torch.cat([w.grad.flatten() for w in process.updates.weights.values() if w.grad is not None])
        return []

    process.updates.step = keep
    process.improve(e)
    return kept["g"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_budget_and_leaves_the_gradient_as_it_was(error, capsys):
    gradients = []
    for scarce in (False, True):
        process = trainer("fixed", tokens_per_micro_batch=1000, minibatches=1, epochs=1)
        e = process.credit(process.judge(process.collect()))
        if scarce:
            short_of = Scarce(process.policy, 300, error)
        gradients.append(step_gradient(process, e))
    assert short_of.refused == 2 and process.budget.tokens == 250 and "now hold 250" in capsys.readouterr().out
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-5


def test_a_pass_that_fails_halfway_leaves_nothing_of_itself_in_the_gradient():
    process = trainer("fixed", tokens_per_micro_batch=150, minibatches=1, epochs=1)
    e = process.credit(process.judge(process.collect()))
    expected = step_gradient(process, e)
    process = trainer("fixed", tokens_per_micro_batch=150, minibatches=1, epochs=1)
    e = process.credit(process.judge(process.collect()))
    whole, calls = process.policy.forward, []

    def third_time_unlucky(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(*arguments, **named)

    process.policy.forward = third_time_unlucky
    found = step_gradient(process, e)
    assert len(calls) > 6 and process.budget.tokens == 75
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_training_goes_on_with_the_smaller_budget_and_a_resumed_run_keeps_it(tmp_path):
    process = trainer("fixed", tmp_path, tokens_per_micro_batch=1000)
    Scarce(process.policy, 150)
    rows = [process.step() for _ in range(2)]
    assert [row["tokens_per_micro_batch"] for row in rows] == [125, 125]
    assert trainer("fixed", tmp_path, tokens_per_micro_batch=1000).budget.tokens == 125


def test_a_single_sequence_that_does_not_fit_is_an_error_that_says_what_to_lower():
    process = trainer("fixed")
    Scarce(process.policy, 10)
    before = weights(process)
    with pytest.raises(C2FError, match="single sequence of .*gradient_checkpointing"):
        process.step()
    assert all(torch.equal(before[n], w) for n, w in weights(process).items())


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    spender = budget.TokenBudget(100, Ranks())

    with pytest.raises(RuntimeError, match="mat1"):
        for attempt in spender.attempts(10):
            with attempt:
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert spender.tokens == 100


def test_the_largest_limit_is_tried_before_training_and_nothing_is_left_of_the_trial(monkeypatch):
    monkeypatch.setattr(budget, "TINY", 0)
    process = trainer(limits.Clock(8, maximum=64, duration=10), tokens_per_micro_batch=500)
    before = weights(process)
    tried = []
    forward = process.policy.forward
    process.policy.forward = lambda batch, *a, **k: tried.append(batch) or forward(batch, *a, **k)
    longest = max(len(p.ids) for p in process.prompts) + 64
    assert budget.preflight(process.policy, process.budget, longest, 1.0, process.device)
    assert [tuple(batch.ids.shape) for batch in tried] == [(500 // longest, longest)]
    assert len(tried[0].targets) == 500 // longest * (longest - 1), "as many answer tokens as a step can have"
    assert all(p.grad is None for p in process.policy.parameters())
    assert all(torch.equal(before[n], w) for n, w in weights(process).items())


def test_a_budget_too_large_for_the_largest_limit_shrinks_before_training(monkeypatch):
    monkeypatch.setattr(budget, "TINY", 0)
    process = trainer("fixed", tokens_per_micro_batch=4000)
    Scarce(process.policy, 1000)
    budget.preflight(process.policy, process.budget, 100, 1.0, process.device)
    assert process.budget.tokens == 1000
    Scarce(process.policy, 90)
    with pytest.raises(C2FError, match="single sequence of 100 tokens"):
        budget.preflight(process.policy, process.budget, 100, 1.0, process.device)


def test_models_too_small_to_run_out_of_memory_are_not_tried():
    process = trainer("fixed")
    assert not budget.preflight(process.policy, process.budget, 100, 1.0, process.device)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is reset and read through Linux's /proc"
)
def test_memory_stays_flat_while_the_limit_grows_eightfold(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "coarse_memory.py"),
        "--iterations",
        "1",
        "--prompts",
        "32",
        "--budget",
        "512",
    ]
    done = subprocess.run(
        [*command, "--vocabulary", "16000", "--factors", "1", "8", "--out", str(tmp_path / "found.json")],
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    first, last = found["rows"]
    assert last["limit"] == 8 * first["limit"] and last["full_logits"] > 2 * last["growth"]
    assert found["ratio"] == pytest.approx(last["growth"] / first["growth"], abs=1e-3) and found["ratio"] <= 1.15
