"""`c2f run`: refused before a kernel starts, stopped without loss, failed with words, continued by the same command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from notebooks_for_tests import PARAMETERS, RESULT, write

from c2f_utils.__main__ import main
from c2f_utils.errors import C2FError
from c2f_utils.files import read_json
from c2f_utils.headless import jobs
from c2f_utils.runs.stage import Stage, run_folder

BASE, REWARD, EVALUATION, REPORT = "01_base_model", "02_reward_model", "07_evaluation", "08_report"
# Works until it is stopped, as a trainer does.
LOOP = """import time
from pathlib import Path
for step in range(600):
    run.here.path("checkpoints", str(step)).touch()
    if run.here.stop_requested():
        break
    time.sleep(0.1)"""


@pytest.fixture(autouse=True)
def project(tmp_path, outputs, monkeypatch):
    """Small notebooks in place of the real ones; kernels find the package by PYTHONPATH as well as when installed."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(jobs, "notebooks_folder", lambda: folder)
    monkeypatch.setenv("PYTHONPATH", str(Path(jobs.__file__).parent.parent))
    return folder


def stage(name: str = BASE, run_id: str = "r") -> Stage:
    return Stage(run_folder(run_id) / name)


def test_a_run_leaves_an_executed_notebook_a_log_and_one_line(project, capsys):
    write(project, BASE, RESULT, "print('spoken')")
    assert main(["run", "01", "--run-id", "r", "--seed", "1"]) == jobs.DONE
    printed = capsys.readouterr()
    assert [line.split()[:2] for line in printed.out.splitlines()[1:]] == [[BASE, "done"]]
    assert float(printed.out.split()[-2]) > 50, "peak memory of the kernel, MB"
    assert "TCP without encryption" not in printed.out + printed.err
    files = {path.name for path in stage().dir.iterdir()}
    assert {"notebook.ipynb", "log.txt", "results.json", "config.json", "provenance.json", "status.json"} <= files
    log = (stage().dir / "log.txt").read_text()
    assert "spoken" in log and "TCP without encryption" not in log
    assert read_json(stage().dir / "config.json")["settings"]["seed"] == 1
    assert not list(stage().dir.parent.glob("*.running.*"))
    assert main(["run", BASE, "--run-id", "r", "--seed", "1"]) == jobs.DONE, "a second run loads"
    assert "results are loaded" in (stage().dir / "notebook.ipynb").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["99"], "there is no notebook '99'"),
        (["missing.ipynb"], "no such notebook"),
        (["01", "--profile", "huge"], "unknown profile 'huge'"),
        (["01", "-p", "sede=1"], "did you mean 'seed'?"),
        (["01", "-p", "study=false"], "write False, without quotes"),
        (["01", "-p", "seed=one"], "seed = 'one' is text; expected int"),
        (["01", "-p", "seed"], "expected name=value"),
        (["01", "-p", "overrides=many"], "expected a dict"),
        (["01", "--seed", "1", "-p", "seed=2"], "given twice"),
        (["01", "-p", "pretrain.tokens=many"], "pretrain.tokens"),
        (["01", "-p", "pretrain.tokns=5"], "pretrain.tokns"),
        (["01", "--run-id", "a/b"], "run_id"),
        (["01", "--threads", "0"], "--threads 0"),
        (["02"], "notebooks/01_base_model.ipynb first"),
        (["01", "--overrides", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input_is_refused_before_any_kernel_starts(project, capsys, monkeypatch, arguments, said):
    write(project, BASE)
    write(project, REWARD)
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))
    assert main(["run", *arguments]) == jobs.BAD_INPUT
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message


def test_an_unwritable_outputs_folder_is_refused_before_any_kernel_starts(project, capsys, monkeypatch, tmp_path):
    write(project, BASE)
    (tmp_path / "file").touch()
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path / "file"))
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))
    assert main(["run", "01"]) == jobs.BAD_INPUT
    assert "cannot be written" in capsys.readouterr().err


def test_a_stage_with_another_configuration_is_refused_or_set_aside(project, capsys):
    write(project, BASE, RESULT)
    assert main(["run", "01", "--run-id", "r"]) == jobs.DONE
    assert main(["run", "01", "--run-id", "r", "-p", "pretrain.tokens=9"]) == jobs.BAD_INPUT
    assert "pretrain.tokens" in capsys.readouterr().err
    assert main(["run", "01", "--run-id", "r", "-p", "pretrain.tokens=9", "--overwrite"]) == jobs.DONE
    assert stage(f"{BASE}.old-1").results() == {"value": 1}
    assert (stage().dir / "notebook.ipynb").exists() and (stage(f"{BASE}.old-1").dir / "notebook.ipynb").exists()


