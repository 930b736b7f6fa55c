"""How fast and how small is a merge, against a plain copy in the same run and against mergekit?

    python benchmarks/merge.py --workdir DIR                               # three models of 1.8 GB, about 12 GB of disk
    python benchmarks/merge.py --workdir DIR --mergekit PYTHON              # mergekit 0.1.5's interpreter
    python benchmarks/merge.py --workdir DIR --layers 1 --memory-layers 8   # also peak memory at another size (residue)
    python benchmarks/merge.py --workdir DIR --width 512                    # a small try

Generates Mistral-shaped bfloat16 checkpoints, then for every operator runs, in a fresh process each: a plain copy of
one model (`shutil.copyfile` and fsync), the merge, and mergekit's counterpart. Rates are bytes read plus written per
second; memory is anonymous resident memory beyond the interpreter with torch and this package. Writes
benchmarks/results/merge_<shape>.json.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from c2f_utils.merge.headers import build_header  # noqa: E402

OPERATORS = {
    "residue": {"name": "residue"},
    "lerp": {"name": "lerp"},
    "slerp": {"name": "slerp"},
    "trim": {"name": "trim", "density": 0.2},
    "dare": {"name": "dare", "density": 0.5},
    "ties": {"name": "ties", "density": 0.5},
    "orthogonal": {"name": "orthogonal"},
    "stochastic": {"name": "residue"},
}
MERGEKIT = {
    "residue": {"merge_method": "task_arithmetic", "parameters": {"normalize": False}},
    "lerp": {"merge_method": "linear"},
    "slerp": {"merge_method": "nuslerp"},
    "ties": {"merge_method": "ties", "parameters": {"normalize": True}},
}
C = 0.3


def shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a Mistral with this many layers; 4096 is the original width."""
    inner, narrow = width * 7 // 2, width // 4
    found = {"model.embed_tokens.weight": (32000, width)}
    for k in range(layers):
        block = f"model.layers.{k}."
        found |= {f"{block}self_attn.{n}_proj.weight": (width if n in "qo" else narrow, width) for n in "qkvo"}
        found |= {f"{block}mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")}
        found |= {f"{block}mlp.down_proj.weight": (width, inner)}
        found |= {f"{block}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    return found | {"model.norm.weight": (width,), "lm_head.weight": (32000, width)}


def generate(folder: Path, layers: int, width: int) -> dict[str, Path]:
    """Write base, instruct and coarse; the last two are base plus residues of 5 % and 1 % of its spread."""
    import torch

    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": width,
        "intermediate_size": width * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }
    table = shapes(layers, width)
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in table.items()}
    header = build_header(((name, "BF16", table[name], sizes[name]) for name in table), {"format": "pt"})
    models = {"base": 0.0, "instruct": 0.05, "coarse": 0.01}
    for model in models:
        (folder / model).mkdir(parents=True, exist_ok=True)
        (folder / model / "config.json").write_text(json.dumps(config))
    handles = {model: open(folder / model / "model.safetensors", "wb") for model in models}
    for handle in handles.values():
        handle.write(header)
    generator = torch.Generator().manual_seed(0)
    for name in table:
        left = sizes[name] // 2
        while left:
            count = min(left, 1 << 22)
            base = 0.02 * torch.randn(count, generator=generator)
            for model, share in models.items():
                values = base + share * 0.02 * torch.randn(count, generator=generator) if share else base
                handles[model].write(values.bfloat16().view(torch.uint8).numpy().tobytes())
            left -= count
    for handle in handles.values():
        handle.close()
    return {model: folder / model for model in models}


def anonymous(pid: int | str = "self") -> int:
    """Anonymous resident bytes of a process (file pages are the system's to keep or drop)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


class Peak:
    """The highest anonymous memory while it runs, sampled every 5 ms."""

    def __enter__(self) -> "Peak":
        self.start = self.peak = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def merge_once(recipe: dict, out: str, threads: int, chunk_mib: float) -> dict:
    """Run one merge in this process and report seconds, bytes and memory."""
    from c2f_utils.merge import Recipe, plan_merge, run_merge

    recipe = Recipe.from_dict(recipe)
    started = time.perf_counter()
    plan = plan_merge(recipe)
    planned = time.perf_counter() - started
    with Peak() as memory:
        report = run_merge(plan, out, threads=threads, chunk_mib=chunk_mib)
    return {
        "seconds": report.seconds,
        "plan_seconds": planned,
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "memory_mb": (memory.peak - memory.start) / 1e6,
        "planned_memory_mb": plan.peak_memory(chunk_mib, threads) / 1e6,
        "survival": report.survival,
    }


def copy_once(source: Path, target: Path) -> dict:
    """Copy one model's weights plainly, flushed to the disk like a merge."""
    started = time.perf_counter()
    shutil.copyfile(source, target)
    with open(target, "rb+") as handle:
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - started
    size = target.stat().st_size
    target.unlink()
    return {"seconds": seconds, "bytes_read": size, "bytes_written": size}


_MERGEKIT_RUN = """
import sys, time, json, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
started = time.perf_counter()
options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
run_merge(config, sys.argv[2], options)
print("RESULT", json.dumps({"seconds": time.perf_counter() - started}))
"""


