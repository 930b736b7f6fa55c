"""What a tired user types: every misuse of every command ends with exit code 2 and a sentence (or a list, where several
things are wrong), at once, with nothing written or started. Files that mean nothing: `test_refused_extremes.py`."""

import time
import types
from typing import get_args

import pytest
from test_runs import BASE, make, open_run

from c2f_utils.__main__ import main
from c2f_utils.settings.config import Settings
from c2f_utils.settings.kinds import Section

NO_RUN = ["nosuch", "", "..", "../../etc", "/etc", "a/b", ".hidden", "é", "a b", "*", "x" * 65, "sound\n", "-1", "%s"]
OF_A_RUN = {"show": [], "stop": [], "rerun": [], "report": [], "diff": ["sound"]}
BAD = "['nonsense', {'no': 1}]"  # of no setting's type


def _settings(section: type[Section], prefix: str = "") -> list[str]:
    """The dotted name of every setting."""
    names = []
    for key, field in section.model_fields.items():
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        inner = [t for t in inner if not isinstance(t, types.GenericAlias) and issubclass(t, Section)]
        if inner and prefix.count(".") < 1:
            names += _settings(inner[0], f"{prefix}{key}.") if not prefix else [f"{prefix}{key}"]
        elif prefix:
            names.append(f"{prefix}{key}")
    return names


