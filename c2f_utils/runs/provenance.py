"""Where a result comes from: code version, package versions, machine, memory, and fingerprints of its inputs."""

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from c2f_utils.files import fingerprint, flat, sha256

PACKAGES = (
    "torch", "transformers", "trl", "peft", "datasets", "accelerate", "safetensors", "numpy", "scipy", "pandas",
    "pydantic", "matplotlib", "papermill", "jupyterlab", "lm-eval",
)  # fmt: skip
DECIDING = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "scipy")  # decide numbers
PACKAGE = Path(__file__).parents[1]


def differences(there: dict, here: dict) -> list[str]:
    """One line per dotted key that differs, naming both values."""
    old, new = flat(there), flat(here)
    shown = lambda pairs, key: repr(pairs[key]) if key in pairs else "not set"  # noqa: E731
    changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key, ...) != new.get(key, ...)]
    return [f"{key}: {shown(old, key)} there, {shown(new, key)} here" for key in changed]


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of the packages that matter; those not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_version(root: Path) -> dict[str, object]:
    """Digest of the package; git commit and whether the working tree differs, both None outside a repository."""
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain") if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes), "digest": code_digest()}


@functools.cache
def code_digest() -> str:
    """16 hex digits over the package's Python files and profiles, as this process found them when it first asked."""
    files = [path for kind in ("*.py", "*.yaml") for path in PACKAGE.rglob(kind)]
    return fingerprint({str(path.relative_to(PACKAGE)): sha256(path) for path in files})


def code_changes(record: dict) -> list[str] | None:
    """How the code and the packages that a stage last ran differ from those of now, a line each; None where its
    provenance does not say, as before there was a digest."""
    session = (record.get("sessions") or [{}])[-1]
    there = (session.get("code") or {}).get("digest")
    if there is None:
        return None
    old, now = session.get("versions") or {}, versions()
    found = [] if there == code_digest() else [f"code of c2f_utils: {there} there, {code_digest()} here"]
    changed = [name for name in DECIDING if old.get(name) != now.get(name)]
    return found + [f"{name}: {old.get(name)} there, {now.get(name)} here" for name in changed]


def machine() -> dict[str, object]:
    """The interpreter and the machine, without names of people or networks."""
    return {"python": platform.python_version(), "platform": platform.platform(), "cores": os.cpu_count()}


def device_name() -> str:
    """The accelerator torch would use, in words, or 'cpu'; imports torch."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"cuda: {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, MiB."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        import resource  # ru_maxrss counts KiB on Linux, bytes on macOS

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 1024)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
