"""Promises about size: memory depends on the chunk and not on the model, and a plan of a 7B model is made within a
second.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from merge_models import CONFIG

from c2f_utils.merge import Recipe, plan_merge

ROOT = Path(__file__).parents[1]
BENCHMARK = ROOT / "benchmarks" / "merge.py"
LIMIT_MB = 128


def generate(folder: Path, layers: int, width: int) -> dict[str, str]:
    sys.path.insert(0, str(BENCHMARK.parent))
    import merge as benchmark

    return {role: str(path) for role, path in benchmark.generate(folder, layers, width).items()}


def measure(paths: dict[str, str], out: Path, operator: str) -> dict:
    """Merge in a fresh process; gives the benchmark's figures for that one run."""
    arguments = {"recipe": {**paths, "operator": {"name": operator}}, "out": str(out), "threads": 2, "chunk_mib": 4}
    command = [sys.executable, str(BENCHMARK), "--one", json.dumps(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    shutil.rmtree(out)
    return found


@pytest.mark.slow
def test_memory_stays_under_the_limit_for_a_model_of_more_than_that(tmp_path):
    paths = generate(tmp_path, 1, 1024)  # 160 MB per model, its largest tensor 65 MB
    for operator in ("residue", "ties"):
        figures = measure(paths, tmp_path / "out", operator)
        assert figures["bytes_written"] > LIMIT_MB * 1e6
        assert figures["memory_mb"] < min(LIMIT_MB, figures["planned_memory_mb"] + 64), operator


@pytest.mark.study
def test_every_elementwise_operator_merges_half_a_gigabyte_within_the_limit(tmp_path):
    paths = generate(tmp_path, 4, 1792)
    for operator in ("residue", "lerp", "slerp", "trim", "dare", "ties", "dots", "orthogonal"):
        figures = measure(paths, tmp_path / "out", operator)
        assert figures["bytes_written"] > 0.5e9 and figures["memory_mb"] < LIMIT_MB, operator


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("C2F_LARGE") != "1", reason="needs 20 GB of disk; set C2F_LARGE=1")
def test_four_gigabytes_take_no_more_memory_than_half_of_one(tmp_path):
    small = measure(generate(tmp_path / "small", 4, 1792), tmp_path / "out", "residue")
    shutil.rmtree(tmp_path / "small")
    large = measure(generate(tmp_path / "large", 8, 4096), tmp_path / "out", "residue")
    assert large["bytes_written"] > 4e9 and large["memory_mb"] < LIMIT_MB
    assert large["memory_mb"] < small["memory_mb"] + 16


def test_a_7b_model_is_planned_within_a_second(tmp_path):
    sys.path.insert(0, str(BENCHMARK.parent))
    import merge as benchmark

    from c2f_utils.merge.headers import build_header

    shapes = benchmark.shapes(32, 4096)
    sizes = {name: 2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in shapes.items()}
    assert len(shapes) == 291 and sum(sizes.values()) > 14e9
    header = build_header(((name, "BF16", shapes[name], sizes[name]) for name in shapes), {"format": "pt"})
    for role in ("base", "instruct", "coarse"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text(json.dumps(CONFIG))
        with open(tmp_path / role / "model.safetensors", "wb") as handle:
            handle.write(header)
            handle.truncate(len(header) + sum(sizes.values()))  # a sparse file: its weights occupy no disk
    recipe = Recipe(**{role: str(tmp_path / role) for role in ("base", "instruct", "coarse")})
    started = time.perf_counter()
    plan = plan_merge(recipe)
    assert time.perf_counter() - started < 1.0
    assert len(plan.table()) == 291 and plan.bytes_written > 14e9
    assert plan.peak_memory() < LIMIT_MB * 1e6
