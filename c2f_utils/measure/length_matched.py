"""A merge compared with another model at that model's length: the coefficient is a length dial.

Where a length-controlled win rate asks a regression what would be at equal length, a merge can have that length. Input:
the coefficient sweep of 06 (metrics of the merge per coefficient) and the other model's metrics on the same problems.
"""

from collections.abc import Mapping, Sequence

from c2f_utils.errors import C2FError


def length_matched(sweep: Sequence[Mapping], other: Mapping, metrics: Sequence[str]) -> dict:
    """The coefficient at which the merge is as long as the other model, and the metrics of both there.

    `sweep` rows and `other` hold `mean_tokens` and the metrics, rows also their `coefficient`. Between neighbouring
    coefficients everything is linear. {"tokens", "coefficient", "between": [two coefficients], "metrics": {name:
    {"merge", "other", "difference"}} (nulls where either is unknown), "crossings", "refused"}: where the merge has that
    length at several coefficients, the smallest is taken and `crossings` counts them; where at none, `refused` says
    why. Raises C2FError for a sweep of fewer than two rows, or for an unknown length.
    """
    points = sorted(sweep, key=lambda row: row["coefficient"])
    unknown = [row.get("coefficient", "other model") for row in (*points, other) if row.get("mean_tokens") is None]
    if len(points) < 2 or unknown:
        raise C2FError(
            f"the sweep has {len(points)} coefficients, and the length is unknown of {unknown}; expected at least two "
            "coefficients, and mean_tokens in every row"
        )
    wanted = other["mean_tokens"]
    found: dict = {"tokens": wanted, "coefficient": None, "between": None, "metrics": {}, "crossings": 0}
    pairs = list(zip(points, points[1:], strict=False))
    last = points[-1]
    # A length met exactly at a coefficient is one crossing, not one on either side of it.
    inside = [
        (low, high)
        for low, high in pairs
        if low["mean_tokens"] == wanted
        or (low["mean_tokens"] - wanted) * (high["mean_tokens"] - wanted) < 0
        or (high is last and high["mean_tokens"] == wanted)
    ]
    if not inside:
        lengths = [row["mean_tokens"] for row in points]
        reach = f"the merge is {min(lengths):g} to {max(lengths):g} tokens long for coefficients "
        reach += f"{points[0]['coefficient']:g} to {points[-1]['coefficient']:g}, never {wanted:g}"
        return found | {"refused": reach}
    low, high = inside[0]
    way = high["mean_tokens"] - low["mean_tokens"]
    share = (wanted - low["mean_tokens"]) / way if way else 0.0

    def there(name: str) -> float | None:
        ends = low.get(name), high.get(name)
        return None if None in ends else ends[0] + share * (ends[1] - ends[0])

    for name in metrics:
        merge, theirs = there(name), other.get(name)
        gap = None if merge is None or theirs is None else merge - theirs
        found["metrics"][name] = {"merge": merge, "other": theirs, "difference": gap}
    found |= {"coefficient": there("coefficient"), "between": [low["coefficient"], high["coefficient"]]}
    return found | {"crossings": len(inside), "refused": None}
