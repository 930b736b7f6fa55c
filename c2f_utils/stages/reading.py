"""To look at, beside the notebooks' own cells: any prompt answered by the models one chooses, any test prompt followed
through training. Nothing is written; a run without a reader does nothing here."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from c2f_utils.domain import forms
from c2f_utils.domain.forms import Form
from c2f_utils.domain.problems import SPECIALS
from c2f_utils.domain.samples import Prompt
from c2f_utils.errors import C2FError, short
from c2f_utils.measure import answers
from c2f_utils.measure.judges import Question
from c2f_utils.models import loading
from c2f_utils.models.generated import generator
from c2f_utils.notebook.progress import unattended
from c2f_utils.notebook.show import Html, sample_browser, side_by_side
from c2f_utils.report.results import MAIN
from c2f_utils.runs.run import Run
from c2f_utils.runs.stage import Stage
from c2f_utils.settings.config import TRAINED_CONTROLS
from c2f_utils.stages.inputs import Inputs
from c2f_utils.stages.judge_of_run import judged_text


def ask(run: Run, text: str, models: Sequence[str] = MAIN, decoding: str = "sampled_t1") -> Html | None:
    """The models' answers to a prompt that is typed in, side by side, under the limit of the evaluation.

    `models` are base, instruct, coarse, fine and controls of 06. Raises C2FError for a name that is none of them, and
    on the embedded domain for words that its models do not know.
    """
    if unattended():
        return None
    inputs = Inputs(run)
    loaders = _loaders(run, inputs)
    if unknown := [name for name in models if name not in loaders]:
        raise C2FError(f"models names {', '.join(map(short, unknown))}; expected some of {', '.join(loaders)}")
    if decoding not in answers.TEMPERATURES:
        raise C2FError(f"decoding = {short(decoding)}; expected one of {', '.join(answers.TEMPERATURES)}")
    prompt = _prompt(inputs, text)
    said = {}
    for name in models:
        load, form = loaders[name]
        said[name] = answers.rows(inputs.answers(load(), [prompt], decoding, form=form), name, decoding)
    return side_by_side(said)


def _prompt(inputs: Inputs, text: object) -> Prompt:
    if not isinstance(text, str) or not text.strip():
        raise C2FError(f"the prompt is {short(text)}; expected words")
    if inputs.settings.embedded:
        known = generator(inputs.settings.data).vocabulary.words[len(SPECIALS) :]
        if unknown := [word for word in dict.fromkeys(text.split()) if word not in known]:
            raise C2FError(
                f"{', '.join(map(short, unknown))}: no words of the embedded domain, whose models know these: "
                + " ".join(known)
            )
        text = " ".join(text.split())
    dialogue = judged_text(inputs, Question("typed", "", (text,)), [])
    return Prompt(tuple(forms.prompt_ids(dialogue, inputs.settings.models.base_form, inputs.tokenizer)), dialogue)


def _loaders(run: Run, inputs: Inputs) -> dict[str, tuple[Callable[[], nn.Module], Form | None]]:
    merged, models = run.parent("06_residue_merging"), run.settings.models
    form = models.instruct_form
    found = {
        "base": (inputs.base, None),
        "instruct": (inputs.instruct, form),
        "coarse": (inputs.coarse, None),
        "fine": (lambda: loading.load_causal(merged.model(), models), form),
    }
    for folder in sorted(name for name in merged.models() if name.startswith("controls/")):
        name = folder.removeprefix("controls/")
        load = partial(lambda folder: loading.load_actor(merged.model(folder), models), folder)
        found[name] = load, None if name in TRAINED_CONTROLS else form
    return found


def follow(run: Run, number: int = 0) -> Html | None:
    """Test prompt `number` (from 0) answered by the base, by every snapshot of 03 and by the actor at its end, T=1.

    Without snapshots of whole models (`coarse.snapshots`; adapters are none) the validation prompt of that number, as
    03 probed it in training. Raises C2FError for a number that is none.
    """
    if unattended():
        return None
    stage = run.stage("03_coarse_rlhf")
    trained = stage if (stage.dir / "results.json").exists() else run.parent("03_coarse_rlhf")
    snapshots = sorted((trained.dir / "snapshots").glob("iteration-*.safetensors"))
    if not snapshots or run.settings.models.lora:
        return _probed(trained, number)
    inputs = Inputs(run)
    prompts = inputs.prompts("test")
    prompt = prompts[_refuse_outside(number, len(prompts), "test prompts")]
    rows = []
    for iteration, model in _through_training(inputs, trained, snapshots):
        found = answers.rows(inputs.answers(model, [prompt]), "coarse", "sampled_t1", inputs.reward)
        rows += [row | {"iteration": iteration} for row in found]
    return sample_browser(rows)


def _through_training(inputs: Inputs, trained: Stage, snapshots: list[Path]) -> Iterator[tuple[int, nn.Module]]:
    """Iteration and actor; one model takes all weights."""
    model = inputs.base()
    yield 0, model
    for path in snapshots:
        model.load_state_dict(load_file(path))
        yield int(path.stem.rpartition("-")[2]), model
    last = trained.results()["iterations"]
    if last != int(snapshots[-1].stem.rpartition("-")[2]):
        yield last, loading.load_actor(trained.dir / "model", inputs.settings.models, inputs.base_source)


def _probed(trained: Stage, number: int) -> Html:
    probes = trained.results()["probes"]
    asked = list(dict.fromkeys(probe["prompt"] for probe in probes))
    prompt = asked[_refuse_outside(number, len(asked), "validation prompts that 03 probed")]
    shown = sample_browser([probe for probe in probes if probe["prompt"] == prompt])
    why = "03 kept no snapshots of whole models (coarse.snapshots): a validation prompt, as it was probed in training."
    return Html(f"<p>{why}</p>{shown.markup}")


def _refuse_outside(number: object, count: int, what: str) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < count:
        raise C2FError(f"prompt number {short(number)}; expected 0 to {count - 1}: there are {count} {what}")
    return number
