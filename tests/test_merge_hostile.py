"""Model folders and output places that somebody has prepared: nothing is written through links, nothing is copied that
is no known part of a model, and what a merged model says of itself leads nowhere."""

import json
import shutil
from pathlib import Path

import pytest
from merge_models import CONFIG, trio

from c2f_utils import weights
from c2f_utils.errors import C2FError
from c2f_utils.merge import Recipe, plan_merge, run_merge


@pytest.fixture
def models(tmp_path) -> dict[str, str]:
    return trio(tmp_path)


def merged(models: dict[str, str], out: Path) -> Path:
    run_merge(plan_merge(Recipe(**models)), out)
    return out


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def key(models: dict[str, str]) -> str:
    return plan_merge(Recipe(**models)).key[:12]


def test_nothing_is_written_through_a_link_that_was_planted(tmp_path, models):
    victim, folder = tmp_path / "victim.txt", tmp_path / "victims"
    victim.write_text("mine")
    folder.mkdir()
    journal = tmp_path / f"out.partial-{key(models)}.jsonl"
    journal.symlink_to(victim)
    with pytest.raises(C2FError, match="cannot be written"):
        merged(models, tmp_path / "out")
    journal.unlink()
    partial = tmp_path / f"out.partial-{key(models)}"
    partial.symlink_to(folder)
    with pytest.raises(C2FError, match="is a link, and nothing is written through it"):
        merged(models, tmp_path / "out")
    assert victim.read_text() == "mine" and not files(folder) and not (tmp_path / "out").exists()
    partial.unlink()
    merged(models, tmp_path / "out")


def test_a_continued_merge_writes_through_no_link_in_its_folder(tmp_path, models, monkeypatch):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    monkeypatch.setattr(
        "c2f_utils.merge.stream._Merge._commit", lambda merge: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(C2FError, match="run again to resume"):
        merged(models, tmp_path / "out")
    monkeypatch.undo()
    partial = tmp_path / f"out.partial-{key(models)}"
    (partial / "config.json").symlink_to(victim)
    weights_file = partial / "model.safetensors"
    weights_file.unlink()
    weights_file.symlink_to(victim)
    with pytest.raises(C2FError, match="symbolic links"):
        merged(models, tmp_path / "out")
    shutil.rmtree(partial)
    out = merged(models, tmp_path / "out")
    assert victim.read_text() == "mine" and not (out / "config.json").is_symlink()


def test_only_known_files_are_copied_and_none_through_a_link_out_of_the_model(tmp_path, models):
    instruct, secret = Path(models["instruct"]), tmp_path / "secret.json"
    secret.write_text('{"key": "hf_secret"}')
    for name in ("credentials.json", "token.txt", "notes.json", "LICENSE-keys", "private.model"):
        (instruct / name).write_text("hf_secret")
    (instruct / "generation_config.json").symlink_to(secret)
    (instruct / "LICENSE").write_text("free")
    (instruct / "tokens.real").write_text("{}")
    (instruct / "tokenizer_config.json").symlink_to(instruct / "tokens.real")
    out = merged(models, tmp_path / "out")
    there = {"LICENSE", "README.md", "config.json", "merge_report.json", "model.safetensors", "tokenizer_config.json"}
    assert files(out) == there
    assert all(b"hf_secret" not in path.read_bytes() for path in out.iterdir())


def test_what_the_hubs_cache_links_to_is_copied(tmp_path, models):
    repo = tmp_path / "cache" / "models--lab--instruct"
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    Path(models["instruct"], "tokenizer_config.json").write_text('{"a": 1}')
    for number, file in enumerate(Path(models["instruct"]).iterdir()):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    out = merged(models | {"instruct": str(snapshot)}, tmp_path / "out")
    assert (out / "tokenizer_config.json").read_text() == '{"a": 1}'


def test_code_that_is_not_copied_is_not_named_either(tmp_path, models):
    code = {"AutoModelForCausalLM": "somebody/else--modeling.Model"}
    for role in models:
        Path(models[role], "config.json").write_text(json.dumps(CONFIG | {"auto_map": code}))
    Path(models["instruct"], "modeling.py").write_text("raise SystemExit")
    Path(models["instruct"], "tokenizer_config.json").write_text(json.dumps({"a": "é", "auto_map": code}))
    plan = plan_merge(Recipe(**models))
    assert any("auto_map" in note for note in plan.notes)
    out = merged(models, tmp_path / "out")
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"a": "é"}
    assert all(b"somebody" not in path.read_bytes() for path in out.iterdir()) and not (out / "modeling.py").exists()


def test_a_model_card_names_no_folder_of_this_machine(tmp_path, models, monkeypatch):
    card = (merged(models, tmp_path / "out") / "README.md").read_text()
    assert str(tmp_path) not in card and "instruct `instruct`" in card and '"coarse": "coarse"' in card
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    two = [{"path": models["coarse"], "weight": 1.0}]
    run_merge(plan_merge(Recipe(**models | {"coarse": two})), tmp_path / "lab" / "out")
    assert '"path": "coarse"' in (tmp_path / "lab" / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["../coarse/model.safetensors", "/etc/passwd", "README.md", "", 3])
def test_an_index_reaches_nothing_but_weights_of_its_own_folder(tmp_path, models, name):
    folder = Path(models["base"])
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(C2FError, match="as a shard; expected plain"):
        weights.files(folder)
    assert weights.count(str(folder)) is None


@pytest.mark.parametrize("header", [b"\xff" * 8 + b"{", b"[]", b"[" * 10_000, b'{"a": 1}', b'{"a": {}}'])
def test_weights_are_not_counted_in_a_header_that_lies(tmp_path, models, header):
    file = Path(models["base"], "model.safetensors")
    file.write_bytes(header if header[:1] == b"\xff" else len(header).to_bytes(8, "little") + header)
    assert weights.count(models["base"]) is None
