"""What `results.json` of 07 holds, as a schema: what every reader of it may rely on. Keys of parts that were switched
off, and of versions before them, are absent; keys that stand here mean the same in every version."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from c2f_utils.errors import problems

Share = Annotated[float, Field(ge=0, le=1)]
Counted = Annotated[int, Field(ge=0)]
_SHOWN = 12  # problems of one message


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Interval(_Part):
    """A value with its 95 % interval, in which it lies; bounds are null where there is one case only."""

    value: float | None
    low: float | None
    high: float | None

    @model_validator(mode="after")
    def _in_order(self) -> "Interval":
        known = [number for number in (self.low, self.value, self.high) if number is not None]
        slack = 1e-9 * max(map(abs, known), default=0)
        if any(before > after + slack for before, after in zip(known, known[1:], strict=False)):
            raise ValueError(f"{self.low}, {self.value}, {self.high} are not in order")
        return self


class Metrics(_Part):
    """Means over the answers of one model under one decoding; what nobody can check, or no reward was given, is
    null."""

    accuracy_last: Share | None
    accuracy_first: Share | None
    correct_steps: float | None
    utility: float | None
    reward: float | None
    rep4: Share | None
    duplicate_sentences: Share | None
    eos_rate: Share
    mean_tokens: Annotated[float, Field(ge=0)]
    n: Annotated[int, Field(ge=1)]


class Model(_Part):
    """One row of the comparison; every other key is a decoding with its `Metrics`."""

    __pydantic_extra__: dict[str, Metrics]
    label: str
    role: Literal["base", "instruct", "coarse", "fine", "control", "other form"]


class Paired(_Part):
    """a minus b on the same prompts."""

    a: str
    b: str
    difference: float
    low: float | None
    high: float | None
    p: Share | None
    n: Annotated[int, Field(ge=1)]


class PairedMetric(Paired):
    metric: str
    decoding: str


class Prefix(_Part):
    prefix: int | None
    n: Counted


class Task(_Part):
    task: str
    suite: str
    model: str
    template: bool
    score: float
    low: float | None
    high: float | None
    n: Counted
    metric: str
    chance: Share | None


class PairedTask(Paired):
    task: str
    template: bool


class Tasks(_Part):
    rows: list[Task]
    means: list[dict]
    paired: list[PairedTask]


class Kept(_Part):
    perplexity: dict[str, Interval]
    ratio: dict[str, Interval]
    forward_kl: Interval | None = None


class Retention(_Part):
    kinds: dict[str, dict]
    models: dict[str, Kept]


class Found(_Part):
    k: Annotated[int, Field(ge=1)]
    answer: Interval
    worked: Interval
    majority: Interval


class Sampled(_Part):
    mean_tokens: float
    rows: list[Found]


class Sampling(_Part):
    problems: Counted
    samples: Counted
    models: dict[str, Sampled]
    paired: list[Paired]


class Judge(_Part):
    """Who judged; `fit` says whether anything may be claimed from it."""

    name: str
    id: str
    checks: dict[str, dict]
    fit: bool


class Verdicts(_Part):
    wins: Counted
    losses: Counted
    ties: Counted
    failed: Counted
    win_rate: Share | None
    low: Share
    high: Share


class Dialogue(_Part):
    judge: Judge
    questions: dict
    against: dict[str, Verdicts]
    grades: dict[str, dict]
    answers: dict[str, dict]


class Asked(_Part):
    words: Interval
    judged: dict | None = None
    reward: Interval | None = None


class Requests(_Part):
    n: Counted
    judge: dict | None
    models: dict[str, Asked]


class Wordlist(_Part):
    tokens: Counted
    models: dict[str, list[Interval]]


class Condition(_Part):
    """One condition of the gate: what was measured, its bound, and whether it holds."""

    name: str
    value: float
    bound: float
    passed: bool


class Evaluation(_Part):
    """All of `07_evaluation/results.json`; keys that do not stand here are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    models: dict[str, Model]
    limit: Annotated[int, Field(ge=1)]
    decoding_of_prefixes: str
    prefix_redundancy: dict[str, list[Prefix]]
    paired: list[PairedMetric]
    intervals: dict[str, dict[str, dict[str, Interval]]] = {}
    redundancy: dict[str, list[Prefix]] = {}
    gains: list[PairedMetric] = []
    by_kind: dict[str, dict[str, dict[str, Metrics]]] = {}  # by model and decoding, where problems are of two kinds
    gate: list[Condition] = []
    tasks: Tasks | None = None
    retention: Retention | None = None
    sampling: Sampling | None = None
    dialogue: Dialogue | None = None
    requests: Requests | None = None
    wordlist: Wordlist | None = None
    verdicts: list | None = None  # of older versions, whose sentences stood here

    @model_validator(mode="after")
    def _names_are_models(self) -> "Evaluation":
        used = {row.a for row in self.paired} | {row.b for row in self.paired} | {*self.redundancy}
        used |= {*(self.retention.models if self.retention else ())}
        if strange := sorted(used - {*self.models}):
            raise ValueError(f"{', '.join(strange)}: no such model among {', '.join(self.models)}")
        return self


def check(results: object) -> None:
    """Raise C2FError that lists, by place, what is not as 07 writes it."""
    try:
        Evaluation.model_validate(results)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'results'}: {e['msg']}" for e in error.errors()[:_SHOWN]]
        raise problems("these are no results of 07_evaluation:", lines) from None
