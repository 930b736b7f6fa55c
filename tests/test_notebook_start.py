"""The first and last cell: refused in time, inputs found, and answers shown as text that cannot act."""

import json
import re
import subprocess
import sys

import nbformat
import pytest
from notebooks_for_tests import PARAMETERS, RESULT, write

from c2f_utils import files, notebook, threads
from c2f_utils.errors import C2FError
from c2f_utils.files import read_json
from c2f_utils.notebook import cells, panel, show
from c2f_utils.notebook.opening import DECIDING, deciding, opening
from c2f_utils.notebook.progress import in_words
from c2f_utils.runs import provenance
from c2f_utils.runs.run import Run
from c2f_utils.runs.stage import Stage, run_folder
from c2f_utils.settings import parameters
from c2f_utils.settings.config import PROFILES
from c2f_utils.settings.load import load_settings

BASE, REWARD, RLHF = "01_base_model", "02_reward_model", "03_coarse_rlhf"
ROOT = files.root()


@pytest.fixture(autouse=True)
def private(outputs, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(cells, "_here", None)  # a kernel has one life; these tests stand for many kernels


OPENED = "lambda: notebook.start(globals(), '01_base_model')"  # a cell that opens the run, for the record alone


def session(*cells: str) -> dict:
    """The namespace of a notebook in which these cells have been run (all of them, magics aside)."""
    namespace: dict = {"In": ["", *cells]}
    for cell in cells:
        if not cell.startswith("%"):
            exec(cell, namespace)
    return namespace


# Parameters


def test_start_opens_the_run_its_parameters_name(capsys):
    run = notebook.start(session(PARAMETERS, "# Parameters\nrun_id = 'mine'\nseed = 3\n"), BASE)
    assert (run.id, run.settings.seed, run.settings.profile) == ("mine", 3, "smoke")
    assert run.here.state() == "running"
    run.here.save_results({"value": 1})
    notebook.finish(run)
    assert run.here.done and "01_base_model: done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("injected", "said"),
    [
        ("sede = 1", "there is no parameter 'sede'; did you mean 'seed'?"),
        ("study = 'false'", "study = 'false' is text; expected bool: write False, without quotes"),
        ("seed = '1'", "seed = '1' is text; expected int: write 1, without quotes"),
        ("seed = 1.0", "expected int: write 1,"),
        ("seed = True", "seed = True is a bool"),
        ("run_id = 7", "write '7' with quotes"),
        ("overrides = '{}'", "expected dict"),
        ("rate = '1e-6'", "write 1e-6 without quotes (in papermill's own YAML: 1.0e-06)"),
        ("overrides = {'reward.learning_rate': '1e-6'}", "'1e-6' is text"),
        ("overrides = {'reward.learnin_rate': 1e-6}", "reward.learnin_rate"),
        ("profile = 'huge'", "unknown profile 'huge'"),
    ],
)
def test_wrong_parameters_are_refused_with_the_right_spelling(injected, said):
    cells = (PARAMETERS + "rate: float = 0.1\n", f"# Parameters\n{injected}\n")
    with pytest.raises(C2FError) as caught:
        notebook.start(session(*cells), BASE)
    assert said in str(caught.value)
    assert not list(files.outputs().iterdir()), "nothing was begun"


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([PARAMETERS, "runid: str = 'x'"], "'runid'; did you mean 'run_id'?"),
        ([PARAMETERS.replace("run_id:", "runid:")], "'runid'; did you mean 'run_id'?"),
        ([PARAMETERS.replace("seed:", "sede:")], "'sede'; did you mean 'seed'?"),
        ([PARAMETERS + "Run_ID: str = 'x'"], "'Run_ID'; did you mean 'run_id'?"),
        (
            [PARAMETERS, "iterations: int = 3"],
            "'iterations'; a setting is written with its section: coarse.iterations=",
        ),
        ([PARAMETERS, OPENED, "runid: str = 'x'"], "'runid'; did you mean 'run_id'?"),
        ([PARAMETERS + "own_law: bool = False", "ownlaw: bool = True"], "'ownlaw'; did you mean 'own_law'?"),
    ],
)
def test_a_parameter_misspelt_in_a_cell_is_refused_with_the_likely_spelling(cells, said):
    with pytest.raises(C2FError) as caught:
        notebook.start(session(*cells), BASE)
    assert f"there is no parameter {said}" in str(caught.value)
    assert not list(files.outputs().iterdir()), "the run 'lab' is not touched"


