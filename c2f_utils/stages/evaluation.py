"""07: is the Fine Actor better, and is it less redundant? Test problems, fixed limits, every control beside the
method."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Protocol

import numpy as np
from torch import nn

from c2f_utils import redundancy, stats
from c2f_utils.domain import forms
from c2f_utils.domain.forms import Form
from c2f_utils.domain.samples import Prompt, analysed_prompts
from c2f_utils.files import write_text
from c2f_utils.measure import answers
from c2f_utils.models import loading
from c2f_utils.notebook.progress import Progress
from c2f_utils.report import gate
from c2f_utils.report.results import GAINED, MAIN
from c2f_utils.runs.run import Run
from c2f_utils.settings.config import TRAINED_CONTROLS, Settings
from c2f_utils.settings.task_suites import wanted
from c2f_utils.stages import tasks
from c2f_utils.stages.dialogue import Dialogues
from c2f_utils.stages.inputs import Inputs, keep_samples, stopped_here
from c2f_utils.stages.pieces import Pieces
from c2f_utils.stages.retention_and_sampling import Retention, Sampling
from c2f_utils.stages.safety import Requests, Wordlist

LABELS = {
    "base": "base",
    "instruct": "instruct",
    "coarse": "coarse actor",
    "fine": "fine actor",
    "interpolation": "instruct + base, no RL",
    "coarse_interpolation": "instruct + coarse, interpolated",
    "random_residue": "instruct + random residue",
    "instruct_forced": "instruct, analysis forced",
    "base_forced": "base, analysis forced",
    "fine_forced": "fine actor, analysis forced",
    "ppo_instruct": "RLHF from instruct",
    "ppo_instruct_tokens": "RLHF from instruct, as many tokens",
    "parallel_average": "RL and SFT averaged step by step",
    "distilled": "coarse distilled into instruct",
    "distilled_merge": "merge into the distilled",
    "shortest_correct": "SFT on shortest right coarse answers",
    "filtered_sft": "SFT on right coarse answers",
    "base_correct": "SFT on shortest right forced-base answers",
    "fixed_long_residue": "residue of fixed-long",
    "best_recipe": "best recipe of all tried",
    "one_coefficient": "one coefficient for all",
}
FORCED = "_forced"  # ends the name of a model whose answers are begun for it; `Settings.forced_models` says which
DISAGREEMENTS = 5  # prompts on which fine is far worse than instruct, and as many on which it is far better
PAIRED = ("accuracy_last", "accuracy_first", "utility", "tokens", "rep4", "reward")


class Part(Protocol):
    """A further look at every model while it is loaded; what it finds stands in results.json under `key`.

    Models whose answers are begun for them are no models of their own, and are not shown to it.
    """

    key: str

    def add(self, name: str, model: nn.Module, form: Form) -> None:
        """Look at one model, which is prompted in this form; the next one comes when this has returned."""

    def results(self) -> dict | list:
        """What was found, for JSON; called once, after the last model."""


def parts(run: Run, inputs: Inputs) -> list[Part]:
    """Everything that the settings ask for beside answers to test problems."""
    retention, sampling = run.settings.retention, run.settings.sampling
    found: list[Part] = []
    if wanted(run.settings.tasks, run.settings.embedded):
        found.append(tasks.Tasks(run, inputs))
    if retention.documents or retention.answers:
        found.append(Retention(run, inputs))
    if run.settings.embedded and sampling.problems and sampling.samples:  # elsewhere nobody knows what is right
        found.append(Sampling(run, inputs))
    if run.settings.safety.wordlist:
        found.append(Wordlist(run, inputs))
    verdicts = 0
    if run.settings.safety.requests:
        found.append(requests := Requests(run, inputs))
        verdicts = requests.verdicts
    if run.settings.judge.name != "none":
        found.append(Dialogues(run, inputs, verdicts))
    return found


def make(run: Run) -> dict:
    """Results of 07: metrics of every model under every decoding, redundancy at fixed prefixes, paired differences
    to the fine actor, and what its further parts find."""
    here, settings = run.here, run.settings
    if here.loaded:
        return here.results()
    inputs = Inputs(run)
    test = inputs.prompts("test")
    found: dict[str, dict] = {}
    single: dict[str, dict[str, dict[str, list[float]]]] = {}
    kinds: dict[str, dict[str, dict[str, dict]]] = {}  # by model and decoding; empty where problems are of one kind
    prefixes: dict[str, list[dict]] = {}
    profiles: dict[str, list[dict]] = {}
    table: list[dict] = []
    apart: dict[str, list[dict]] = {}  # every answer under the first decoding, by the models that are read side by side
    further, pieces = parts(run, inputs), Pieces(here)
    progress = Progress("answering", "model")
    with here.timer("generation and scoring"), stopped_here(here), progress.counting(_count(settings, inputs)):
        for name, model, prompts, form in _models(run, inputs, test):
            found[name] = {"label": _label(name, form or settings.models.base_form, inputs), "role": _role(name, form)}
            single[name] = {}
            for decoding in settings.evaluation.decodings:
                # No name for what holds the model: the next one is loaded when this one is gone.
                seen = pieces(["answers", name, decoding], partial(_look, inputs, name, model, prompts, decoding, form))
                found[name][decoding], single[name][decoding] = seen["metrics"], seen["single"]
                if seen["by_kind"]:
                    kinds.setdefault(name, {})[decoding] = seen["by_kind"]
                table += seen["rows"]
                if decoding == settings.evaluation.decodings[0]:
                    prefixes[name], profiles[name] = seen["prefixes"], seen["profile"]
                    apart |= {name: seen["all_rows"]} if name in MAIN else {}
            # A model whose answers are begun for it is one that every part has seen already.
            for part in further if not name.endswith(FORCED) else ():
                part.add(name, model, form or settings.models.base_form)
            del model  # before the next one is loaded
            progress.step()
    keep_samples(here, table, settings)
    _keep_disagreements(run, apart, single)
    here.save_results({
        "models": found, "prefix_redundancy": prefixes, "decoding_of_prefixes": settings.evaluation.decodings[0],
        "paired": _paired(single, settings.seed), "limit": settings.evaluation.max_tokens,
        "intervals": {
            name: {way: {metric: _interval(each) for metric, each in values.items()} for way, values in ways.items()}
            for name, ways in single.items()
        },
        "redundancy": profiles, "gains": _gains(single, settings.evaluation.decodings[0], settings.seed),
        **({"by_kind": kinds, "gate": gate.rows(found, kinds, settings.evaluation.decodings[0])} if kinds else {}),
        **{part.key: part.results() for part in further},
    })  # fmt: skip
    return here.results()


def _look(inputs: Inputs, name: str, model: nn.Module, prompts: list[Prompt], decoding: str, form: Form | None) -> dict:
    """What one model makes of the test problems under one decoding; redundancy under the first one only."""
    wanted = inputs.settings.evaluation
    samples = inputs.answers(model, prompts, decoding, form=form)
    rewards = inputs.reward(samples)
    seen = {
        "metrics": answers.measure(samples, lambda _: rewards),
        "by_kind": answers.by_kind(samples, rewards),
        "single": answers.per_answer(samples) | {"reward": rewards.tolist()},
        "rows": answers.rows(samples[: wanted.samples_kept], name, decoding, inputs.reward),
    }
    if decoding == wanted.decodings[0]:
        read = [s.answer for s in samples]
        seen["prefixes"] = redundancy.prefix_table(read, wanted.prefixes)
        seen["profile"] = redundancy.profile(read, inputs.text, wanted.prefixes)
        seen["all_rows"] = answers.rows(samples, name, decoding, lambda _: rewards) if name in MAIN else []
    return seen


def _models(run: Run, inputs: Inputs, test: list[Prompt]) -> Iterator[tuple[str, nn.Module, list[Prompt], Form | None]]:
    """Name, model, prompts and form (None: the base's) of everything that is compared; one model is in memory at a
    time.

    What the instruction model or the fine actor is in the other form is a row of its own, `<name>_<form>`.
    """
    merged, models = run.parent("06_residue_merging"), run.settings.models
    form, *others = inputs.instruct_forms
    yield "base", inputs.base(), test, None
    model = inputs.instruct()
    for each in (form, *others):
        yield "instruct" if each == form else f"instruct_{each}", model, test, each
    del model
    yield "coarse", inputs.coarse(), test, None
    model = loading.load_causal(merged.model(), models)
    for each in (form, *others):
        yield "fine" if each == form else f"fine_{each}", model, test, each
    del model
    recipe = "one_coefficient" if run.settings.merge.select == "best_recipe" else "best_recipe"
    for name in (recipe, *run.settings.merge.controls):
        trained_in = None if name in TRAINED_CONTROLS else form  # in the base's form, whatever it starts from
        yield name, loading.load_actor(merged.model(f"controls/{name}"), models), test, trained_in
    begun = {
        "instruct": (inputs.instruct, form), "base": (inputs.base, None),
        "fine": (partial(loading.load_causal, merged.model(), models), form),
    }  # fmt: skip
    for name in run.settings.forced_models:
        make_model, as_form = begun[name]
        yield name + FORCED, make_model(), analysed_prompts([p.problem for p in test]), as_form


def _count(settings: Settings, inputs: Inputs) -> int:
    """How many models `_models` gives."""
    return 3 + 2 * len(inputs.instruct_forms) + len(settings.merge.controls) + len(settings.forced_models)


def _keep_disagreements(run: Run, rows: dict[str, list[dict]], single: dict) -> None:
    """Write the answers of all main models to the prompts on which fine and instruct differ most to
    `disagreements.jsonl`: those where fine is worst first, then those where it is best."""
    decoding = run.settings.evaluation.decodings[0]
    fine, instruct = single["fine"][decoding], single["instruct"][decoding]
    metric = "utility" if "utility" in fine else "reward"
    gains = np.subtract(fine[metric], instruct[metric])
    order = np.argsort(gains, kind="stable")
    shown = [int(i) for i in (*order[:DISAGREEMENTS], *order[-DISAGREEMENTS:][::-1]) if gains[i]]
    lines = (json.dumps(each[i], ensure_ascii=False) + "\n" for each in rows.values() for i in shown)
    write_text(run.here.path("disagreements.jsonl"), "".join(lines))


def _role(name: str, form: Form | None) -> str:
    if name in MAIN:
        return name
    return "other form" if form and name in (f"instruct_{form}", f"fine_{form}") else "control"


def _label(name: str, form: Form, inputs: Inputs) -> str:
    """What tables call a row; it says the form where a model is measured in two."""
    label = LABELS[name.removesuffix(f"_{form}")]
    return f"{label}, {forms.IN_WORDS[form]}" if len(inputs.instruct_forms) > 1 else label


def _paired(single: dict[str, dict[str, dict[str, list[float]]]], seed: int) -> list[dict]:
    """Fine minus every other model, problem by problem: difference, 95 % bootstrap interval and p value."""
    rows = []
    for other in single:
        if other == "fine":
            continue
        for decoding, values in single["fine"].items():
            for metric in PAIRED:
                if metric in values:
                    result = stats.paired_bootstrap(values[metric], single[other][decoding][metric], seed=seed)
                    rows.append({"a": "fine", "b": other, "metric": metric, "decoding": decoding, **result._asdict()})
    return rows


def _interval(values: list[float]) -> dict[str, float | None]:
    """Mean over prompts with its 95 % interval: Wilson's for shares of right answers, else Student's."""
    if {*values} <= {0.0, 1.0}:
        return stats.wilson(sum(values), len(values)).bounds()
    return stats.seed_interval(values).bounds()


def _gains(single: dict[str, dict[str, dict[str, list[float]]]], decoding: str, seed: int) -> list[dict]:
    """Every model minus instruct, problem by problem, in what is gained where something else may be lost."""
    rows, instruct = [], single["instruct"][decoding]
    for name, values in single.items():
        for metric in (metric for metric in GAINED if name != "instruct" and metric in instruct):
            result = stats.paired_bootstrap(values[decoding][metric], instruct[metric], resamples=1000, seed=seed)
            rows.append({"a": name, "b": "instruct", "metric": metric, "decoding": decoding, **result._asdict()})
    return rows
