"""The merge at another model's length: read off the sweep, and refused where the merge never has it."""

import pytest

from c2f_utils.errors import C2FError
from c2f_utils.measure.length_matched import length_matched


def sweep(*lengths: float) -> list[dict]:
    rows = [
        {"coefficient": i / 10, "mean_tokens": tokens, "score": i * 1.0, "utility": None}
        for i, tokens in enumerate(lengths)
    ]
    return rows[::-1]  # in any order


def test_coefficient_and_metrics_are_interpolated_at_the_others_length():
    found = length_matched(sweep(40, 60, 100), {"mean_tokens": 70.0, "score": 2.0}, ("score", "utility"))
    assert found["coefficient"] == pytest.approx(0.125) and found["between"] == [0.1, 0.2]
    assert found["metrics"]["score"] == pytest.approx({"merge": 1.25, "other": 2.0, "difference": -0.75})
    assert found["metrics"]["utility"] == {"merge": None, "other": None, "difference": None}
    assert (found["tokens"], found["crossings"], found["refused"]) == (70.0, 1, None)


@pytest.mark.parametrize(
    ("lengths", "wanted", "coefficient", "crossings"),
    [
        ((40, 60, 100), 60, 0.1, 1),
        ((40, 60, 100), 40, 0.0, 1),
        ((40, 60, 100), 100, 0.2, 1),
        ((100, 60, 40), 80, 0.05, 1),
        ((40, 80, 40), 60, 0.05, 2),
        ((40, 80, 40), 80, 0.1, 1),
        ((60, 60, 80), 60, 0.0, 2),
    ],
)
def test_the_smallest_coefficient_of_that_length_is_taken_and_crossings_are_counted(
    lengths, wanted, coefficient, crossings
):
    found = length_matched(sweep(*lengths), {"mean_tokens": wanted}, ("score",))
    assert found["coefficient"] == pytest.approx(coefficient) and found["crossings"] == crossings


@pytest.mark.parametrize("wanted", [39.9, 100.1])
def test_outside_the_sweep_nothing_is_extrapolated(wanted):
    found = length_matched(sweep(40, 60, 100), {"mean_tokens": wanted, "score": 1}, ("score",))
    assert found["coefficient"] is None and found["metrics"] == {}
    assert found["refused"] == f"the merge is 40 to 100 tokens long for coefficients 0 to 0.2, never {wanted:g}"


def test_a_sweep_of_one_or_an_unknown_length_is_an_error():
    with pytest.raises(C2FError, match="1 coefficients"):
        length_matched(sweep(40), {"mean_tokens": 40}, ())
    with pytest.raises(C2FError, match="unknown of .*other model"):
        length_matched(sweep(40, 50), {"score": 1}, ())
