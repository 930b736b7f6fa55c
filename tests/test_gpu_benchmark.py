"""The 7B benchmark runs at toy size on any device, and its count of operations is what the library counts."""

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.models.packing import collate

FILE = Path(__file__).parent.parent / "benchmarks" / "coarse_gpu.py"


@pytest.fixture(scope="module")
def room():
    spec = importlib.util.spec_from_file_location("coarse_gpu", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def options(room, **changes) -> argparse.Namespace:
    sizes = room.TOY_SIZE | {"iterations": 2, "engine_limit": 4, "shape": room.TOY} | changes
    return argparse.Namespace(**sizes)


@pytest.mark.slow
def test_all_sections_are_measured_and_written_one_after_the_other(room):
    written = []
    result = room.run(options(room), lambda found: written.append(len(found)))
    assert written == sorted(written) and len(set(written)) > 8
    assert set(result["table"]) == set(room.VERBS) and len(result["rows"]) == 2
    assert result["table"]["collect"]["tokens_per_second"] > 0 and result["improve"]["share_of_measured"] > 0
    assert result["at_an_eighth_of_the_limit"]["limit"] == 2
    for engine in ("kv", "continuous"):
        assert result["engines"][engine]["tokens"] == 8 * 4, result["engines"][engine]
    assert result["activations_kept"]["useful_share_of_measured"] == result["activations_kept"]["share_of_measured"]
    assert result["improve"]["useful_share_of_measured"] < result["improve"]["share_of_measured"]


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_counted_operations_are_those_of_a_pass(room, recomputed):
    # Many layers, short sequences: neither the first layer, whose input needs no gradient, nor attention counts.
    shape = room.TOY | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12}
    chosen = options(room, shape=shape, prompts=4, prompt=1, limit=7)
    policy, _, _ = room.build(chosen, torch.device("cpu"))
    if recomputed:
        policy.recompute_activations()
    with FlopCounterMode(display=False) as counter:
        logps, _, values = policy(collate([Sample(Prompt((0,), ""), [0] * 7, "limit", 7)] * 4, 0))
        (logps.sum() + values.sum()).backward()
    added_in_place = 2 * 64 * 5000 * 4 * 7  # the head's gradient, in products that the counter does not see
    counted = counter.get_total_flops() + added_in_place
    assert counted == pytest.approx(room.improve_flops(chosen, chosen.limit, recomputed), rel=0.03)
