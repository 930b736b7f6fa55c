"""Plants the errors of `planted_errors.py`, one after the other, into a copy of the package, and runs the named tests.

    python tests/planting.py OUT.json [NUMBER ...]

Libraries are imported once; the tests of every error run in a forked process of their own.
"""

import compileall
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from py_compile import PycInvalidationMode

from planted_errors import PLANTED

ROOT = Path(__file__).parent.parent
PATIENCE = 120  # seconds that the tests of one error may take


def copied(folder: Path) -> Path:
    """The package and its tests in `folder`, compiled so that a changed line is noticed by its content."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("c2f_utils", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    compileall.compile_dir(folder / "c2f_utils", quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return folder


def tested(folder: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit status (-1: killed or too slow) and output for tests of the copy, in a process of its own."""
    said = folder / "said.txt"
    child = os.fork()
    if child == 0:
        status = 99
        try:
            signal.alarm(PATIENCE)
            output = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(output, 1), os.dup2(output, 2)
            os.chdir(folder)
            sys.path[:0] = [str(folder), str(folder / "tests")]
            sys.dont_write_bytecode = True
            import pytest

            import c2f_utils

            assert Path(c2f_utils.__file__).is_relative_to(folder), c2f_utils.__file__
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]))
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else -1, said.read_text(errors="replace")


def main(out: Path, numbers: list[int]) -> None:
    """Write [[status, output], ...] to `out`: first that of all tests without an error, then one pair per error."""
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import transformers.models.mistral.modeling_mistral  # noqa: F401

    chosen = [PLANTED[i] for i in numbers] if numbers else PLANTED
    with tempfile.TemporaryDirectory() as name:
        folder = copied(Path(name).resolve())
        found = [tested(folder, list(dict.fromkeys(test for planted in chosen for test in planted.tests)))]
        for planted in chosen:
            file = folder / "c2f_utils" / planted.file
            sound = file.read_text(encoding="utf-8")
            file.write_text(sound.replace(planted.original, planted.mutated, 1), encoding="utf-8")
            found.append(tested(folder, list(planted.tests)))
            file.write_text(sound, encoding="utf-8")
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(number) for number in sys.argv[2:]])
