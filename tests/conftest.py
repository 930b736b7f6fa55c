"""Fixtures shared by all rooms: a private outputs folder, and real data where the machine has it."""

import fcntl
import os
import shutil

# Before torch is imported anywhere: on a busy machine two threads can be ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("C2F_THREADS", os.environ["OMP_NUM_THREADS"])

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    """An empty outputs folder of this test's own."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    monkeypatch.setenv("C2F_OUTPUTS", str(folder))
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with published data files (`C2F_REAL_DATA`); tests that need it are skipped without it."""
    folder = Path(os.environ.get("C2F_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set C2F_REAL_DATA")
    return folder


@pytest.fixture(scope="session")
def offline(tmp_path_factory) -> Path:
    """Folder with small local models and pairs, and the overrides that name them."""
    import offline_mistral

    folder = tmp_path_factory.mktemp("offline")
    offline_mistral.build(folder, folder / "overrides.yaml")
    return folder


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> Path:
    """Folder of one finished run of all notebooks on `smoke`, seed 0; tests may read it, not change it.

    It is made once for all processes of the tests: whoever asks first makes it, the others wait.
    """
    from finished_runs import finished

    mine = tmp_path_factory.getbasetemp()
    outputs = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "finished"
    with open(outputs.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = outputs.with_suffix(".made")  # outside: tests list what lies in the folder
        if not made.exists():
            shutil.rmtree(outputs, ignore_errors=True)
            outputs.mkdir()
            finished(outputs, "run", "all", "--profile", "smoke", "--run-id", "smoke")
            made.touch()
    return outputs / "smoke"
