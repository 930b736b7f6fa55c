"""05: what instruction model do we merge into?"""

import shutil
import statistics

from torch.nn import functional

from c2f_utils.errors import C2FError
from c2f_utils.measure import answers
from c2f_utils.models import instruct
from c2f_utils.models.loading import save_model
from c2f_utils.notebook.progress import Progress
from c2f_utils.runs.run import Run
from c2f_utils.stages.inputs import CHECKPOINTS, Inputs, keep_samples, stopped_here

# Least median cosine between the matrices of an instruction model and of its base. On `tiny` it is 0.999 to the
# embedded instruction model, and 0.00 between the bases of two seeds.
LIKE = 0.5


def make(run: Run) -> dict:
    """Results of 05: fine-tune the embedded base (TRL `SFTTrainer`), or load the user's model and check that it fits
    the base."""
    here, settings = run.here, run.settings
    if here.loaded:
        return here.results()
    inputs = Inputs(run)
    losses: list[dict] = []
    examples, likeness = 0, None
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
        likeness = _refuse_strangers(inputs.base(), model, settings.models.instruct)
    with here.timer("evaluation"):
        samples = inputs.answers(model, inputs.prompts("validation"), form=settings.models.instruct_form)
        behaviour, kinds = answers.measure(samples), answers.by_kind(samples)
    keep_samples(here, answers.rows(samples, "instruct", "sampled_t1"), settings)
    results = {
        "source": settings.models.instruct or "embedded",
        "examples": examples,
        "loss": losses,
        "behaviour": behaviour,
        **({"likeness": round(likeness, 4)} if likeness is not None else {}),  # cosine to the base's weights
        **({"by_kind": kinds} if kinds else {}),
    }
    here.save_results(results)
    return results


def _refuse_strangers(base, instruct_model, source: str) -> float:
    """Median cosine between the matrices of both models; raises C2FError for an instruction model of another shape, or
    of another family in the same shape, whose residues would mean nothing to it."""
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
    cosines = [
        functional.cosine_similarity(weight.flatten().float(), theirs[name].flatten().float(), dim=0).item()
        for name, weight in ours.items()
        if weight.dim() == 2 and weight.is_floating_point()
    ]
    likeness = statistics.median(cosines)
    if likeness < LIKE:
        raise C2FError(
            f"models.instruct = {source!r} has the base model's shape and other weights: the median cosine between "
            f"their matrices is {likeness:.2f}; expected above {LIKE:g}, as fine-tuning moves weights little: name the "
            "base model that it was fine-tuned from"
        )
    return likeness
