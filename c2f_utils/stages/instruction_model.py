"""05: what instruction model do we merge into?"""

import shutil

from c2f_utils.errors import C2FError
from c2f_utils.measure import answers
from c2f_utils.models import instruct
from c2f_utils.models.loading import save_model
from c2f_utils.notebook.progress import Progress
from c2f_utils.runs.run import Run
from c2f_utils.stages.inputs import CHECKPOINTS, Inputs, keep_samples, stopped_here


def make(run: Run) -> dict:
    """Results of 05: fine-tune the embedded base (TRL `SFTTrainer`), or load the user's model and check that it fits
    the base."""
    here, settings = run.here, run.settings
    if here.loaded:
        return here.results()
    inputs = Inputs(run)
    losses: list[dict] = []
    examples = 0
    if settings.embedded:
        with here.timer("training"), stopped_here(here):
            model, examples = instruct.train(
                inputs.base_source, inputs.tokenizer, settings, losses.append, here.path(CHECKPOINTS),
                stop=here.stop_requested, progress=Progress("instruction model"),
            )  # fmt: skip
        save_model(model, inputs.tokenizer, here.path("model"))
        shutil.rmtree(here.dir / CHECKPOINTS, ignore_errors=True)
    else:
        _ = inputs.instruct_forms  # a missing template is refused before anything is loaded
        model = inputs.instruct()
        _refuse_other_shape(inputs.base(), model, settings.models.instruct)
    with here.timer("evaluation"):
        samples = inputs.answers(model, inputs.prompts("validation"), form=settings.models.instruct_form)
        behaviour, kinds = answers.measure(samples), answers.by_kind(samples)
    keep_samples(here, answers.rows(samples, "instruct", "sampled_t1"), settings)
    results = {
        "source": settings.models.instruct or "embedded",
        "examples": examples,
        "loss": losses,
        "behaviour": behaviour,
        **({"by_kind": kinds} if kinds else {}),
    }
    here.save_results(results)
    return results


def _refuse_other_shape(base, instruct_model, source: str) -> None:
    ours, theirs = base.state_dict(), instruct_model.state_dict()
    wrong = sorted(
        n for n in ours.keys() | theirs.keys() if n not in ours or n not in theirs or ours[n].shape != theirs[n].shape
    )
    if wrong:
        raise C2FError(
            f"models.instruct = {source!r} is not of the base model's shape: {len(wrong)} tensors differ, the "
            f"first is {wrong[0]}; "
            "a residue merge needs an instruction model that was fine-tuned from the same base"
        )
