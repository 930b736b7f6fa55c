"""The bench of notebook 06: merge in memory, answer validation problems, score with a price on length."""

from torch import Tensor, nn

from c2f_utils import merge, stats
from c2f_utils.domain.samples import Sample
from c2f_utils.measure import answers
from c2f_utils.models import loading
from c2f_utils.rollout.sampler import Sampler
from c2f_utils.stages.inputs import Inputs

State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    """The model's tensors by name, detached and on the CPU: merges are made there, and a GPU keeps its room."""
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


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

    One model object is reused for all merges. Once `compare_with` has set a reference, every row also carries its
    paired difference to it: `difference`, `low`, `high` (score, 95 % bootstrap interval over problems).
    """

    def __init__(self, inputs: Inputs):
        self.inputs, self.settings = inputs, inputs.settings
        self.prompts = self.inputs.prompts("validation")
        base, coarse = state_of(self.inputs.base()), state_of(self.inputs.coarse())  # one model on the device at a time
        self.model = self.inputs.instruct()
        instruct = {name: value.clone() for name, value in state_of(self.model).items()}
        self.states: dict[str, State] = {"base": base, "instruct": instruct, "coarse": coarse}
        self._reference: list[float] | None = None

    @property
    def score_text(self) -> str:
        quality = "utility" if self.settings.embedded else "reward"
        return f"{quality} - {self.settings.merge.token_price:g} x mean tokens, validation problems, T=1"

    def recipe(self, operator: dict, coefficient: float, **shape: object) -> merge.Recipe:
        """See `recipe_of`."""
        return recipe_of(self.inputs, operator, coefficient, **shape)

    def merged(self, recipe: merge.Recipe, coarse: State | None = None) -> nn.Module:
        """The bench's model with merged weights; valid until the next call."""
        state = merge.merge_state_dicts(
            recipe, self.states["base"], self.states["instruct"], coarse or self.states["coarse"]
        )
        return self.loaded(state)

    def loaded(self, state: State) -> nn.Module:
        """The bench's model with these weights; valid until the next call."""
        self.model.to(loading.device(self.settings.models)).load_state_dict(state, strict=False)
        return self.model

    def make_room(self) -> None:
        """Take the bench's model off the device until the next merge."""
        self.model.cpu()

    def answers(self, model: nn.Module) -> list[Sample]:
        """Answers of a merge to the validation prompts, in the instruction model's form."""
        return self.inputs.answers(model, self.prompts, form=self.settings.models.instruct_form)

    def measure(self, recipe: merge.Recipe, coarse: State | None = None) -> dict:
        """Metrics and score of one merge."""
        return self.row(self.answers(self.merged(recipe, coarse)))

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
        self._reference = self.scores(self.answers(self.merged(recipe)))

    def sweep(self, operator: dict, coarse: State | None = None) -> list[dict]:
        """Metrics and score for every coefficient of the grid."""
        grid = self.settings.merge.coefficients
        return [{"coefficient": c, **self.measure(self.recipe(operator, c), coarse)} for c in grid]
