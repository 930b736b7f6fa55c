"""07's tasks: what lm-eval's suites make of every model, raw and in the chat template, and the Fine Actor against each.

A finished task of a finished model is kept in the stage's folder, `tasks/kept/`, under the digest of all that decides
it; a stage that was killed asks only for what is missing. Rows of every question are kept beside the score.
"""

from collections.abc import Iterator

import numpy as np
from torch import nn

from c2f_utils import stats
from c2f_utils.domain import task_files
from c2f_utils.domain.forms import Form
from c2f_utils.domain.problems import Problem
from c2f_utils.errors import C2FError
from c2f_utils.files import sha256
from c2f_utils.measure import suites
from c2f_utils.models import loading
from c2f_utils.models.generated import generator
from c2f_utils.notebook.progress import Progress
from c2f_utils.runs.run import Run
from c2f_utils.settings.task_suites import wanted
from c2f_utils.stages.inputs import Inputs
from c2f_utils.stages.pieces import Pieces

SEED = 1_000_003  # added to the run's: its tasks have problems of their own


class Tasks:
    """The part of 07 that asks every model the tasks of the settings; everything is loaded before the first model.

    Raises C2FError for files that cannot be asked, tasks that are unknown, and data that the hub alone has.
    """

    key = "tasks"

    def __init__(self, run: Run, inputs: Inputs) -> None:
        self.run, self.inputs, self.config, self.pieces = run, inputs, run.settings.tasks, Pieces(run.here)
        self.log = run.here.path("tasks", "lm_eval.log")
        self.folder = self.log.parent
        self.tasks = suites.prepare(list(self._entries()), self.log)
        self.rows: list[dict] = []
        self.values: dict[tuple[str, str, str], list[float]] = {}  # by task, form and model
        self.progress = Progress("tasks by lm-eval")
        forms = len(inputs.instruct_forms)
        if self.config.template == "template" and "template" not in (
            *inputs.instruct_forms, run.settings.models.base_form
        ):  # fmt: skip
            raise C2FError(
                f"tasks.template = 'template', but the tokenizer of {inputs.instruct_source!r} has no chat template; "
                "add one, or set tasks.template to 'both' or 'raw'"
            )
        # The four roles and the other recipe, the controls, and two models once more in the other form.
        self.total = len(self.tasks) * (5 + len(run.settings.merge.controls) + 2 * (forms - 1))

    def _entries(self) -> Iterator[tuple[str, str | dict]]:
        settings, limit = self.run.settings, self.run.settings.evaluation.max_tokens
        for suite in wanted(settings.tasks, settings.embedded):
            if suite == "embedded":
                found = suites.embedded(self._problems(), settings.seed, limit, self.folder / "embedded")
            elif suite == "local":
                read = task_files.read(task_files.folder(self.config.folder))
                for task in read:
                    self.run.here.add_input(f"data:{task.path}", sha256(task.path))
                found = suites.local(read, self.config.shots, limit, self.folder / "local")
            elif suite in suites.OURS:
                found = suites.suite(suite)
            else:
                suite, found = "lm-eval", [suite]
            yield from ((suite, entry) for entry in found)

    def _problems(self) -> list[Problem]:
        """Test problems that the rest of 07 does not ask."""
        settings = self.run.settings
        data, count = settings.data, min(self.config.problems, settings.data.test_prompts)
        asked = set(generator(data).problems("test", data.test_prompts, settings.seed))
        found = generator(data).problems("test", 2 * count, settings.seed + SEED)
        return [problem for problem in found if problem not in asked][:count]

    def add(self, name: str, model: nn.Module, form: Form) -> None:
        """Ask one model every task, in the chat template if that is its form."""
        template = form == "template"
        if self.config.template == ("raw" if template else "template"):
            return
        name, shown = name.removesuffix(f"_{form}"), "template" if template else "raw"
        tokenizer = self.inputs.instruct_tokenizer if template else self.inputs.tokenizer
        identity, lm = loading.digest(model), None
        for task in self.tasks:
            limit = self.config.limit if task.suite != "embedded" else 0
            key = task.key(identity, tokenizer, template, limit, self.config.batch)
            found = suites.kept(self.folder / "kept", key)
            if found is None:
                self.pieces.refuse_to_go_on()
                self.progress(len(self.rows), max(self.total, len(self.rows) + 1))
                lm = lm or suites.harness(model, tokenizer, template, self.config.batch, self.log)
                found = suites.ask(task, lm, template, limit, self.log)
                suites.keep(self.folder / "kept", key, *found)
            result, rows = found
            values = suites.values(result, rows)
            if values:
                self.values[task.name, shown, name] = values
            self.rows.append({
                "task": task.name, "suite": task.suite, "model": name, "template": template, "weights": identity,
                "dtype": str(model.dtype).removeprefix("torch."), "chance": task.chance, **result,
                **_interval(values), "samples": f"tasks/kept/{suites.place_of(key)}/samples.jsonl",
            })  # fmt: skip

    def results(self) -> dict:
        """One row per task, model and form, means over the tasks of a suite, and Fine minus every other model."""
        return {
            "rows": self.rows,
            "means": list(self._means()),
            "paired": list(self._paired()),
            "fewshot_seed": suites.FEWSHOT_SEED,
        }

    def _means(self) -> Iterator[dict]:
        """Unweighted means over the tasks of a suite."""
        groups: dict[tuple, list[dict]] = {}
        for row in self.rows:
            groups.setdefault((row["suite"], row["model"], row["template"]), []).append(row)
        for (suite, model, template), rows in groups.items():
            if len(rows) < 2:
                continue
            shown = "template" if template else "raw"
            each = [self.values.get((row["task"], shown, model)) for row in rows]
            shots = {row["shots"] for row in rows}
            yield {
                "suite": suite, "model": model, "template": template, "tasks": [row["task"] for row in rows],
                "n": sum(row["n"] for row in rows), "shots": shots.pop() if len(shots) == 1 else None,
                "score": round(float(np.mean([row["score"] for row in rows])), 6), **_interval_of_mean(each),
            }  # fmt: skip

    def _paired(self) -> Iterator[dict]:
        for (task, form, model), theirs in self.values.items():
            mine = self.values.get((task, form, "fine"))
            if model == "fine" or mine is None:
                continue
            found = stats.paired_bootstrap(mine, theirs, seed=self.run.settings.seed)
            row = {"a": "fine", "b": model, "task": task, "template": form == "template", **found._asdict()}
            if {*mine, *theirs} <= {0.0, 1.0}:
                row["mcnemar"] = stats.mcnemar(mine, theirs)._asdict()
            yield row | {"detectable": stats.smallest_detectable(np.subtract(mine, theirs))}


def _interval(values: list[float] | None) -> dict[str, float | None]:
    """95 % interval of a mean: Wilson's for shares of right answers, else a bootstrap over questions."""
    if not values:
        return {"low": None, "high": None}
    if set(values) <= {0.0, 1.0}:
        found = stats.wilson(sum(values), len(values))
    else:
        found = stats.bootstrap(lambda drawn: drawn.mean(-1), values)
    return {"low": round(found.low, 6), "high": round(found.high, 6)}


def _interval_of_mean(each: list[list[float] | None]) -> dict[str, float | None]:
    """95 % interval of an unweighted mean over tasks whose questions are independent (normal; Miller 2024), kept to
    0..1 where every value is."""
    if not all(each):
        return {"low": None, "high": None}
    mean = float(np.mean([np.mean(values) for values in each]))
    half = 1.96 * float(np.sqrt(sum(np.var(values) / len(values) for values in each))) / len(each)
    share = all(0 <= value <= 1 for values in each for value in values)
    low, high = (max(0.0, mean - half), min(1.0, mean + half)) if share else (mean - half, mean + half)
    return {"low": round(low, 6), "high": round(high, 6)}
