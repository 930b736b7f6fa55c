"""The bench of notebook 06: merge into one model on its device, answer validation problems, score with a price on
length."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from c2f_utils import merge, stats
from c2f_utils.domain.samples import Sample
from c2f_utils.measure import answers
from c2f_utils.models import loading
from c2f_utils.notebook.progress import Progress
from c2f_utils.rollout.sampler import Sampler
from c2f_utils.stages.inputs import Inputs
from c2f_utils.stages.pieces import Pieces


def recipe_of(inputs: Inputs, operator: dict, coefficient: float, **shape: object) -> merge.Recipe:
    """A recipe on the run's own checkpoints; `shape` may hold `knots` and `rules` of the coefficient."""
    return merge.Recipe(
        base=inputs.base_source,
        instruct=inputs.instruct_source,
        coarse=inputs.coarse_source,
        operator=operator,
        coefficient={"default": float(coefficient), **shape},
        out_dtype=inputs.settings.merge.out_dtype,
        seed=inputs.settings.seed,
    )


class Bench:
    """Merges with the kernels of the streaming merger and measures on validation problems, T=1.

    One model object, on its device, takes all merges. Base, instruct and coarse stay on the disk, of which `states`
    read a tensor at a time; only where the library keeps a model's tensors otherwise than they are stored, they are
    held in memory (a line says so). Once `compare_with` has set a reference, every row also carries its paired
    difference to it: `difference`, `low`, `high` (score, 95 % bootstrap interval over problems).
    """

    def __init__(self, inputs: Inputs):
        self.inputs, self.settings, self.pieces = inputs, inputs.settings, Pieces(inputs.run.here)
        self.prompts = self.inputs.prompts("validation")
        self.progress = Progress("measuring", "merge")
        self.model: nn.Module | None = self.inputs.instruct()
        stored = merge.open_stored(self.recipe({"name": "residue"}, 1.0))
        self.stored = _is_as_stored(self.model, stored["instruct"])
        if self.stored:
            roles = (stored[role].ordered(self.model.state_dict()) for role in ("instruct", "base", "coarse.0"))
            instruct, base, coarse = roles
        else:
            print(f"{type(self.model).__name__} is not kept as it is stored: three more copies of it are in memory.")
            instruct = {name: value.clone() for name, value in state_of(self.model).items()}
            base, coarse = state_of(self.inputs.base()), state_of(self.inputs.coarse())
        self.states: dict[str, merge.StateDict] = {"base": base, "instruct": instruct, "coarse": coarse}
        self._merger = self._merger_of(coarse)
        self._other: tuple[merge.StateDict, merge.Merger] | None = None  # of the coarse model that was merged last
        self._reference: list[float] | None = None
        self._compared: dict | None = None  # the recipe of the reference

    @property
    def score_text(self) -> str:
        quality = "utility" if self.settings.embedded else "reward"
        return f"{quality} - {self.settings.merge.token_price:g} x mean tokens, validation problems, T=1"

    def recipe(self, operator: dict, coefficient: float, **shape: object) -> merge.Recipe:
        """See `recipe_of`."""
        return recipe_of(self.inputs, operator, coefficient, **shape)

    def merged(self, recipe: merge.Recipe, coarse: merge.StateDict | None = None) -> nn.Module:
        """The bench's model with merged weights; valid until the next call."""
        merger = self._merger
        if coarse is not None:
            if not self._other or self._other[0] is not coarse:
                self._other = coarse, self._merger_of(coarse)
            merger = self._other[1]
        return self.loaded(merger.tensors(recipe))

    def loaded(self, tensors: Iterable[tuple[str, Tensor]]) -> nn.Module:
        """The bench's model with these weights, copied into it one after another; valid until the next call."""
        if self.model is None:
            self.model = self.inputs.instruct()
        mine = self.model.state_dict()
        for name, tensor in tensors:
            mine[name].copy_(tensor)
        return self.model

    def written(self, folder: Path) -> nn.Module:
        """The bench's model with the weights of a merged model; valid until the next call."""
        if self.stored:
            return self.loaded(loading.stored(folder))
        return self.loaded(state_of(loading.load_causal(folder, self.settings.models)).items())

    def actor(self, folder: Path) -> merge.StateDict:
        """The weights of another trained actor, to be merged in the place of the coarse one."""
        if self.stored:
            recipe = self.recipe({"name": "residue"}, 1.0).model_copy(update={"coarse": str(folder)})
            return merge.open_stored(recipe)["coarse.0"]
        return state_of(loading.load_actor(folder, self.settings.models, self.inputs.base_source))

    def _merger_of(self, coarse: merge.StateDict) -> merge.Merger:
        device = loading.device(self.settings.models)
        return merge.Merger(self.states["base"], self.states["instruct"], coarse, device)

    def make_room(self) -> None:
        """Let go of the bench's model until the next merge."""
        self.model = None

    def answers(self, model: nn.Module) -> list[Sample]:
        """Answers of a merge to the validation prompts, in the instruction model's form."""
        return self.inputs.answers(model, self.prompts, form=self.settings.models.instruct_form)

    def measure(self, recipe: merge.Recipe, coarse: merge.StateDict | None = None, of: str = "coarse") -> dict:
        """Metrics and score of one merge, kept as a piece of the stage; `of` names the model in `coarse`."""
        return self.kept(["merge", portable(recipe), of], lambda: self.row(self.answers(self.merged(recipe, coarse))))

    def kept(self, key: list, make: Callable[[], dict]) -> dict:
        """A row as a piece of the stage; the reference that it is compared with is part of its key."""
        row = self.pieces([*key, self._compared], make)
        self.progress.step()
        return row

    def sampled(self, sampler: Sampler) -> dict:
        """Metrics and score of answers from another sampler than the bench's model, in the base's form; the difference
        to the reference only where that is the form of both."""
        limits = [self.settings.evaluation.max_tokens] * len(self.prompts)
        models = self.settings.models
        comparable = "template" not in (models.base_form, models.instruct_form)
        return self.row(sampler(self.prompts, limits, temperature=1.0, seed=self.settings.seed * 1000), comparable)

    def row(self, samples: list[Sample], comparable: bool = True) -> dict:
        """Metrics and score of answers and, where they are `comparable`, the paired difference to the reference."""
        scores = self.scores(samples)
        row = answers.measure(samples, self.inputs.reward) | {"score": round(sum(scores) / len(scores), 6)}
        if kinds := answers.by_kind(samples):
            row["by_kind"] = {
                kind: mine | {"first_right": answers.first_right([s for s in samples if s.prompt.problem.kind == kind])}
                for kind, mine in kinds.items()
            }
        if self.settings.embedded:
            row["first_right"] = answers.first_right(samples)
        if self._reference is not None and comparable:
            found = stats.paired_bootstrap(scores, self._reference, resamples=2000, seed=self.settings.seed)
            row |= {"difference": round(found.difference, 6), "low": round(found.low, 6), "high": round(found.high, 6)}
        return row

    def scores(self, samples: list[Sample]) -> list[float]:
        """Utility (reward where no checker exists) minus the price of its tokens, answer by answer."""
        values = answers.per_answer(samples)
        quality = values["utility"] if "utility" in values else self.inputs.reward(samples).tolist()
        return [q - self.settings.merge.token_price * n for q, n in zip(quality, values["tokens"], strict=True)]

    def compare_with(self, recipe: merge.Recipe) -> None:
        """Take this merge as the reference of later rows."""
        self._compared = portable(recipe)
        self._reference = self.pieces(
            ["reference", self._compared], lambda: self.scores(self.answers(self.merged(recipe)))
        )

    def sweep(self, operator: dict, coarse: merge.StateDict | None = None, of: str = "coarse") -> list[dict]:
        """Metrics and score for every coefficient of the grid; `of` names the model in `coarse`."""
        grid = self.settings.merge.coefficients
        return [{"coefficient": c, **self.measure(self.recipe(operator, c), coarse, of)} for c in grid]


def portable(recipe: merge.Recipe) -> dict:
    """A recipe without the folders of its models: it says the same wherever the run lies."""
    return {key: value for key, value in recipe.to_dict().items() if key not in ("base", "instruct", "coarse")}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name, detached and on the CPU: a GPU keeps its room."""
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def _is_as_stored(model: nn.Module, stored: merge.StateDict) -> bool:
    """Whether a model in memory is what is stored, name by name and value by value, tied tensors once."""
    mine = model.state_dict()
    if not all(name in mine and mine[name].shape == stored.shape(name) for name in stored):
        return False
    known = {mine[name].data_ptr() for name in stored}
    if any(value.numel() and value.data_ptr() not in known for value in mine.values()):
        return False
    return all(torch.equal(mine[name], stored[name].to(mine[name])) for name in stored)
