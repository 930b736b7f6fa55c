"""Two processes do what one does: the same gradient, the same limits, the same rows, on weights that are replicated
or split.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import trainer
from two_processes import SETTINGS, found, injected

import c2f_utils
from c2f_utils.coarse.ranks import Ranks
from c2f_utils.errors import C2FError

LAUNCH = Path(c2f_utils.__file__).parent / "coarse" / "launch"
HERE = Path(__file__).parent


def launch(spread: str, folder: Path, *words: str) -> None:
    """Run `two_processes.py` under `accelerate launch` with the shipped configuration."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / f"{spread}.yaml")]
    command += ["--num_processes", "2", "--main_process_port", "0", str(HERE / "two_processes.py"), str(folder), *words]
    paths = os.pathsep.join([str(LAUNCH.parents[2]), str(HERE)])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def both(request, tmp_path_factory):
    """(what one process found, what each of two found, the folder of the two), for LoRA replicated and for full
    weights split.
    """
    lora = request.param == "ddp"
    folder = tmp_path_factory.mktemp(request.param)
    launch(request.param, folder, *["lora"] * lora)
    return found(lora=lora), [json.loads((folder / f"rows-{rank}.json").read_text()) for rank in (0, 1)], folder, lora


def flat(tensors: dict, names) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


def test_the_gradient_of_two_processes_is_that_of_one(both):
    (gradient, _, _, _), _, folder, _ = both
    theirs = load_file(folder / "gradient.safetensors")
    assert gradient.keys() == theirs.keys()
    ours = flat(gradient, gradient)
    assert ours.norm() > 0 and (ours - flat(theirs, gradient)).norm() / ours.norm() <= 1e-5


def test_processes_with_different_numbers_of_micro_batches_were_among_them(both):
    _, two, _, _ = both
    assert two[0]["world"] == two[1]["world"] == 2 and two[0]["counts"] != two[1]["counts"]


def test_the_weights_are_the_same_on_both_processes_and_those_of_one(both):
    (_, weights, _, _), _, folder, _ = both
    first, second = (load_file(folder / f"weights-{rank}.safetensors") for rank in (0, 1))
    for name, value in weights.items():
        assert torch.equal(first[name], second[name]) and torch.allclose(first[name], value, atol=1e-5), name


def test_the_limits_are_the_same_on_both_processes_and_those_of_one(both):
    (_, _, rows, _), two, _, _ = both
    limits = [
        [(row["limit"], row["next_limit"], row["reason"]) for row in table]
        for table in (rows, two[0]["rows"], two[1]["rows"])
    ]
    assert limits[0] == limits[1] == limits[2] and limits[0][0] != limits[0][-1]


def test_every_row_is_that_of_one_process_up_to_rounding(both):
    (_, _, rows, _), two, _, _ = both
    assert two[0]["rows"] == two[1]["rows"]
    for ours, theirs in zip(rows, two[0]["rows"], strict=True):
        for key, value in ours.items():
            assert theirs[key] == (pytest.approx(value, abs=5e-5) if isinstance(value, float) else value), key


def test_a_disagreement_between_processes_is_an_error_on_both(both):
    assert all("a number of its own differs between processes ([0.0, 1.0])" in each["disagreement"] for each in both[1])


def test_a_checkpoint_of_two_processes_continues_in_one(both):
    _, _, folder, lora = both
    process = trainer("logistic", folder / "checkpoints", lora, **SETTINGS)
    saved = load_file(folder / "weights-0.safetensors")
    assert process.iteration == 3 and all(torch.equal(saved[n], w) for n, w in process.updates.weights.items())
    process.sampler = injected(process)
    assert process.step()["iteration"] == 4


class Two(Ranks):
    """The first of two processes, as far as one process can tell."""

    world = 2


def test_prompts_and_limits_are_dealt_so_that_no_two_processes_share_one():
    items, ranks = list(range(7)), [Two(), Two()]
    ranks[1].rank = 1
    parts = [each.deal(items) for each in ranks]
    assert sorted(parts[0] + parts[1]) == items and abs(len(parts[0]) - len(parts[1])) == 1


def test_fewer_prompts_than_processes_are_refused():
    with pytest.raises(C2FError, match="less than the 2 processes"):
        trainer("fixed", prompts=1, minibatches=1, those=Two())


def test_split_weights_need_an_answer_per_process_in_every_minibatch():
    split = Two()
    split.sharded = True
    with pytest.raises(C2FError, match="leave fewer than 2 for the last"):
        trainer("fixed", prompts=7, minibatches=3, those=split)