def test_parameters_of_one_notebook_and_those_typed_in_a_cell_of_their_own_are_taken():
    own = PARAMETERS + "runs: list = []\nseeds: list = [1]\n"
    assert notebook.start(session(own, "run_id: str = 'mine'\nprofile: str = 'smoke'"), BASE).id == "mine"


def test_a_misspelt_parameter_is_forgotten_once_it_is_corrected():
    corrected = session(PARAMETERS.replace("run_id:", "runid:"), PARAMETERS)
    assert notebook.start(corrected, BASE).id == "lab"
    for again in ("run_id: str = 'x'", PARAMETERS.replace("lab", "x"), "del runid\nrun_id = 'x'"):
        assert notebook.start(session(PARAMETERS, "runid: str = 'y'", again), BASE).id == "x"


def test_all_wrong_parameters_are_named_at_once():
    with pytest.raises(C2FError) as caught:
        notebook.start(session(PARAMETERS, "# Parameters\nsede = 1\nstudy = 'no'\n"), BASE)
    assert "sede" in str(caught.value) and "study" in str(caught.value)


def test_the_first_cell_can_be_run_again_after_later_cells_made_variables():
    cells = (
        PARAMETERS,
        "# Parameters\nseed = 2\n",
        "%matplotlib inline",
        OPENED,
        "losses = [1]\nrate: float = 'x'\nlaw: object = None\nseeds: list = [1]",
        "broken ( cell",
    )
    namespace = session(*cells[:3], cells[4])
    namespace["In"] = ["", *cells]
    first = notebook.start(namespace, BASE)
    second = notebook.start(namespace, BASE)
    assert first.here.dir == second.here.dir and second.here.state() == "running"
    notebook.finish(second)


def test_another_run_id_leaves_the_first_stage_stopped_not_running():
    first = notebook.start(session(PARAMETERS, "# Parameters\nrun_id = 'a'\n"), BASE)
    notebook.start(session(PARAMETERS, "# Parameters\nrun_id = 'b'\n"), BASE)
    assert first.here.state() == "stopped"


def test_parameters_typed_by_hand_after_papermill_count():
    namespace = session(PARAMETERS, "# Parameters\nsede = 1\n", PARAMETERS.replace("seed: int = 0", "seed: int = 5"))
    assert notebook.start(namespace, BASE).settings.seed == 5


@pytest.mark.parametrize("line", ["rate = 1", "rate: float = 2 * 3", "rate: complex = 1j", "rate: float"])
def test_a_parameters_cell_holds_annotated_literals_only(line):
    with pytest.raises(C2FError, match="rate"):
        parameters.declared(PARAMETERS + line)


def test_optional_parameters_take_none_and_help_comments_are_no_trouble():
    known = parameters.declared("limit: Optional[int] = None  # tokens\nnames: dict[str, int] = {}\n")
    assert parameters.check(known, {"limit": None, "names": {}}) == []
    assert len(parameters.check(known, {"limit": "5", "names": None})) == 2


# Life of a stage in a notebook


