"""A run as one file: whole, the same twice, readable elsewhere, silent about its machine, and no door for others."""

import hashlib
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
from fake_results import fake_run
from test_runs import make, open_run

from c2f_utils.__main__ import main
from c2f_utils.errors import C2FError
from c2f_utils.files import outputs as all_runs
from c2f_utils.files import root
from c2f_utils.headless import pack
from c2f_utils.report import build, private
from c2f_utils.runs import locks, registry
from c2f_utils.runs.stage import Stage

BASE, COARSE = "01_base_model", "03_coarse_rlhf"


@pytest.fixture
def run(outputs) -> Path:
    return fake_run(outputs)


def content(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_a_finished_run_is_packed_opened_and_read_elsewhere(smoke_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("C2F_OUTPUTS", str(smoke_run.parent))
    first, second = (pack.pack("smoke", tmp_path / name) for name in ("a.zip", "b.zip"))
    assert first.read_bytes() == second.read_bytes()
    found = content(first)
    for stage in smoke_run.glob("0*_*/"):
        for name in ("config.json", "status.json", "provenance.json", "notebook.ipynb"):
            assert f"{stage.name}/{name}" in found, name
    assert {"report/report.html", "report/manifest.json", f"{COARSE}/metrics.jsonl"} <= set(found)
    assert not [name for name in found if "/model/" in name or "checkpoint" in name or name.endswith(".safetensors")]
    assert first.stat().st_size < 2**24
    status = json.loads((smoke_run / BASE / "status.json").read_text())
    for name, raw in found.items():
        for place in (smoke_run.parent, root(), Path.home(), tmp_path.parent):
            assert f"{place}/".encode() not in raw, (name, place)
        assert f'"host": "{status["host"]}"'.encode() not in raw, name
    listed = json.loads(found.pop("pack.json"))
    assert {name: about["sha256"] for name, about in listed["files"].items()} == {
        name: hashlib.sha256(raw).hexdigest() for name, raw in found.items()
    }
    for path in smoke_run.glob("*/results.json"):
        assert found[str(path.relative_to(smoke_run))] == path.read_bytes(), "results are never rewritten"

    there = tmp_path / "there"
    assert main(["pack", "--open", str(first), "--into", str(there)]) == 0
    monkeypatch.setenv("C2F_OUTPUTS", str(there))
    assert set(registry.table()["status"]) == {"done"} and main(["table"]) == 0
    shutil.copytree(there / "smoke", there / "other")
    capsys.readouterr()
    assert main(["diff", "smoke", "other"]) == 0
    assert capsys.readouterr().out.count("identical") == 8
    assert "Models of run smoke" in build.overview(there / "smoke")
    monkeypatch.setattr(build._Builder, "_figure", lambda *_: None)  # drawing takes longer than all the rest
    page = build.build(there / "smoke", tmp_path / "report")
    ours, theirs = (json.loads((p / "manifest.json").read_text()) for p in (page.parent, smoke_run / "report"))
    assert ours["results"] == theirs["results"] and ours["missing"] == theirs["missing"]
    with pytest.raises(C2FError, match="model/ of 01_base_model in run 'smoke' is missing"):
        Stage(there / "smoke" / BASE).model()
    assert pack.pack("other", tmp_path / "c.zip"), "what was opened can be packed"


def test_the_report_of_a_finished_run_tells_nothing_of_this_machine(smoke_run, monkeypatch):
    monkeypatch.setenv("C2F_OUTPUTS", str(smoke_run.parent))
    hidden = private.Private([json.loads((smoke_run / BASE / "status.json").read_text())["host"]])
    for path in [path for path in (smoke_run / "report").rglob("*") if path.is_file()]:
        raw = path.read_bytes()
        assert not hidden.told(raw) and not private.keys(raw), path
        if path.suffix not in (".png", ".pdf"):
            assert hidden.taken_out(raw.decode()) == raw.decode(), path


def test_folders_host_and_user_are_taken_out_and_answers_stay(run, tmp_path, monkeypatch):
    monkeypatch.setattr(private, "_user", lambda: "hildegard")
    home = tmp_path / "home" / "hildegard"
    monkeypatch.setenv("HOME", str(home))
    stage = run / COARSE
    status = json.loads((stage / "status.json").read_text()) | {"host": "node-17.cluster"}
    (stage / "status.json").write_text(json.dumps(status))
    config = json.loads((stage / "config.json").read_text())
    config["settings"]["models"] = {"base": f"{home}/models/größer"}
    (stage / "config.json").write_text(json.dumps(config))  # escaped beyond ASCII
    lines = [
        f"\x1b[32m{root()}/c2f_utils/coarse/ppo.py:12\x1b[39m in step",
        "\x1b[0;31m/usr/share/data/set.jsonl\x1b[0m is missing",
        f"{all_runs()}/demo/{COARSE} on node-17.cluster by hildegard; hildegards stay, and so does and/or",
    ]
    (stage / "log.txt").write_text("\n".join(lines))
    (stage / "notebook.ipynb").write_text(json.dumps({"cells": [{"outputs": [{"text": lines}]}]}))
    answer = json.dumps({"text": "#!/usr/bin/python and hildegard"})
    (stage / "samples.jsonl").write_text(answer)
    found = content(pack.pack("demo", tmp_path / "demo.zip"))
    log = found[f"{COARSE}/log.txt"].decode()
    assert log.splitlines()[0] == "\x1b[32m⟨project⟩/c2f_utils/coarse/ppo.py:12\x1b[39m in step"
    assert log.splitlines()[1] == "\x1b[0;31m⟨elsewhere⟩/set.jsonl\x1b[0m is missing"
    assert log.splitlines()[2] == (f"⟨outputs⟩/demo/{COARSE} on ⟨host⟩ by ⟨user⟩; hildegards stay, and so does and/or")
    assert json.loads(found[f"{COARSE}/notebook.ipynb"])["cells"][0]["outputs"][0]["text"] == log.split("\n")
    assert json.loads(found[f"{COARSE}/config.json"])["settings"]["models"]["base"] == "⟨home⟩/models/größer"
    assert found[f"{COARSE}/samples.jsonl"].decode() == answer
    about = json.loads(found["pack.json"])
    assert f"{COARSE}/log.txt" in about["rewritten"] and f"{COARSE}/samples.jsonl" not in about["rewritten"]
    assert about["stages"][COARSE]["fingerprint"] == Stage(stage).fingerprint()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("key kx93-abc'def==", "the value of MY_API_KEY"),
        ("key kx93-abc&#x27;def==", "the value of MY_API_KEY"),
        ("hf_" + "a1B2" * 8, "a Hugging Face token"),
        ("sk-proj-" + "a1B2_" * 5, "an API key"),
        ("ghp_" + "a1B2" * 9, "a GitHub token"),
        ("AKIA" + "ABCD" * 4, "an AWS key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("'Authorization': 'Bearer abcdefghijklmnop'", "an authorization header"),
        ("http://me:hunter22@127.0.0.1:8000/v1", "an address with a password"),
    ],
)
def test_a_file_with_a_key_is_refused_and_the_key_is_not_repeated(run, tmp_path, monkeypatch, capsys, text, said):
    monkeypatch.setenv("MY_API_KEY", "kx93-abc'def==")
    monkeypatch.setenv("C2F_NO_TOKEN", "1")
    monkeypatch.setenv("TOKENIZERS_OF_MINE", "01_base_model")
    (run / BASE / "log.txt").write_text(f"1 said {text} there")
    assert main(["pack", "demo", "--out", str(tmp_path / "p.zip")]) == 2
    message = capsys.readouterr().err
    assert f"{BASE}/log.txt holds {said}" in message and text not in message and "Traceback" not in message
    assert "TOKENIZERS" not in message, "which is no token"
    assert not (tmp_path / "p.zip").exists()


def test_links_weights_and_what_is_set_aside_stay_out(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (run / BASE / "linked.txt").symlink_to(tmp_path / "mine.txt")
    (run / BASE / "figures").symlink_to(tmp_path)
    (run / BASE / "model").mkdir()
    for name in ("model/config.json", "model.safetensors", ".hidden.json", "STOP"):
        (run / BASE / name).write_text("{}")
    shutil.copytree(run / COARSE, run / f"{COARSE}.old-1")
    (run / "run.json").write_text(json.dumps({"overrides": str(tmp_path)}))
    (run / "pack.json").write_text("what another pack held")
    found = content(pack.pack("demo", tmp_path / "p.zip"))
    names = {name for name in found if name.startswith(BASE) or "old-1" in name}
    assert json.loads(found["run.json"])["overrides"].startswith("⟨") and found["pack.json"].startswith(b"{")
    assert names == {f"{BASE}/{name}.json" for name in ("config", "status", "provenance", "results", "timings")}


def test_what_cannot_be_packed_is_a_sentence(run, tmp_path, capsys):
    status = json.loads((run / BASE / "status.json").read_text())
    (run / BASE / "status.json").write_text(json.dumps(status | {"status": "running"} | locks.owner()))
    for arguments, said in (
        (["demo"], "01_base_model in run 'demo' is at work"),
        (["nope"], "there is no run 'nope'"),
        (["../demo"], "run_id is '../demo'"),
        (["demo", "--out", str(tmp_path / "x.tar")], "ends with .zip"),
    ):
        assert main(["pack", *arguments]) == 2
        message = capsys.readouterr().err
        assert said in message and message.count("\n") == 1
    assert os.listdir(tmp_path) == ["outputs"]


def archive(path: Path, *entries: tuple[str, bytes], mode: int = 0o100644, run_id: str = "demo", **manifest) -> Path:
    """A pack whose manifest is true of its entries, whatever their names are."""
    files = {n.partition("/")[2]: {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)} for n, raw in entries}
    about = {"format": 1, "run": run_id, "files": files} | manifest
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, raw in ((f"{run_id}/pack.json", json.dumps(about).encode()), *entries):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (0o100644 if name.endswith("pack.json") else mode) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            out.writestr(entry, raw)
    return path


GOOD = ("demo/01_base_model/results.json", b"{}")


def hostile(tmp_path: Path) -> dict[str, Path]:
    """Packs that somebody made to do harm, by what is wrong with them."""
    at = iter(tmp_path / f"{number}.zip" for number in range(1000))
    made = {
        f"named {name}": archive(next(at), GOOD, (name, b"{}"))
        for name in (
            "/etc/x.json", "../x.json", "demo/../x.json", "demo/../../x.json", "demo\\..\\x.json", "C:/x.json",
            "other/x.json", "demo/.ssh/x.json", "demo/a/b/c/d.json", "demo/x.safetensors", "demo/run.py",
            "demo//x.json", "demo/x\n.json", "demo/" + "x" * 300 + ".json", "demo/a/", "demo",
        )
    }  # fmt: skip
    made["twice"] = archive(next(at), GOOD, GOOD)
    made["twice but for case"] = archive(next(at), GOOD, (GOOD[0].replace("results", "Results"), b"{}"))
    made["a link"] = archive(next(at), GOOD, ("demo/x.json", b"/etc/passwd"), mode=0o120777)
    made["a device"] = archive(next(at), ("demo/x.json", b""), mode=0o020666)
    made["too large"] = archive(next(at), ("demo/x.json", bytes(pack.LARGEST + 1)))
    made["too many"] = archive(next(at), *((f"demo/{number}.json", b"") for number in range(pack.MOST_FILES)))
    made["other content"] = archive(next(at), GOOD, files={GOOD[0][5:]: {"sha256": "0" * 64}})
    made["not listed"] = archive(next(at), GOOD, files={})
    made["missing"] = archive(
        next(at), GOOD, files={GOOD[0][5:]: {"sha256": hashlib.sha256(b"{}").hexdigest()}, "y": {"sha256": "1"}}
    )
    made["of another format"] = archive(next(at), GOOD, format=2)
    made["of another run"] = archive(next(at), GOOD, run="else")
    for number, files in enumerate((None, [], {"x": None}, "x")):
        made[f"files {number}"] = archive(next(at), GOOD, files=files)
    config = ("demo/01_base_model/config.json", b"{}")
    for number, stages in enumerate((None, {}, [], {"01_base_model": {}}, {"01_base_model": {"fingerprint": 1}})):
        made[f"stages {number}"] = archive(next(at), config, stages=stages)
    made["a bad id"] = archive(next(at), run_id=".demo")
    whole = archive(next(at), GOOD).read_bytes()
    for name, raw in {
        "empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2], "with a tail": whole + b"x",
        "altered": whole.replace(b"results", b"resulta", 1), "other bytes": whole[:60] + b"\xff\xff\xff" + whole[63:],
        "a long list": whole[:-12] + struct.pack("<L", 2**31) + whole[-8:],
    }.items():  # fmt: skip
        made[name] = next(at)
        made[name].write_bytes(raw)
    made["no manifest"] = next(at)
    with zipfile.ZipFile(made["no manifest"], "w") as out:
        out.writestr(*GOOD)
    made["deep manifest"] = next(at)
    with zipfile.ZipFile(made["deep manifest"], "w") as out:
        out.writestr("demo/pack.json", "[" * 100_000)
    made["a folder"] = tmp_path / "folder"
    made["a folder"].mkdir()
    made["missing file"] = tmp_path / "nowhere.zip"
    return made


def test_hostile_packs_are_refused_in_a_sentence_and_leave_nothing(outputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pack, "LARGEST", 2**20)
    (tmp_path / "packs").mkdir()
    for kind, file in hostile(tmp_path / "packs").items():
        before = {path for path in tmp_path.rglob("*")}
        assert main(["pack", "--open", str(file)]) == 2, kind
        message = capsys.readouterr().err
        assert message.startswith("c2f: ") and "Traceback" not in message and len(message) < 2000, kind
        assert {path for path in tmp_path.rglob("*")} == before, kind


def test_a_size_that_is_not_true_gets_no_more_bytes_than_it_says(outputs, tmp_path, capsys):
    """The list says 2 bytes, and the data swell to 8 MiB."""
    file = archive(tmp_path / "bomb.zip", GOOD, ("demo/x.json", bytes(2**23)))
    raw = file.read_bytes()
    file.write_bytes(raw.replace(struct.pack("<L", 2**23), struct.pack("<L", 2)))
    assert main(["pack", "--open", str(file)]) == 2
    assert "is no whole pack" in capsys.readouterr().err and not list(outputs.iterdir())


def test_a_run_out_of_a_pack_lends_nothing(outputs, tmp_path):
    make(open_run("mine"))
    make(open_run("theirs"))
    file = pack.pack("theirs", tmp_path / "p.zip")
    shutil.rmtree(outputs / "theirs")
    pack.unpack(file)
    assert registry.latest(BASE, "smoke", 0).run_id == "mine"


def test_an_id_that_is_taken_is_refused_and_the_run_left_alone(run, tmp_path, capsys):
    file = pack.pack("demo", tmp_path / "p.zip")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["pack", "--open", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_report_tells_no_folder_even_of_what_is_damaged_or_set(tmp_path, outputs, monkeypatch):
    real = build._Builder._figure  # drawing all of them takes longer than all the rest: that of the damaged file is
    drawn = lambda self, name, *rest: real(self, name, *rest) if name == "03_training" else None  # noqa: E731
    monkeypatch.setattr(build._Builder, "_figure", drawn)
    unasked = ("02_reward_model", "04_length_schedules", "06_residue_merging")
    runs = [fake_run(outputs, name, seed, skip=unasked) for name, seed in (("a", 1), ("b", 2))]
    config = runs[1] / COARSE / "config.json"
    found = json.loads(config.read_text())
    found["settings"]["models"] = {"base": f"{Path.home()}/models/secret_base"}
    config.write_text(json.dumps(found))
    (runs[0] / COARSE / "metrics.jsonl").write_text("[" * 100 + "\n{}")
    page = build.build(runs[0], tmp_path / "report", runs=["b"])
    assert "could not be made" in (page.parent / "report.md").read_text(), "the damaged file is spoken of"
    assert "⟨home⟩/models/secret" in (page.parent / "tables" / "runs_settings.csv").read_text()
    for path in (path for path in page.parent.rglob("*") if path.is_file()):
        assert str(outputs).encode() not in path.read_bytes(), path
        assert f"{Path.home()}/".encode() not in path.read_bytes(), path