def test_overrides_from_a_file_and_by_dotted_name_reach_the_notebook(project, tmp_path):
    write(project, BASE, "run.here.save_results({'rate': run.settings.reward.learning_rate})")
    (tmp_path / "o.yaml").write_text("reward: {learning_rate: 1e-6}\npretrain: {layers: 1}\n")
    arguments = ["--overrides", str(tmp_path / "o.yaml"), "-p", "pretrain.tokens=7"]
    assert main(["run", "01", "--run-id", "r", *arguments]) == jobs.DONE
    assert stage().results() == {"rate": 1e-6}
    made = stage().config()["settings"]["pretrain"]
    assert (made["tokens"], made["layers"]) == (7, 1), "both count; for one setting only one of them may be given"


def test_a_failing_cell_ends_the_sequence_with_its_error(project, capsys):
    write(project, BASE, RESULT, "raise ValueError('the reason')")
    write(project, REWARD, RESULT)
    asked = ["--profile", "smoke", "--seed", "3", "-p", "pretrain.tokens=777"]
    assert main(["run", "01", "02", "--run-id", "r", *asked]) == jobs.FAILED
    printed = capsys.readouterr()
    assert "ValueError: the reason" in printed.err and REWARD not in printed.out
    assert stage().status()["status"] == "failed" and "the reason" in stage().status()["error"]
    assert (stage().status()["exception"], stage().status()["cell"]) == ("ValueError", 5)
    assert "the reason" in (stage().dir / "notebook.ipynb").read_text()
    write(project, BASE, RESULT)
    assert main(["run", "--resume", "r"]) == jobs.DONE, "the same command continues, and need not be repeated"
    assert len(stage().provenance()["sessions"]) == 2 and stage(REWARD).done
    assert (stage().config()["settings"]["seed"], stage().config()["settings"]["pretrain"]["tokens"]) == (3, 777)


def test_a_dead_kernel_is_said_to_be_dead_and_leaves_the_stage_to_be_continued(project, capsys):
    write(
        project,
        BASE,
        "run.here.path('checkpoints', 'one').touch()",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    )
    assert main(["run", "01", "--run-id", "r"]) == jobs.FAILED
    assert "kernel died (out of memory?)" in capsys.readouterr().err
    assert stage().state() == "killed" and (stage().dir / "checkpoints" / "one").exists()
    assert (stage().status()["exception"], stage().status()["cell"]) == ("DeadKernelError", 5)


@pytest.mark.slow
def test_a_notebook_that_leaves_early_is_not_taken_for_done(project, capsys):
    write(project, BASE, RESULT, "import sys; sys.exit(0)")
    assert main(["run", "01", "--run-id", "r"]) == jobs.FAILED
    assert stage().state() == "failed" and "ended without finish()" in stage().status()["error"]
    path = write(project, REWARD, RESULT)
    cells = json.loads(path.read_text())
    cells["cells"].pop()
    write(project, BASE, RESULT)
    path.write_text(json.dumps(cells))
    assert main(["run", "01", "02", "--run-id", "r"]) == jobs.FAILED
    assert "02_reward_model ended without finish()" in capsys.readouterr().err


def test_a_refusal_inside_the_kernel_does_not_replace_an_earlier_executed_notebook(project, capsys):
    write(project, BASE, RESULT)
    assert main(["run", "01", "--run-id", "r"]) == jobs.DONE
    before = (stage().dir / "notebook.ipynb").read_bytes()
    path = write(project, BASE, RESULT)
    path.write_text(
        path.read_text().replace("notebook.start(globals()", "notebook.start({'profile': 'smoke', 'run_id': 'r'}")
    )
    assert main(["run", "01", "--run-id", "r"]) == jobs.FAILED
    assert "holds profile tiny, seed 0" in capsys.readouterr().err
    assert (stage().dir / "notebook.ipynb").read_bytes() == before and stage().done