def mergekit_config(name: str, paths: dict[str, Path], density: float = 0.5, dtype: str = "bfloat16") -> dict:
    """Give mergekit's configuration of the same merge: weights 1 and c over instruct and coarse."""
    method = MERGEKIT[name]["merge_method"]
    weights = {"instruct": 1 - C, "coarse": C} if method in ("linear", "nuslerp") else {"instruct": 1.0, "coarse": C}
    models = [{"model": str(paths[role]), "parameters": {"weight": weight}} for role, weight in weights.items()]
    if method == "ties":
        for model in models:
            model["parameters"]["density"] = density
    config = {**MERGEKIT[name], "models": models, "dtype": dtype}
    return config if method == "linear" else {**config, "base_model": str(paths["base"])}


def mergekit_once(python: str, config: dict, out: Path) -> dict:
    """Run mergekit in its own environment; memory is its process's peak, the interpreter with torch included."""
    import yaml

    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(config))
    command = [python, "-c", _MERGEKIT_RUN, str(file), str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = process.communicate()
    watcher.join()
    shutil.rmtree(out, ignore_errors=True)
    file.unlink()
    found = [line for line in output.splitlines() if line.startswith("RESULT")]
    if not found:
        raise SystemExit(f"mergekit failed:\n{errors[-2000:]}")
    return {**json.loads(found[0].removeprefix("RESULT ")), "process_peak_mb": peak / 1e6}


def in_process(arguments: dict) -> dict:
    """Run `merge_once` in a fresh interpreter, so that one merge's memory cannot hide in another's."""
    command = [sys.executable, __file__, "--one", json.dumps(arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def bench(options: argparse.Namespace) -> dict:
    work = Path(options.workdir)
    work.mkdir(parents=True, exist_ok=True)
    paths = generate(work / "models", options.layers, options.width)
    size = (paths["base"] / "model.safetensors").stat().st_size
    results: dict = {
        "what": "bytes read plus written per second; anonymous memory beyond interpreter, torch and package",
        "model_bytes": size,
        "layers": options.layers,
        "width": options.width,
        "repeats": options.repeats,
        "threads": options.threads,
        "chunk_mib": options.chunk_mib,
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "commit": commit(),
        "operators": {},
    }
    for name in options.operators.split(","):
        runs, copies, others = [], [], []
        for _ in range(options.repeats):
            copies.append(copy_once(paths["coarse"] / "model.safetensors", work / "copy.bin"))
            recipe = {role: str(path) for role, path in paths.items()} | {
                "operator": OPERATORS[name],
                "coefficient": {"default": C},
            }
            if name == "stochastic":
                recipe["out_dtype"] = "bfloat16_stochastic"
            runs.append(
                in_process(
                    {
                        "recipe": recipe,
                        "out": str(work / "out"),
                        "threads": options.threads,
                        "chunk_mib": options.chunk_mib,
                    }
                )
            )
            shutil.rmtree(work / "out")
            if options.mergekit and name in MERGEKIT:
                others.append(mergekit_once(options.mergekit, mergekit_config(name, paths), work / "other"))
        results["operators"][name] = summary(runs, copies, others)
        print(name, json.dumps(results["operators"][name]), flush=True)
    if options.memory_layers:
        shutil.rmtree(work / "models")
        paths = generate(work / "models", options.memory_layers, options.width)
        recipe = {role: str(path) for role, path in paths.items()}
        run = in_process(
            {"recipe": recipe, "out": str(work / "out"), "threads": options.threads, "chunk_mib": options.chunk_mib}
        )
        shutil.rmtree(work / "out")
        other = (paths["base"] / "model.safetensors").stat().st_size
        results["memory"] = {"model_bytes": other, "memory_mb": run["memory_mb"], "seconds": run["seconds"]}
    shutil.rmtree(work / "models")
    return results


def summary(runs: list[dict], copies: list[dict], others: list[dict]) -> dict:
    """Medians over repeats; the copy's rate is that of the same repeats."""
    seconds = statistics.median(run["seconds"] for run in runs)
    moved = runs[0]["bytes_read"] + runs[0]["bytes_written"]
    copy_rate = statistics.median((copy["bytes_read"] + copy["bytes_written"]) / copy["seconds"] for copy in copies)
    found = {
        "seconds": seconds,
        "plan_seconds": statistics.median(run["plan_seconds"] for run in runs),
        "mb_per_second": moved / seconds / 1e6,
        "copy_mb_per_second": copy_rate / 1e6,
        "share_of_copy": moved / seconds / copy_rate,
        "memory_mb": max(run["memory_mb"] for run in runs),
        "survival": runs[0]["survival"],
    }
    if others:
        other = statistics.median(run["seconds"] for run in others)
        peak = max(run["process_peak_mb"] for run in others)
        found |= {"mergekit_seconds": other, "times_faster": other / seconds, "mergekit_process_peak_mb": peak}
    return found


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="folder on the disk to measure")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--memory-layers", type=int, default=0, help="also measure memory with this many layers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk-mib", type=float, default=4)
    parser.add_argument("--operators", default=",".join(OPERATORS))
    parser.add_argument("--mergekit", help="interpreter of an environment with mergekit 0.1.5")
    parser.add_argument("--out", help="result file; default benchmarks/results/merge_<layers>x<width>.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(merge_once(**json.loads(options.one))))
        return
    if not options.workdir:
        parser.error("--workdir is needed")
    results = bench(options)
    out = Path(options.out or Path(__file__).parent / "results" / f"merge_{options.layers}x{options.width}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
