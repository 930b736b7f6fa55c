"""What does notebook 06 cost in merges alone: processor time, seconds and memory of merging into one model?

    python benchmarks/merge_sweep.py --workdir DIR                    # three models of 0.56 GB
    python benchmarks/merge_sweep.py --workdir DIR --layers 32 --width 4096 --device cuda

Generates Mistral-shaped bfloat16 checkpoints, loads the instruction model in a fresh process and writes merge after
merge into it, as `stages/bench.py` does: base, instruct and coarse stay on the disk. The counts are those of profile
mistral_7b with every control (49 merges). Memory is anonymous resident memory beyond the interpreter with torch, in
multiples of one model's weights; on a GPU also its peak. Writes benchmarks/results/merge_sweep_<shape>_<device>.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.merge import Peak, anonymous, generate  # noqa: E402

# Sweep, reference, parts, fixed-long's residue, random residue; interpolation; other operators.
COUNTS = {"residue": 31, "lerp": 6, "trim": 6, "ties": 6}
OPERATORS = {
    "residue": {"name": "residue"}, "lerp": {"name": "lerp"}, "trim": {"name": "trim", "density": 0.3},
    "ties": {"name": "ties", "density": 0.3},
}  # fmt: skip


def measure(folder: Path, device: str, out_dtype: str, merges: int) -> dict:
    """Merge `merges` times with every operator into one model; the first merge finds what it must know of tensors."""
    import torch
    from transformers import AutoModelForCausalLM

    from c2f_utils import merge

    recipes = {
        name: [
            merge.Recipe(
                base=str(folder / "base"), instruct=str(folder / "instruct"), coarse=str(folder / "coarse"),
                operator=spec, coefficient={"default": 0.1 + 0.1 * k}, out_dtype=out_dtype,
            )
            for k in range(merges)
        ]
        for name, spec in OPERATORS.items()
    }  # fmt: skip
    torch.zeros(1, device=device)
    begun = anonymous()
    model = AutoModelForCausalLM.from_pretrained(folder / "instruct", dtype=torch.bfloat16).to(device)
    mine = model.state_dict()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in mine.values())
    for tensor in mine.values():
        tensor.mul_(1)  # now its pages are its own, and no longer the file's
    loaded = anonymous()
    stored = merge.open_stored(recipes["residue"][0])
    merger = merge.Merger(stored["base"], stored["instruct"], stored["coarse.0"], device)
    found = {}
    with Peak() as memory:
        for name, made in recipes.items():
            found[name] = []
            for recipe in made:
                processor, wall = time.process_time(), time.perf_counter()
                for tensor, values in merger.tensors(recipe):
                    mine[tensor].copy_(values)
                if device == "cuda":
                    torch.cuda.synchronize()
                found[name].append({"cpu_s": time.process_time() - processor, "s": time.perf_counter() - wall})
    whole = {
        key: sum(rows[0][key] + (COUNTS[name] - 1) * rows[-1][key] for name, rows in found.items())
        for key in ("cpu_s", "s")
    }
    return {
        "weights_gb": weights / 1e9, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(), "out_dtype": out_dtype, "merges": found, "all_49": whole,
        "memory_in_weights": {
            "model": (loaded - begun) / weights, "peak": (memory.peak - begun) / weights,
            "on_device": torch.cuda.max_memory_allocated() / weights if device == "cuda" else None,
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1792)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out-dtype", default="bfloat16_stochastic")
    parser.add_argument("--merges", type=int, default=3, help="per operator; the last stands for all later ones")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    folder = chosen.workdir / f"{chosen.layers}x{chosen.width}"
    if chosen.one:
        print(json.dumps(measure(folder, chosen.device, chosen.out_dtype, chosen.merges)))
        return
    if not (folder / "coarse" / "model.safetensors").exists():
        generate(folder, chosen.layers, chosen.width)
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--one"], check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    name = f"merge_sweep_{chosen.layers}x{chosen.width}_{found['device'].lower().replace(' ', '_')}.json"
    path = Path(__file__).parent / "results" / name
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["all_49"]), json.dumps(found["memory_in_weights"]), f"written to {path}")


if __name__ == "__main__":
    main()