def test_a_missing_earlier_stage_is_refused_before_torch_is_imported():
    code = (
        "import sys\nfrom c2f_utils import notebook\n"
        "try:\n    notebook.start({'run_id': 'x'}, '02_reward_model')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
        "print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "C2FError" in said and "notebooks/01_base_model.ipynb first" in said and said.endswith("False\n")


def test_start_seeds_everything():
    import random

    import numpy as np
    import torch

    drawn = []
    for _ in range(2):
        notebook.start(session(PARAMETERS), BASE)
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert drawn[0] == drawn[1]


def test_the_recorded_thread_count_is_used_again(monkeypatch):
    import torch

    monkeypatch.setenv("C2F_THREADS", "2")
    before = torch.get_num_threads()
    try:
        assert notebook.start(session(PARAMETERS), BASE).threads == 2
        monkeypatch.setenv("C2F_THREADS", "1")
        assert notebook.start(session(PARAMETERS), BASE).threads == 2 == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "count"),
    [({1: 1.0, 2: 0.5}, 2), ({1: 1.0, 2: 0.9}, 1), ({1: 1.0, 2: 9.0}, 1), ({1: 1.0, 2: 0.6, 4: 0.5}, 4)],
)
def test_more_threads_are_taken_only_when_clearly_faster(seconds, count):
    assert threads.choose(seconds) == count


def test_the_probe_answers_in_about_a_second_and_leaves_the_generator_alone():
    import time

    import torch

    before, state = torch.get_num_threads(), torch.get_rng_state()
    start = time.monotonic()
    assert 1 <= threads.probe(0.3) <= threads.available()
    assert time.monotonic() - start < 20
    assert torch.equal(torch.get_rng_state(), state)
    threads.apply(before)


def test_a_thread_count_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("C2F_THREADS", "many")
    with pytest.raises(C2FError, match="C2F_THREADS is 'many'"):
        threads.requested()


