"""04: which law for l(t) buys most reward per generated token?"""

from c2f_utils import limits
from c2f_utils.files import read_json, write_json
from c2f_utils.models import save_model
from c2f_utils.runs import Run, own_parts
from c2f_utils.stage import root
from c2f_utils.workflow import coarse
from c2f_utils.workflow.inputs import Inputs

REUSED = "logistic"  # the name under which the law of 03 appears


def make(run: Run, on_start=lambda name, seed: None) -> dict:
    """Train one actor per law (and seed, with study=True) and compare.

    Each finished one is kept, so a killed study continues. A seed of the study changes prompts, order and sampling
    of the RL; base and reward model stay those of the run.
    """
    here, settings = run.here, run.settings
    if here.loaded:
        return here.results()
    inputs = Inputs(run)
    laws = dict(settings.schedules.laws) | (settings.schedules.study_laws if settings.study else {})
    for law in laws.values():
        limits.make_law(law)  # refuse all impossible laws before the first one trains
    baselines = settings.schedules.critic_free if settings.study else {}
    seeds = sorted({settings.seed, *settings.schedules.study_seeds}) if settings.study else [settings.seed]
    results = {"laws": {}}
    trained = run.parent("03_coarse_rlhf")
    own = own_parts(trained)
    for name, law in {REUSED: settings.coarse.law, **laws}.items():
        by_seed = {}
        # What the notebook of 03 alone holds cannot be trained here under the study's other seeds.
        for seed in [settings.seed] if name == REUSED and own else seeds:
            reuse = name == REUSED and seed == settings.seed
            if here.stop_requested() and not reuse:
                break
            on_start(name, seed)
            found = trained.results() if reuse else _one(run, inputs, name, law, seed)
            if found is not None:
                by_seed[str(seed)] = found
        if by_seed:  # a stop leaves out the laws that were not reached
            credit = _credit(run, name)
            entry = {
                "label": label(law, credit),
                "law": law.model_dump(exclude_none=True),
                "credit": credit,
                "seeds": by_seed,
            }
            if name == REUSED and own:
                entry |= _own_entry(trained.results()["law"], entry, own)
            results["laws"][name] = entry
    for name, entry in baselines.items():
        by_seed = {}
        for seed in seeds:
            if here.stop_requested():
                break
            on_start(name, seed)
            if (found := _baseline(run, inputs, name, entry, seed)) is not None:
                by_seed[str(seed)] = found
        if by_seed:
            results.setdefault("critic_free", {})[name] = {
                "label": baseline_label(entry),
                **entry.model_dump(exclude_none=True),
                "seeds": by_seed,
            }
    here.save_results(results)
    return results


def _own_entry(name: str, entry: dict, own: list[str]) -> dict:
    """Label and law of an actor that 03 trained with a law or reward of the user's own."""
    label = f"own law {name}" if "law" in own else entry["label"]
    changed = {"law": {"name": name}} if "law" in own else {}
    return changed | {"label": f"{label}, own reward" if "reward" in own else label}


def _one(run: Run, inputs: Inputs, name: str, law, seed: int) -> dict | None:
    """One law under one seed, kept on disk; None when a stop came before its last iteration."""
    here = run.here
    done = here.path("laws", f"{name}-s{seed}.json")
    if done.exists():
        return read_json(done)
    config = run.settings.coarse.model_copy(update=_credit(run, name))
    process = coarse.trainer(
        inputs, limits.make_law(law), here.path("checkpoints", f"{name}-s{seed}"), seed=seed, config=config
    )
    coarse.restore_rows(run, process, law=name, seed=seed)
    with here.timer(name):
        for row in process:
            here.log({"law": name, "seed": seed, **row})
    if process.iteration < process.config.iterations:
        return None
    samples = inputs.answers(process.policy.actor, inputs.prompts("test"))
    save_model(process.policy.actor, inputs.tokenizer, here.path("models", f"{name}-s{seed}"))
    result = coarse.summary(process, samples, inputs)
    write_json(done, result)
    return result


def _baseline(run: Run, inputs: Inputs, name: str, entry, seed: int) -> dict | None:
    """One critic-free baseline under one seed, kept on disk; None when a stop came before its last iteration."""
    from c2f_utils.workflow.critic_free import Baseline

    here = run.here
    done = here.path("critic_free", f"{name}-s{seed}.json")
    if done.exists():
        return read_json(done)
    process = Baseline(inputs, entry, here.path("checkpoints", f"{name}-s{seed}"), seed=seed)
    coarse.restore_rows(run, process, law=name, seed=seed)
    with here.timer(name):
        process.train(lambda row: here.log({"law": name, "seed": seed, **row}))
    if process.iteration < process.config.iterations:
        return None
    result = coarse.summary(process, inputs.answers(process.actor, inputs.prompts("test")), inputs)
    write_json(done, result)
    return result


def _credit(run: Run, name: str) -> dict:
    """What this entry changes in `coarse`; empty for most."""
    credit = run.settings.schedules.credit.get(name)
    return credit.model_dump(exclude_none=True) if credit else {}


def with_baselines(results: dict) -> dict:
    """The same results with the critic-free baselines among the laws, for figures and tables of both."""
    return results | {"laws": results["laws"] | results.get("critic_free", {})}


def committed_baselines() -> dict:
    """What `benchmarks/critic_free.py` measured on `tiny`, in the form of results; no laws where the file is absent."""
    file = root() / "benchmarks" / "results" / "critic_free.json"
    return read_json(file) if file.is_file() else {"laws": {}}


def committed_study() -> dict:
    """What `benchmarks/laws.py` measured on `tiny` under conditions that differ in the right length; no runs where the
    file is absent."""
    file = root() / "benchmarks" / "results" / "laws.json"
    return read_json(file) if file.is_file() else {"runs": {}}


def committed_attempts() -> list[dict]:
    """Everything that was tried for the laws and failed or was no better, with its figures and the reason."""
    file = root() / "benchmarks" / "results" / "laws_tried.json"
    return read_json(file)["tried"] if file.is_file() else []


def baseline_label(entry) -> str:
    """A short name for figures."""
    checked = ", exact reward" if entry.reward == "verifiable" else ""
    return f"{entry.trainer.upper()}{checked}, {label(entry.law, {})}"


def label(law, credit: dict) -> str:
    """A short name for figures, with the law's own numbers."""
    shape = f" {law.shape}" if law.shape else ""
    text = f"fixed {law.limit}" if law.name == "fixed" else f"{law.name}{shape} {law.start or ''}-{law.maximum or ''}"
    return f"{text}, cut costs {credit['cut_penalty']:g}" if credit.get("cut") == "penalty" else text