def start_command(*arguments: str, wait_for: Path) -> subprocess.Popen:
    """The command in a process of its own, once `wait_for` exists."""
    code = (
        "import sys; from pathlib import Path; from c2f_utils import __main__; from c2f_utils.headless import jobs; "
        f"jobs.notebooks_folder = lambda: Path({str(NOTEBOOKS[0])!r}); sys.exit(__main__.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not wait_for.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


NOTEBOOKS: list[Path] = []


@pytest.fixture
def command(project):
    NOTEBOOKS[:] = [project]
    return start_command


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_request_to_stop_that_comes_while_python_ends_does_not_make_a_finished_run_look_killed(tmp_path, name):
    code = f"""
import atexit, os, pathlib, signal, time
from c2f_utils.headless import jobs
atexit.register(lambda: (os.kill(os.getpid(), signal.{name}), time.sleep(0.2)))
with jobs.signals(pathlib.Path({str(tmp_path / "STOP")!r})):
    pass
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=jobs.root()).returncode == 0


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGUSR1, signal.SIGINT))],
)
def test_a_signal_stops_gently_and_later_cells_still_run(project, command, number):
    write(project, BASE, LOOP, "run.here.path('figures', 'after').touch()", RESULT)
    write(project, REWARD, RESULT)
    process = command("run", "01", "02", "--run-id", "r", wait_for=stage().dir / "checkpoints" / "2")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == jobs.STOPPED, (out, err)
    assert "the same command continues" in out and "Traceback" not in err
    assert stage().state() == "stopped" and (stage().dir / "figures" / "after").exists()
    assert not stage(REWARD).config(), "the next notebook is not started"
    assert not (stage().dir.parent / "STOP").exists()


def test_a_stage_that_can_give_no_result_yet_is_stopped_and_not_failed(project, command):
    unfinished = "run.here.stop()\nfrom c2f_utils.errors import Stopped\nraise Stopped('stopped after step 3 of 9')"
    write(project, BASE, f"{LOOP}\n{unfinished}", RESULT)
    process = command("run", "01", "--run-id", "r", wait_for=stage().dir / "checkpoints" / "2")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == jobs.STOPPED, (out, err)
    assert "the same command continues" in out and stage().state() == "stopped"


def test_a_second_interrupt_kills_the_kernel(project, command):
    write(project, BASE, LOOP.replace("if run.here.stop_requested():", "if False:"))
    process = command("run", "01", "--run-id", "r", wait_for=stage().dir / "checkpoints" / "2")
    kernel = stage().status()["pid"]
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == jobs.KILLED, err
    time.sleep(0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)
    assert stage().state() == "killed" and stage().status()["cell"] == 4 and "Traceback" not in err


@pytest.mark.slow
def test_killing_the_command_leaves_the_stage_to_be_continued(project, command):
    write(project, BASE, LOOP)
    process = command("run", "01", "--run-id", "r", wait_for=stage().dir / "checkpoints" / "2")
    process.kill()
    process.wait()
    os.kill(stage().status()["pid"], signal.SIGKILL)
    time.sleep(0.3)
    assert stage().state() == "lost"
    write(project, BASE, "assert run.here.path('checkpoints', '2').exists()", RESULT)
    assert main(["run", "01", "--run-id", "r"]) == jobs.DONE


def test_of_two_commands_for_one_run_one_ends_well_and_the_other_touches_nothing(project, command, capsys):
    write(project, BASE, LOOP, RESULT)
    late = jobs.prepare(["01"], {"run_id": "r"})  # checked while nobody was at work yet
    process = command("run", "01", "--run-id", "r", wait_for=stage().dir / "checkpoints" / "2")
    with pytest.raises(C2FError, match=f"run 'r' is being worked on by the command of process {process.pid} "):
        jobs.run(late)
    assert main(["run", "01", "--run-id", "r"]) == jobs.BAD_INPUT
    assert "is being worked on by process" in capsys.readouterr().err
    assert stage().state() == "running" and stage().dir.with_suffix(".running.log").exists()
    assert main(["stop", "r"]) == jobs.DONE and "01_base_model will save and end" in capsys.readouterr().out
    out, err = process.communicate(timeout=60)
    assert process.returncode == jobs.STOPPED and stage().state() == "stopped", (out, err)
    assert main(["stop", "r"]) == jobs.BAD_INPUT and "nothing is at work in 'r'" in capsys.readouterr().err
    assert not (run_folder("r") / "STOP").exists()
    assert {"log.txt", "notebook.ipynb"} <= {path.name for path in stage().dir.iterdir()}
    assert not list(stage().dir.parent.glob("*.refused.*"))


def test_a_stage_that_another_process_began_meanwhile_is_not_ended_by_the_command(project, capsys):
    write(project, BASE, RESULT)
    path = project / f"{BASE}.ipynb"
    other = (
        "import subprocess, sys\n"
        'code = \'from c2f_utils import notebook; notebook.start({"run_id": "r", "profile": "smoke"}, '
        '"01_base_model"); print("begun", flush=True); import time; time.sleep(600)\'\n'
        "job = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, "
        "start_new_session=True)\n"
        "while job.stdout.readline() != 'begun\\n': pass\n"
    )
    cells = json.loads(path.read_text())
    cells["cells"][2]["source"] = other + cells["cells"][2]["source"]
    path.write_text(json.dumps(cells))
    try:
        assert main(["run", "01", "--run-id", "r"]) == jobs.FAILED
        message = capsys.readouterr().err
        assert "is being worked on by process" in message and "refused.ipynb" in message
        assert stage().state() == "running"
    finally:
        os.kill(stage().status()["pid"], signal.SIGKILL)


def test_a_kernel_killed_while_it_starts_is_said_and_the_same_command_tries_again(
    project, tmp_path, monkeypatch, capsys
):
    write(project, BASE, RESULT)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if any('ipykernel' in word for word in sys.orig_argv): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONPATH", str(tmp_path / "path"), prepend=os.pathsep)
        assert main(["run", "01", "--run-id", "r"]) == jobs.KILLED
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].split()[:2] == [BASE, "killed"]
    assert "the notebook's kernel was killed while it started" in printed.err and "Traceback" not in printed.err
    assert stage().state() is None and not list(stage().dir.parent.glob("*.running.*"))
    assert main(["run", "01", "--run-id", "r"]) == jobs.DONE


@pytest.mark.slow
def test_the_thread_count_is_recorded_and_kept_when_continued(project, monkeypatch):
    monkeypatch.delenv("C2F_THREADS")
    write(
        project,
        BASE,
        "import os, torch\nrun.here.save_results({'n': torch.get_num_threads(), 'omp': os.environ['OMP_NUM_THREADS']})",
    )
    write(project, REWARD, "raise ValueError")
    assert main(["run", "01", "02", "--run-id", "r", "--threads", "2"]) == jobs.FAILED
    assert stage().results() == {"n": 2, "omp": "2"}
    write(project, REWARD, RESULT)
    assert main(["run", "02", "--run-id", "r", "--threads", "1"]) == jobs.DONE
    assert stage(REWARD).config()["threads"] == 2


def test_a_stage_with_another_parameter_takes_it_and_others_do_not(project):
    write(project, BASE, RESULT, parameters=PARAMETERS)
    write(project, REPORT, "run.here.save_results({'names': names})", parameters=PARAMETERS + "names: list = []\n")
    assert main(["run", "01", "08", "--run-id", "r", "-p", "names=['a', 'b']"]) == jobs.DONE
    assert stage(REPORT).results() == {"names": ["a", "b"]}


def test_the_summary_shows_every_model_and_the_report(project, outputs):
    evaluation = stage(EVALUATION)
    row = {"accuracy_last": 0.71, "accuracy_first": None, "mean_tokens": 123.4, "rep4": 0.05, "eos_rate": 1.0}
    evaluation.save_results({"models": {"base": {"sampled_t1": row}, "fine": {"greedy": row}}})
    (outputs / "r" / "report").mkdir()
    (outputs / "r" / "report" / "report.md").touch()
    text = jobs.summary("r")
    assert text.split("\n")[2].split() == ["base", "0.710", "-", "123.4", "0.050", "1.000"]
    assert text.split("\n")[3].split() == ["fine", "-", "-", "-", "-", "-"]
    assert text.endswith("r/report/report.md")


def test_the_table_command_lists_runs(project, capsys):
    assert main(["table"]) == 0 and "no runs" in capsys.readouterr().out
    write(project, BASE, RESULT)
    main(["run", "01", "--run-id", "r"])
    capsys.readouterr()
    assert main(["table", "--run-id", "r"]) == 0
    shown = capsys.readouterr().out
    assert BASE in shown and "minutes" in shown
    assert "alarms" not in shown and "kl_per_token" not in shown, "columns without a value are left out"
    assert main(["table", "--run-id", "nosuch"]) == jobs.BAD_INPUT
    message = capsys.readouterr().err
    assert "there is no run 'nosuch'" in message and "there are: r" in message


@pytest.mark.parametrize("flags", [[], ["--plan"], ["--resume"]])
def test_a_bad_recipe_is_refused_in_words(tmp_path, capsys, flags):
    (tmp_path / "recipe.yaml").write_text("base: nowhere\n")
    assert main(["merge", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"), *flags]) == jobs.BAD_INPUT
    assert capsys.readouterr().err.startswith("c2f: ") and not (tmp_path / "out").exists()