@pytest.mark.parametrize("folder", [".", pytest.param("notebooks", marks=pytest.mark.slow)])
def test_papermill_itself_runs_a_notebook_from_the_root_and_from_notebooks(tmp_path, monkeypatch, folder):
    monkeypatch.delenv("PYTHONPATH")
    (ROOT / "notebooks").mkdir(exist_ok=True)
    path = write(tmp_path, BASE, RESULT)
    command = [sys.executable, "-m", "papermill", str(path), str(tmp_path / "o.ipynb"), "-p", "run_id", "p"]
    done = subprocess.run([*command, "-p", "study", "True"], cwd=ROOT / folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Stage(run_folder("p") / BASE).done
    refused = subprocess.run([*command, "-p", "study", "false"], cwd=ROOT / folder, capture_output=True, text=True)
    assert refused.returncode == 1 and "write False, without quotes" in refused.stderr


def test_an_unparameterised_run_uses_the_defaults(tmp_path):
    path = write(tmp_path, BASE, RESULT)
    command = [sys.executable, "-m", "jupyter", "execute", str(path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert Stage(run_folder("lab") / BASE).done


# The opening cell


@pytest.mark.parametrize("profile", PROFILES)
def test_every_setting_that_the_opening_cell_lists_decides_its_stage(profile):
    settings = load_settings(profile)
    for stage, names in DECIDING.items():
        rows = deciding(settings, stage)
        assert {name for name, *_ in rows} <= set(names.split()) and 0 < len(rows) <= 20, "a selection, not a dump"
        assert all(usual is None for *_, usual, _ in rows), "nothing differs from the profile"


def test_settings_that_differ_from_the_profile_are_marked_listed_or_not(capsys):
    changed = {"coarse.iterations": 30, "coarse.probes": 1, "coarse.law": {"name": "fixed", "limit": 40}}
    rows = {name: (value, usual) for name, value, usual, _ in deciding(load_settings("tiny", overrides=changed), RLHF)}
    assert rows["coarse.iterations"] == ("30", "17") and rows["coarse.clip"] == ("0.2", None)
    assert rows["coarse.probes"] == ("1", "4"), "not of the selection, and shown because it was changed"
    assert rows["coarse.law"] == ("fixed, limit 40", "logistic, start 24, maximum 144, step 8")
    notebook.start(session(PARAMETERS, "# Parameters\noverrides = {'pretrain.tokens': 24001}\n"), BASE)
    said = capsys.readouterr().out
    assert "* pretrain.tokens = 24001 (profile: 24000)" in said and "\n  pretrain.layers = 2\n" in said


def test_versions_are_folded():
    markup = opening({"run": "x"}, [("a.b", "1", None, "tokens")], {"torch": "2"}).markup
    assert "torch" in markup[markup.index("<details>") :] and "torch" not in markup[: markup.index("<details>")]


# Views

EVIL = "<script>alert(1)</script> & a b c d e a b c d"


def sample(text: str = EVIL, **fields) -> dict:
    return {
        "prompt": "<img src=x>",
        "text": text,
        "tokens": 9,
        "reward": 0.5,
        "stop": "limit",
        "model": "<b>m</b>",
    } | fields


@pytest.mark.parametrize(
    "view",
    [
        lambda: show.sample_browser([sample(iteration=0), sample()]),
        lambda: show.side_by_side({"<i>a</i>": [sample()], "b": [sample()]}),
        lambda: show.side_by_side({"<i>a</i>": [sample()], "b": [sample()]}, blind=True),
        lambda: opening({"<script>": "<script>"}, [("a.b", "<script>", "<img ", "<script>")], {"<script>": "1"}),
    ],
)
def test_everything_written_by_a_model_is_escaped(view):
    markup = view()._repr_html_()
    assert not re.search(r"<(script|img|b>m|i>a)", markup)
    assert "&lt;" in markup


def test_repeated_four_grams_are_marked_and_the_text_survives():
    markup = show.marked("a b c d e\n a b  c d f")
    assert markup == "a b c d e\n <mark>a b  c d</mark> f"
    assert show.marked("a b c a b c") == "a b c a b c", "no 4-gram repeats"
    assert show.marked("") == ""


def test_chips_leave_out_what_is_unknown():
    text = show.chips({"tokens": 12, "reward": None, "utility": 1.25, "stop": "limit"})
    assert "12 tokens" in text and "utility 1.25" in text and "cut by the limit" in text and "reward" not in text
    said = [show.chips({"correct_steps": number}) for number in (0, 1, 2)]
    assert ["0 correct steps<" in said[0], "1 correct step<" in said[1], "2 correct steps<" in said[2]] == [True] * 3


def test_the_browser_folds_by_prompt_with_iterations_side_by_side():
    rows = [sample(prompt=f"p{p}", text=f"t{p}{i}", iteration=i) for i in (0, 4) for p in (0, 1)]
    markup = show.sample_browser(rows).markup
    assert markup.count("<details") == 2 and markup.count("<details open>") == 1
    assert markup.index("t00") < markup.index("t04") < markup.index("t10")
    assert markup.count("p0") == 1, "a prompt that its fold shows whole is not said twice"
    long = show.sample_browser([sample(prompt="p" * 200)]).markup
    assert f"<b>{'p' * 200}</b>" in long and f"<summary>{'p' * 89}…</summary>" in long
    assert show.sample_browser([]).markup == "<p>No samples.</p>"


def test_side_by_side_has_equal_columns_and_only_common_prompts():
    two = {"base": [sample(prompt="x"), sample(prompt="y")], "fine": [sample(prompt="y")]}
    markup = show.side_by_side(two).markup
    assert markup.count("width:50.00%") == 2 and "x</b>" not in markup and "y</b>" in markup


def test_blind_columns_hide_the_names_until_asked_and_mix_them():
    models = {name: [sample(prompt=f"p{i}", text=name.upper()) for i in range(12)] for name in ("base", "fine")}
    markup = show.side_by_side(models, limit=12, blind=True).markup
    visible = re.sub(r"<details>.*?</details>", "", markup)
    assert ">base<" not in visible and ">A<" in visible
    first = [block.index("BASE") < block.index("FINE") for block in markup.split("<hr>")]
    assert len(set(first)) == 2, "the order changes between prompts"
    assert markup == show.side_by_side(models, limit=12, blind=True).markup


# Panel


def row(iteration: int, **fields) -> dict:
    usual = {
        "reward": 0.1,
        "reward_sd": 1.0,
        "kl_per_token": 0.01,
        "limit": 50,
        "mean_tokens": 30.0,
        "p95_tokens": 45.0,
    }
    usual |= {"truncated_share": 0.1, "entropy": 2.0, "value_loss": 0.5, "explained_variance": 0.2, "rep4": 0.1}
    return {"iteration": iteration, **usual, **fields}


@pytest.mark.parametrize(
    ("rows", "kind", "said"),
    [
        ([row(0, truncated_share=0.92)], "limit", "92 % of answers hit the limit of 50 tokens"),
        ([row(i, kl_per_token=0.9) for i in range(5)], "kl", "KL per token 0.90 > 0.5 nats for 5 iterations"),
        ([row(i, reward=0.2 * i, rep4=0.05 * i) for i in range(10)], "hacking", "likely reward hacking"),
        ([row(0, truncated_share=1.0, reward_sd=0.0)], "nothing", "every answer is cut and all are paid alike"),
        ([row(i, rep4=0.05 * i) for i in range(10)], "repeats", "of 4-grams have been said before, 2% at the"),
        ([row(i, kl_per_token=0.02 + 0.05 * (i > 5)) for i in range(7)], "kl_doubled", "doubled, from 0.020 to 0.070"),
        ([row(0, sampler_mismatch=2e-3)], "sampler_mismatch", "another policy than the one that is trained"),
        ([row(0, ratio_error=1.95, sampler_mismatch=0.0)], "ratio_error", "ratio_error 1.95 > 0.01 (float32)"),
        ([row(0, value_loss=float("nan"))], "nan", "value_loss is not a finite number at iteration 0"),
    ],
)
def test_alarms_are_raised_in_words(rows, kind, said):
    found = panel.alarms(rows)
    assert list(found)[-1:] == [kind] and said in found[kind] and set(found) <= {kind, "limit"}


def test_a_healthy_run_raises_no_alarm():
    assert panel.alarms([row(i, reward=0.2 * i, rep4=0.1) for i in range(20)]) == {}
    assert panel.alarms([row(i, kl_per_token=0.9 if i < 4 else 0.1) for i in range(6)]) == {}
    assert panel.alarms([]) == {} and panel.alarms([{"iteration": 0}]) == {}


def test_how_far_sampler_and_trainer_may_be_apart_depends_on_the_weights():
    rounded = [row(0, sampler_mismatch=0.07, ratio_error=0.15)]
    assert set(panel.alarms(rounded)) == {"sampler_mismatch", "ratio_error"}
    assert panel.alarms(rounded, dtype="bfloat16") == {}
    assert set(panel.alarms([row(0, sampler_mismatch=1.2, ratio_error=1.95)], dtype="bfloat16")) == set(
        panel.alarms(rounded)
    )


def test_a_headless_panel_writes_lines_alarms_and_the_figure(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(panel.time, "monotonic", lambda: clock[0])
    stage = Run(load_settings("smoke", run_id="a")).stage("03_coarse_rlhf")
    stage.begin()
    live = panel.LivePanel(stage)
    for iteration in range(21):
        clock[0] = float(iteration)
        live.update(row(iteration, truncated_share=0.95 if iteration == 7 else 0.1))
    live.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("iteration")] == ["0", "10", "20", "20"]
    assert sum(line.startswith("ALARM: 95 % of answers") for line in lines) == 1
    assert lines[-1].startswith("1 kinds of alarm") and "95 % of answers" in lines[-1], "and the last words say so"
    assert stage.status()["alarms"] == ["95 % of answers hit the limit of 50 tokens at iteration 7"]
    saved = {path.name for path in (stage.dir / "figures").iterdir()}
    assert saved == {"training_panel.png", "training_panel.pdf", "training_panel.csv"}
    stage.finish()


class Shown:
    """Stands in for a notebook's display: what each place shows at last."""

    def __init__(self, what, display_id=True):
        self.what = what
        self.views.append(self)

    def update(self, what):
        self.what = what


def test_a_panel_says_how_long_it_takes_what_was_measured_and_what_is_alarming(monkeypatch):
    clock = [0.0]
    Shown.views = []
    monkeypatch.setattr(panel.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(panel, "display_here", lambda: Shown)
    monkeypatch.setattr(panel, "headless", lambda: False)
    run = Run(load_settings("tiny", run_id="a"))
    stage = run.stage("03_coarse_rlhf")
    stage.begin()
    live = panel.LivePanel(stage)
    evaluated = [{"iteration": 0, "utility": 1.0, "accuracy_last": 0.3}, {"iteration": 3, "utility": 1.5}]
    for iteration in range(1, 5):
        clock[0] = 10.0 * iteration
        stage.log(row(iteration, truncated_share=0.95))
        live.update(row(iteration, truncated_share=0.95) | {"curve": evaluated})
    words, training, curve = (view.what for view in Shown.views)
    total = run.settings.coarse.iterations
    assert words.text.startswith(f"iteration 4 of {total}, about {in_words(10.0 * (total - 4))} left  reward 0.10")
    assert "ALARM: 95 % of answers hit the limit" in words.text and f"{stage.path('STOP')}" in words.text
    assert "in a terminal: c2f stop a, or" in words.text
    assert len(training.data) == 4 and len(curve.axes) == 2
    assert list(curve.axes[0].lines[0].get_ydata()) == [1.0, 1.5]

    stage.save_results({"curve": [{"iteration": 0, "reward": 0.1}, {"iteration": 4, "reward": 0.7}]})
    stage.finish()
    Shown.views = []
    again = run.stage("03_coarse_rlhf")
    again.begin()
    panel.LivePanel(again).close()
    words, _, curve = (view.what for view in Shown.views)
    assert "ALARM: 95 % of answers hit the limit of 50 tokens at iteration 4" in words.text, "kept when it is loaded"
    assert "STOP" not in words.text and list(curve.axes[0].lines[0].get_ydata()) == [0.1, 0.7]


def test_a_continued_panel_shows_the_rows_before_the_interruption():
    stage = Run(load_settings("smoke", run_id="a")).stage("03_coarse_rlhf")
    stage.begin()
    stage.log(row(0))
    stage.log(row(1, reward=0.3))
    live = panel.LivePanel(stage)
    live.update(row(1, reward=0.7))
    assert [(item["iteration"], item["reward"]) for item in live.rows] == [(0, 0.1), (1, 0.7)], "not twice"


def test_in_a_notebook_one_figure_is_redrawn_in_place(tmp_path, monkeypatch):
    story = (
        "for i in range(3):\n    panel.update({'iteration': i, 'reward': 1.0 * i, 'limit': 9})\npanel.close()",
        RESULT,
    )
    path = write(tmp_path, BASE, "panel = notebook.LivePanel(run.here)", *story)
    done = subprocess.run(
        [sys.executable, "-m", "papermill", path, tmp_path / "o.ipynb"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    cells = nbformat.read(tmp_path / "o.ipynb", as_version=4).cells
    pictures = [o for cell in cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 1


# Provenance


def test_provenance_names_code_versions_device_and_inputs():
    run = notebook.start(session(PARAMETERS), BASE)
    record = read_json(run.here.dir / "provenance.json")
    newest = record["sessions"][-1]
    assert newest["versions"]["torch"] and newest["device"] and newest["machine"]["python"]
    assert set(newest["code"]) == {"commit", "dirty", "digest"} and record["inputs"] == {} and record["seed"] == 0


def test_fingerprints_do_not_depend_on_the_order_of_keys():
    assert provenance.fingerprint({"a": 1, "b": [2]}) == provenance.fingerprint(json.loads('{"b": [2], "a": 1}'))
    assert provenance.fingerprint({"a": 1}) != provenance.fingerprint({"a": 1.5})


def test_bad_input_is_shown_in_a_notebook_as_its_message_alone(capsys):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_cell("from c2f_utils.errors import problems\ndef f():\n    raise problems('wrong:', ['one', 'two'])")
    done = shell.run_cell("f()")
    assert str(done.error_in_exec) == "wrong:\n  - one\n  - two"
    assert capsys.readouterr().out.strip() == str(done.error_in_exec)
    shell.run_cell("1 / 0")
    assert "Traceback" in capsys.readouterr().out, "a defect is still shown whole"