MISUSES: list[list[str]] = [
    # the command itself
    [], ["nosuch"], ["--nosuch"], ["run"], ["runs", "extra"], ["table", "--run-id"], ["show"], ["stop"], ["rerun"],
    ["report"], ["diff"], ["diff", "sound"], ["merge"], ["clean"], ["clean", "sound"], ["RUN", "01"], ["help"],
    ["stop", "sound"], ["stop", "sound", "sound"], ["rerun", "failed"], ["report", "failed"],
    # lists
    ["runs", "--run-id", "nosuch"], ["runs", "--run-id", ""], ["runs", "--run-id", "../sound"],
    ["runs", "--stage", "nosuch"], ["runs", "--stage", "99"], ["runs", "--stage", ""], ["runs", "--stage", "-1"],
    ["runs", "--status", "finished"], ["runs", "--status", ""], ["runs", "--status", "done;failed"],
    ["runs", "--status", "done,"], ["runs", "--profile", "huge"], ["runs", "--profile", ""], ["runs", "--nosuch"],
    ["table", "--run-id", "nosuch"], ["show", "sound", "07"], ["show", "sound", "nosuch"], ["show", "sound", ""],
    ["show", "sound", "01", "02"], ["settings", "nosuch"], ["settings", "--profile", "huge"], ["settings", "a", "b"],
    # reports and repeats
    ["report", "sound", "sound"], ["report", "sound", "nosuch"], ["report", "sound", "--out"],
    ["rerun", "sound", "--as", "sound"], ["rerun", "sound", "--as", "a/b"], ["rerun", "sound", "--as", ".."],
    ["rerun", "sound", "--as"], ["rerun", "sound", "--as", "failed"], ["rerun", "sound", "--as", "x" * 65],
    # clean
    *(["clean", "--older-than", age, "--yes"] for age in (
        "", "30", "d", "-1d", "30m", "1.5d", "30 d", "1d2h", "٣d", "999999d", "all", "0", "30D", "9" * 5000 + "d",
    )),
    ["clean", "--older-than"], ["clean", "--older-than", "1d", "--status", "old"],
    ["clean", "--older-than", "1d", "--status", ""], ["clean", "--older-than", "1d", "extra"], ["clean", "--yes"],
    ["clean", "--older-than", "0h", "--status", "failed"],
    # run
    *(["run", name] for name in ("99", "-1", "3.5", "", "03_coarse", "nosuch.ipynb", "/etc/hosts", "ALL", "*")),
    *(["run", "01", "--run-id", name] for name in NO_RUN[1:]),
    *(["run", "01", "--seed", seed] for seed in ("x", "1.5", "", "1e3", "-1", str(2**31), "9" * 5000)),
    *(["run", "01", "--threads", count] for count in ("0", "-1", "x", "1.5", "1000000", "")),
    *(["run", "01", "--profile", name] for name in ("", "Tiny", "../tiny", "tiny.yaml", "all")),
    *(["run", "01", "--overrides", path] for path in ("", "nosuch.yaml", "/", "/dev/null/x")),
    *(["run", "01", "-p", text] for text in (
        "", "=", "x", "=1", "seed", "seed=", "seed=None", "seed=True", "seed=[1]", "study=1", "study=yes", "profile=1",
        "overrides=1", "overrides=[]", "overrides={1}", "overwrite=false", "run_id=..", "coarse=1", "coarse.=1",
        ".coarse=1", "coarse.law.=1", "coarse.law.name.x=1", "coarse.nosuch=1", "nosuch.x=1", "x.y.z=1",
        "Coarse.clip=1", "coarse.clip =1", "coarse.iterations=1e999", "coarse.iterations=-1", "coarse.iterations=0",
        "coarse.clip=1j",
        "overrides={'seed': 1}", "overrides={'coarse': 1}", "overrides={1: 2}", "own_law=True", "runs=['sound']",
    )),
    ["run", "01", "-p"], ["run", "01", "--seed"], ["run", "01", "--nosuch"], ["run", "01", "--study", "yes"],
    ["run", "01", "--seed", "1", "-p", "seed=1"], ["run", "01", "--run-id", "failed", "--profile", "tiny"],
    ["run", "01", "--run-id", "sound", "--profile", "tiny"], ["run", "01", "--run-id", "sound", "--seed", "3"],
    ["run", "03", "--run-id", "sound"], ["run", "07", "--seed", "9"], ["run", "08", "-p", "runs=['nosuch']"],
    ["run", "nosuch", "--help"], ["run", "01", "--help", "--profile", "huge"],
    # going on
    ["run", "--resume", "nosuch"], ["run", "--resume"], ["run", "--resume", ".."], ["run", "--resume", "sound"],
    ["run", "01", "--resume", "sound", "--run-id", "failed"], ["run", "01", "--resume", "sound", "--seed", "0"],
    ["run", "01", "--resume", "sound", "--profile", "smoke"], ["run", "01", "--resume", "sound", "-p", "seed=0"],
    ["run", "01", "--resume", "sound", "--overwrite"], ["run", "01", "--resume", "sound", "--study"],
    ["run", "01", "--resume", "sound", "--overrides", "nosuch.yaml"], ["run", "99", "--resume", "sound"],
    ["run", "01", "--resume", "sound", "--threads", "0"], ["run", "03", "--resume", "sound"],
    # merge
    ["merge", "nosuch.yaml"], ["merge", "nosuch.yaml", "--plan"], ["merge", "/", "--plan"], ["merge", "", "--plan"],
    ["merge", "nosuch.yaml", "--out"], ["merge", "a.yaml", "b.yaml"], ["merge", "nosuch.yaml", "--verify"],
    # every command that takes a run, every setting that there is
    *([command, *more, name] for command, more in OF_A_RUN.items() for name in NO_RUN),
    *(["run", "01", "-p", f"{name}={BAD}"] for name in _settings(Settings)),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An outputs folder with a finished and a failed stage."""
    import papermill  # noqa: F401

    import c2f_utils.merge  # noqa: F401
    from c2f_utils.report import build, compare  # noqa: F401

    folder = tmp_path_factory.mktemp("misuses") / "outputs"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("C2F_OUTPUTS", str(folder))
        make(open_run("sound"))
        failed = open_run("failed").stage(BASE)
        failed.begin()
        failed.fail("ValueError: boom")
    return folder


def _everything(folder) -> dict:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("arguments", MISUSES, ids=lambda words: " ".join(words)[:60] or "nothing")
def test_a_misuse_is_refused_in_a_sentence_at_once_and_nothing_is_written(runs, capsys, monkeypatch, arguments):
    monkeypatch.setenv("C2F_OUTPUTS", str(runs))
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))
    before, began = _everything(runs), time.perf_counter()
    if arguments[:1] == ["run"] and not {"--profile", "--resume"} & set(arguments):
        arguments = [*arguments, "--profile", "smoke"]
    assert main(arguments) == 2
    assert time.perf_counter() - began < 2
    printed = capsys.readouterr()
    first, *rest = printed.err.splitlines()
    assert first.startswith("c2f: ") and all(line.startswith("  - ") for line in rest), printed.err
    assert len(first) < 1200 and "Traceback" not in printed.err
    assert not printed.out and _everything(runs) == before
