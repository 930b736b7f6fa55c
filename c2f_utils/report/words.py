"""How a difference with its interval is put into words, the same everywhere."""

UNCHECKED = "the exact checker knows only the embedded domain"


def outcome(low: float | None, high: float | None, margin: float = 0.0) -> str:
    """What the interval of a - b says: better, worse, a tie (it contains zero), or, where it lies within `margin` on
    both sides, equivalent. Unknown without an interval: a sign is no verdict.

    Answers that never differed have a bootstrap interval without width, which says nothing of those not asked for: a
    tie.
    """
    if low is None or high is None:
        return "unknown"
    if -margin < low < high < margin:
        return "equivalent"
    return "better" if low > 0 else "worse" if high < 0 else "tie"


def difference_words(difference: float, low: float | None, high: float | None, digits: int = 3) -> str:
    """The difference with its 95 % interval, or with the remark that there is none."""
    shown = f"difference {difference:+.{digits}f}"
    if low is None or high is None:
        return f"{shown}, no interval recorded"
    return f"{shown}, 95 % interval {low:+.{digits}f} to {high:+.{digits}f}"


def capital(words: str) -> str:
    """Words with their first letter as it stands at the beginning of a sentence."""
    return words[:1].upper() + words[1:]


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
