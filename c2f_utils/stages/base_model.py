"""01: which base do we start from? The embedded one is pretrained; any other is loaded and checked."""

import shutil
from dataclasses import asdict

import pandas as pd

from c2f_utils.coarse.heads import Head
from c2f_utils.domain.problems import FORCED_ANSWER
from c2f_utils.domain.samples import Prompt, Sample, analysed_prompts, make_prompts
from c2f_utils.measure import answers
from c2f_utils.models import pretrain, rewards
from c2f_utils.models.generated import generator
from c2f_utils.models.loading import save_model
from c2f_utils.notebook.progress import Progress, in_words
from c2f_utils.rollout.sampler import Sampler
from c2f_utils.runs import work
from c2f_utils.runs.run import Run
from c2f_utils.settings.config import STAGES
from c2f_utils.stages import data, speed
from c2f_utils.stages.inputs import CHECKPOINTS, Inputs, keep_samples, stopped_here


def make(run: Run) -> dict:
    """Results of 01: loss curve, what the base can do when its answer's beginning is forced, how it behaves on its
    own."""
    here, settings = run.here, run.settings
    if here.loaded:
        return here.results()
    inputs = Inputs(run)
    losses: list[dict] = []
    if settings.embedded:
        # Made here: there is no earlier stage to ask for them.
        inputs.base_source, inputs.tokenizer = str(here.dir / "model"), generator(settings.data).vocabulary.tokenizer()
        with here.timer("pretraining"), stopped_here(here):
            checkpoint, progress = here.path(CHECKPOINTS, "pretraining.safetensors"), Progress("pretraining", "token")
            model = pretrain.pretrain(settings, losses.append, checkpoint, here.stop_requested, progress)
        save_model(model, inputs.tokenizer, here.path("model"))
    else:
        model = inputs.base()
        inputs.refuse_instruct_template()  # now, and not after the hours of 03
        counts = data.prompt_counts(settings, inputs.tokenizer)
        for split, row in counts.items():
            left_out = f"; {row['too_long']:,} longer ones left out" if row["too_long"] else ""
            print(f"{split} prompts: {row['there']:,} of {row['asked']:,} asked for{left_out}", flush=True)
    prompts = inputs.prompts("validation")
    longest = max(len(p.ids) for p in prompts) + settings.evaluation.max_tokens
    sampler = inputs.sampler(model, settings.coarse, longest)
    with here.timer("self-check"):
        _self_check(inputs, model, sampler, prompts)
    with here.timer("speed"):
        speed.probe(inputs, model, sampler, prompts).save(here.dir)
    with here.timer("evaluation"):
        samples = inputs.answers(model, prompts)
        results = {
            "source": settings.models.base or "embedded",
            "parameters": sum(p.numel() for p in model.parameters()),
            "loss": losses,
            "validation": {},
            "behaviour": answers.measure(samples),
            **({} if settings.embedded else {"prompts": counts}),
        }
        kinds = answers.by_kind(samples)
        for name, given in _forced(inputs, model, prompts).items() if settings.embedded else ():
            results["validation"][name] = answers.measure(given)["accuracy_first"]
            for kind, row in answers.by_kind(given).items():
                kinds[kind][name] = row["accuracy_first"]
        if kinds:
            results["by_kind"] = kinds
    keep_samples(here, answers.rows(samples, "base", "sampled_t1"), settings)
    here.save_results(results)
    shutil.rmtree(here.dir / CHECKPOINTS, ignore_errors=True)
    return results


def times(run: Run) -> pd.DataFrame:
    """What the later notebooks take at most by the speeds that this one measured: tokens answered and read (in
    training once per pass)."""
    speeds = work.known(run.here.dir)
    rows = []
    for name in STAGES:
        if speeds and (found := work.of_stage(name, run.settings, speeds)):
            rows.append({
                "notebook": name, "tokens answered": round(found.generated), "tokens read": round(found.read),
                "at most": in_words(found.seconds(speeds)),
            })  # fmt: skip
    return pd.DataFrame(rows, columns=["notebook", "tokens answered", "tokens read", "at most"]).set_index("notebook")


def _self_check(inputs: Inputs, model, sampler: Sampler, prompts: list[Prompt]) -> None:
    """Refuse a layout that later notebooks could not train or sample rightly; say how well they agree on this one."""
    settings = inputs.settings
    if not (settings.embedded or settings.models.reward):
        rewards.refuse_without_scores(model.config)
    found = inputs.self_check(model, sampler, prompts, Head(model))
    if found:
        print(f"self-check: {found}", flush=True)
        inputs.run.here.note(self_check=asdict(found))


def _forced(inputs: Inputs, model, prompts: list[Prompt]) -> dict[str, list[Sample]]:
    """Greedy answers after a forced analysis and after a forced direct answer: the accuracy of the first ones says
    where the knowledge sits."""
    problems = [p.problem for p in prompts]
    asked = {
        "forced_accuracy": analysed_prompts(problems),
        "forced_direct_accuracy": make_prompts(problems, FORCED_ANSWER),
    }
    return {name: inputs.answers(model, forced, "greedy") for name, forced in asked.items()}
