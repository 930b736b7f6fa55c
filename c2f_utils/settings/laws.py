"""A law for l(t) as it is set: its keys, which of them each law takes, and the law object they make."""

from typing import Literal

from pydantic import Field

from c2f_utils import limits
from c2f_utils.errors import C2FError
from c2f_utils.settings.kinds import NonNegative, Positive, Section


class Law(Section):
    """A law for the output-length limit l(t); keys that a law does not use are refused by `make_law`."""

    name: Literal["fixed", "clock", "logistic", "tail", "useful", "gated", "probe"] = "logistic"
    limit: Positive | None = Field(None, description="fixed: the limit, tokens")
    start: Positive | None = Field(None, description="first limit, tokens")
    maximum: Positive | None = Field(None, description="last limit, tokens; a clock may shrink to it")
    shape: Literal["linear", "geometric", "cosine", "steps"] | None = None
    duration: Positive | None = Field(None, description="clock: iterations from start to maximum")
    steps: list[Positive] | None = Field(None, description="clock, shape steps: limits of equal duration, tokens")
    growth: NonNegative | None = Field(
        None, description="tail, useful, gated, probe: largest relative growth per iteration"
    )
    step: Positive | None = Field(None, description="logistic: largest growth per iteration, tokens")
    weights: dict[str, float] | None = Field(
        None, description="logistic: w0, reward, value_loss, truncation, truncation_target"
    )


_KEYS = {
    "fixed": (("limit",), ()),
    "clock": (("start", "maximum", "duration", "shape"), ("steps",)),
    "logistic": (("start", "maximum", "step"), ("weights",)),
    "tail": (("start", "maximum"), ("growth",)),
    "useful": (("start", "maximum"), ("growth",)),
    "gated": (("start", "maximum"), ("growth",)),
    "probe": (("start", "maximum"), ("growth",)),
}
_SHRINKING = [("clock", shape) for shape in ("linear", "geometric", "cosine")]
_WEIGHTS = {
    "w0": "w0",
    "reward": "w_reward",
    "value_loss": "w_value",
    "truncation": "w_truncation",
    "truncation_target": "truncation_target",
}


def make_law(settings: Law) -> limits.Law:
    """A law in its first state; raises C2FError for keys that are missing or that this law does not use."""
    given = settings.model_dump(exclude_none=True)
    name = given.pop("name")
    needed, optional = _KEYS[name]
    missing, extra = [k for k in needed if k not in given], [k for k in given if k not in (*needed, *optional)]
    if missing or extra:
        wrong = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"not used by it: {', '.join(extra)}"] * bool(
            extra
        )
        raise C2FError(f"law {name!r}: {'; '.join(wrong)}; it takes {', '.join((*needed, *optional))}")
    start, maximum = given.get("start", given.get("limit")), given.get("maximum", given.get("limit"))
    if start > maximum and (name, given.get("shape")) not in _SHRINKING:
        raise C2FError(
            f"law {name!r}: start {start} is above maximum {maximum}; expected start <= maximum (tokens); only clocks "
            "without steps can shrink"
        )
    growth = {"growth": given["growth"]} if "growth" in given else {}
    if name == "fixed":
        return limits.Fixed(start)
    if name == "clock":
        stages = given.get("steps", [])
        if (given["shape"] == "steps") != bool(stages):
            raise C2FError("law 'clock': shape 'steps' and the list `steps` belong together; give both or neither")
        if stages and (stages[0] != start or not 1 <= min(stages) <= max(stages) <= maximum):
            raise C2FError(
                f"law 'clock': steps {stages} with start {start} and maximum {maximum}; expected the first step to be "
                "the start and none above the maximum (tokens)"
            )
        return limits.Clock(stages[0] if stages else start, maximum, given["duration"], given["shape"], stages)
    if name == "logistic":
        weights = given.get("weights", {})
        if unknown := [k for k in weights if k not in _WEIGHTS]:
            raise C2FError(f"law 'logistic': unknown weights {', '.join(unknown)}; expected {', '.join(_WEIGHTS)}")
        return limits.Logistic(start, maximum, given["step"], **{_WEIGHTS[k]: float(v) for k, v in weights.items()})
    return {"tail": limits.Tail, "useful": limits.Useful, "gated": limits.Gated, "probe": limits.Probe}[name](
        start, maximum, **growth
    )
