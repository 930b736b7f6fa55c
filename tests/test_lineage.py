"""The lineage of a run: what was made from what, by whom, and what has changed since."""

import json
import shutil

import pytest
from fake_results import fake_run
from test_runs import make, open_run

from c2f_utils.files import outputs as all_runs
from c2f_utils.headless import pack
from c2f_utils.report import figures, lineage, tables
from c2f_utils.runs.run import PARENTS

BASE, REWARD, COARSE, INSTRUCT = "01_base_model", "02_reward_model", "03_coarse_rlhf", "05_instruction_model"
pytestmark = pytest.mark.usefixtures("outputs")


def words(fig) -> str:
    return "\n".join(text.get_text() for text in fig.axes[0].texts)


def made(run_id: str = "a", *names: str) -> object:
    run = open_run(run_id)
    for name in names or (BASE, REWARD, COARSE, INSTRUCT):
        make(open_run(run_id), name)
    return run.dir


def arrows(fig) -> int:
    return sum(getattr(text, "arrow_patch", None) is not None for text in fig.axes[0].texts)


def test_each_stage_is_shown_with_its_run_digest_date_and_parents():
    run = made()
    fig = figures.lineage(run)
    rows = fig.data.set_index("stage")
    for name in (BASE, REWARD, COARSE, INSTRUCT):
        stage = open_run().stage(name)
        assert rows.loc[name, "digest"] == stage.fingerprint() and rows.loc[name, "state"] == "done"
        assert rows.loc[name, "parents"] == list(PARENTS[name]) and rows.loc[name, "changed"] == []
        assert stage.fingerprint()[:8] in words(fig) and stage.status()["started"][:10] in words(fig)
    assert not rows["lent"].any() and "changed" not in words(fig)
    # 01 -> 02 -> 03 -> report and 01 -> 05 -> report; that 03 read 01, too, follows.
    assert arrows(fig) == 5


def test_a_stage_that_was_changed_after_others_were_made_from_it_is_named():
    run = made()
    path = run / BASE / "results.json"
    path.write_text(json.dumps({"loss": 0.5}))
    fig = figures.lineage(run)
    assert fig.data.set_index("stage")["changed"].to_dict() == {
        BASE: [], REWARD: [BASE], COARSE: [BASE], INSTRUCT: [BASE]
    }  # fmt: skip
    assert "changed since 02, 03, 05" in words(fig) and arrows(fig) == 6, "the arrow to 03 is no longer implied"


def test_a_parent_lent_by_another_run_is_marked():
    made("lender", BASE)
    run = made("mine", REWARD, COARSE)
    found = lineage.stages_of(run).set_index("stage")
    assert found["run"].to_dict() == {BASE: "lender", REWARD: "mine", COARSE: "mine"}
    assert found["lent"].to_dict() == {BASE: True, REWARD: False, COARSE: False}
    assert "from run lender" in words(figures.lineage(run))


def test_a_damaged_record_a_long_name_and_an_empty_run_are_drawn_too():
    run = made("r" + "u" * 62)
    (run / REWARD / "provenance.json").write_text("{")
    (run / COARSE / "provenance.json").write_text('{"inputs": [], "parents": 3}')
    said = words(figures.lineage(run))
    assert said.count("damaged") == 2 and max(map(len, said.splitlines())) <= 24
    assert "no stage has results" in words(figures.lineage(all_runs() / "nothing"))


def test_in_a_pack_whose_records_were_rewritten_nothing_has_changed(tmp_path, monkeypatch):
    run = made()
    for name in (BASE, REWARD):  # a folder of this machine among the settings, as if it had been there from the start
        path = run / name / "config.json"
        config = json.loads(path.read_text())
        config["settings"]["models"]["base"] = str(tmp_path / "model")
        path.write_text(json.dumps(config))
    from c2f_utils.runs.stage import Stage

    for name in (REWARD, COARSE, INSTRUCT):
        path = run / name / "provenance.json"
        record = json.loads(path.read_text())
        record["inputs"] |= {parent: Stage(run / parent).fingerprint() for parent in record["parents"]}
        path.write_text(json.dumps(record))
    before = lineage.stages_of(run)
    assert not any(before["changed"])
    there = pack.unpack(pack.pack("a", tmp_path / "a.zip"), tmp_path / "there")
    assert str(tmp_path) not in (there / BASE / "config.json").read_text()
    after = lineage.stages_of(there)
    assert after.equals(before)
    shutil.copy(run / COARSE / "results.json", there / BASE / "results.json")
    (there / BASE / "results.json").write_text('{"loss": 2.0}')
    assert lineage.stages_of(there).set_index("stage").loc[REWARD, "changed"] == [BASE]


def test_a_pack_that_does_not_tell_of_its_stages_is_drawn_as_damaged(tmp_path):
    made("a", BASE, REWARD)
    there = pack.unpack(pack.pack("a", tmp_path / "a.zip"), tmp_path / "there")
    manifest = json.loads((there / "pack.json").read_text())
    del manifest["stages"]
    (there / "pack.json").write_text(json.dumps(manifest))
    assert all(state.startswith("damaged") for state in lineage.stages_of(there)["state"])
    assert "damaged" in words(figures.lineage(there))


def test_figures_and_tables_name_their_run_in_their_files(tmp_path):
    run = fake_run(tmp_path, "demo")
    fig = figures.lineage(run)
    for place in (tmp_path / "one", tmp_path / "two"):
        figures.save_figure(fig, place, "lineage")
        tables.save_table(tables.model_table(run), place, "models", origin="run demo · 07 --> 08")
    for name in ("figures/lineage.png", "figures/lineage.pdf", "tables/models.md", "tables/models.tex"):
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes(), name
        assert b"run demo" in content or "run demo".encode("utf-16-be") in content, name
    assert (tmp_path / "one" / "tables" / "models.tex").read_text().startswith("% run demo · 07")
    assert (tmp_path / "one" / "tables" / "models.md").read_text().count("-->") == 1
