"""04: which law for l(t) buys most reward per generated token?"""

from c2f_utils.files import read_json, write_json
from c2f_utils.models.loading import save_model
from c2f_utils.notebook.interrupt import stopping
from c2f_utils.notebook.progress import Progress
from c2f_utils.report.results import LAW_OF_03
from c2f_utils.runs.registry import own_parts
from c2f_utils.runs.run import Run
from c2f_utils.settings.laws import make_law
from c2f_utils.stages import coarse_rlhf
from c2f_utils.stages.inputs import Inputs


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
        make_law(law)  # refuse all impossible laws before the first one trains
    baselines = settings.schedules.critic_free if settings.study else {}
    seeds = sorted({settings.seed, *settings.schedules.study_seeds}) if settings.study else [settings.seed]
    results = {"laws": {}}
    trained = run.parent("03_coarse_rlhf")
    own = own_parts(trained)
    for name, law in {LAW_OF_03: settings.coarse.law, **laws}.items():
        by_seed = {}
        # What the notebook of 03 alone holds cannot be trained here under the study's other seeds.
        for seed in [settings.seed] if name == LAW_OF_03 and own else seeds:
            reuse = name == LAW_OF_03 and seed == settings.seed
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
            if name == LAW_OF_03 and own:
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
    process = coarse_rlhf.trainer(
        inputs, make_law(law), here.path("checkpoints", f"{name}-s{seed}"), seed=seed, config=config
    )
    coarse_rlhf.restore_rows(run, process, law=name, seed=seed)
    progress = Progress(f"{name}, seed {seed}", "iteration")
    with here.timer(name), stopping(here):
        for row in process:
            here.log({"law": name, "seed": seed, **row})
            progress(process.iteration, process.config.iterations)
    if process.iteration < process.config.iterations:
        return None
    samples = inputs.answers(process.policy.actor, inputs.prompts("test"))
    save_model(process.policy.actor, inputs.tokenizer, here.path("models", f"{name}-s{seed}"))
    result = coarse_rlhf.summary(process, samples, inputs)
    write_json(done, result)
    return result


def _baseline(run: Run, inputs: Inputs, name: str, entry, seed: int) -> dict | None:
    """One critic-free baseline under one seed, kept on disk; None when a stop came before its last iteration."""
    from c2f_utils.stages.baselines import Baseline

    here = run.here
    done = here.path("critic_free", f"{name}-s{seed}.json")
    if done.exists():
        return read_json(done)
    process = Baseline(inputs, entry, here.path("checkpoints", f"{name}-s{seed}"), seed=seed)
    coarse_rlhf.restore_rows(run, process, law=name, seed=seed)
    progress = Progress(f"{name}, seed {seed}", "iteration")

    def log(row: dict) -> None:
        here.log({"law": name, "seed": seed, **row})
        progress(row["iteration"], process.config.iterations)

    with here.timer(name), stopping(here):
        process.train(log)
    if process.iteration < process.config.iterations:
        return None
    result = coarse_rlhf.summary(process, inputs.answers(process.actor, inputs.prompts("test")), inputs)
    write_json(done, result)
    return result


def _credit(run: Run, name: str) -> dict:
    """What this entry changes in `coarse`; empty for most."""
    credit = run.settings.schedules.credit.get(name)
    return credit.model_dump(exclude_none=True) if credit else {}


def baseline_label(entry) -> str:
    """A short name for figures."""
    checked = ", exact reward" if entry.reward == "verifiable" else ""
    return f"{entry.trainer.upper()}{checked}, {label(entry.law, {})}"


def label(law, credit: dict) -> str:
    """A short name for figures, with the law's own numbers."""
    shape = f" {law.shape}" if law.shape else ""
    text = f"fixed {law.limit}" if law.name == "fixed" else f"{law.name}{shape} {law.start or ''}-{law.maximum or ''}"
    return f"{text}, cut costs {credit['cut_penalty']:g}" if credit.get("cut") == "penalty" else text
