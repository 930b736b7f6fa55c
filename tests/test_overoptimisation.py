"""Over-optimisation curves: peaks where they are, seeds paired, KL as the samples say, arms run once."""

import json
import sys
from pathlib import Path

import numpy as np
import overoptimisation as benchmark
import pytest
from tiny_models import distinct_tokens, trainer

from c2f_utils.errors import C2FError
from c2f_utils.models import rewards
from c2f_utils.report import figures

RESULTS = Path(benchmark.__file__).parent / "results" / "overoptimisation.json"


def curve(peak: float, height: float = 2.0, count: int = 61, reach: float = 4.0) -> dict:
    """Held-out reward as a parabola over sqrt(KL) with its top at `peak`; the training reward only rises."""
    root = np.linspace(0, reach, count)
    held_out = height - (root - peak) ** 2
    return {
        "iteration": list(range(1, count + 1)), "kl_per_answer": (root**2).tolist(), "training": root.tolist(),
        "held_out": held_out.tolist(), "utility": (2 * held_out).tolist(), "tokens": [100.0] * count,
        "kl_per_token": (root**2 / 100).tolist(),
    }  # fmt: skip


def test_the_peak_its_kl_and_the_drop_after_it_are_found():
    found = benchmark.features(curve(3.0))
    assert found["held_out_peak"] == pytest.approx(2.0, abs=0.02)
    assert found["held_out_root_kl_at_peak"] == pytest.approx(3.0, abs=0.1)
    assert found["held_out_drop"] == pytest.approx(1.0, abs=0.2) and found["utility_drop"] == pytest.approx(2, abs=0.4)
    assert found["gap_end"] == pytest.approx(found["training_end"] - found["held_out_end"]) and found["gap_end"] > 2
    rising = benchmark.features(curve(9.0))
    assert rising["held_out_drop"] == 0 and rising["held_out_root_kl_at_peak"] == rising["root_kl_end"]


def test_one_lucky_iteration_is_no_peak():
    given = curve(3.0)
    given["held_out"][10] += 2.0
    assert benchmark.features(given)["held_out_root_kl_at_peak"] == pytest.approx(3.0, abs=0.1)


def test_kl_below_zero_counts_as_none_and_equal_kl_means_the_same_place_on_the_axis():
    given = curve(3.0)
    given["kl_per_answer"][:5] = [-0.4] * 5
    assert benchmark.root_kl(given)[0] == 0 and np.isfinite(benchmark.root_kl(given)).all()
    assert benchmark.at_root_kl(curve(3.0), "held_out", 2.0) == pytest.approx(1.0, abs=0.02)


def test_arms_are_compared_seed_by_seed_and_at_the_kl_that_both_reach():
    pairs = [(curve(3.0, height), curve(2.0, height, reach=3.0)) for height in (0.0, 5.0, 10.0)]
    found = benchmark.compare(pairs)
    later = found["held_out_root_kl_at_peak"]
    assert later["difference"] == pytest.approx(1.0, abs=0.15) and later["low"] > 0.8, "heights differ, peaks do not"
    level = found["held_out_peak"]
    assert abs(level["difference"]) < 0.05 and level["high"] < 0.1 and level["n"] == 3
    equal = found["held_out_at_equal_kl"]
    assert equal["first"] - equal["second"] == pytest.approx(1.0, abs=0.2), "0 off its peak against 1 off"
    assert benchmark.compare(pairs[:1])["held_out_peak"]["low"] is None


def test_rows_are_the_policys_own_samples_and_the_first_is_the_base():
    process, seen = trainer("fixed"), []

    def held_out(samples):
        seen.append(samples)
        return 2 * distinct_tokens(samples) + 1

    rows = list(benchmark.train(process, held_out))
    assert [row["iteration"] for row in rows] == list(range(1, process.config.iterations + 1)) and len(rows) > 1
    assert rows[0]["kl_per_answer"] == pytest.approx(0, abs=1e-3)
    assert any(abs(row["kl_per_answer"]) > 1e-2 for row in rows[1:])
    for row, samples, logged in zip(rows, seen, process.history, strict=True):
        assert row["held_out"] == pytest.approx(2 * distinct_tokens(samples).mean().item() + 1, abs=1e-4)
        assert row["utility"] == pytest.approx(rewards.verifiable(samples).mean().item(), abs=1e-4)
        assert row["training"] == pytest.approx(logged["reward"], abs=1e-4)
        assert row["tokens"] == pytest.approx(logged["mean_tokens"], abs=1e-4)
        assert row["kl_per_answer"] == pytest.approx(row["kl_per_token"] * row["tokens"], abs=1e-3)


@pytest.fixture
def fake_study(monkeypatch):
    """A study whose arms cost nothing; the arms that were run, in order."""
    ran = []

    class Study:
        def __init__(self, run_id, condition):
            self.names = run_id, condition
            self.run = type("Run", (), {"settings": type("S", (), {"coarse": trainer("fixed").config})})

        def proxies(self):
            return {"single": "single", "warm": "warm"}, [{"model": "member 1"}]

        def held_out(self):
            return "held out"

        def arm(self, proxy, held_out, config):
            ran.append((*self.names, proxy, config.iterations, config.kl_coefficient))
            if len(ran) == 2 and "interrupted" in self.names[0]:
                raise KeyboardInterrupt
            return {"curve": curve({"single": 2.0, "warm": 3.0}[proxy]), "final": {}}

    monkeypatch.setattr(benchmark, "Study", Study)
    return ran


def run_main(benchmark, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["overoptimisation.py", *arguments])
    benchmark.main()


def test_a_study_that_was_interrupted_goes_on_with_the_arms_that_are_missing(monkeypatch, fake_study, tmp_path):
    out = tmp_path / "o.json"
    usual = ("--out", str(out), "--iterations", "7", "--conditions", "usual")
    with pytest.raises(KeyboardInterrupt):
        run_main(benchmark, monkeypatch, "interrupted", *usual)
    assert set(json.loads(out.read_text())["runs"]["interrupted"]["usual"]["arms"]) == {"single"}
    run_main(benchmark, monkeypatch, "interrupted", "other", *usual)
    arms = [("interrupted", "single"), ("interrupted", "warm"), ("interrupted", "warm"), ("other", "single")]
    assert [(ran[0], ran[2]) for ran in fake_study] == [*arms, ("other", "warm")]
    assert {ran[3:] for ran in fake_study} == {(7, 0.0)}
    later = json.loads(out.read_text())["summary"]["usual"]["held_out_root_kl_at_peak"]
    assert later["n"] == 2 and later["difference"] == pytest.approx(1.0, abs=0.15)
    with pytest.raises(C2FError, match="was made with other iterations"):
        run_main(benchmark, monkeypatch, "third", "--out", str(out), "--iterations", "8")


def test_the_figure_shows_every_seed_and_says_when_there_is_no_study(tmp_path):
    arms = {"single": {"curve": curve(2.0)}, "warm": {"curve": curve(3.0, count=50)}}
    content = {"conditions": {"usual": {}, "never run": {}}, "runs": {r: {"usual": {"arms": arms}} for r in ("a", "b")}}
    fig = figures.overoptimisation(content)
    assert len(fig.data) == 2 * (61 + 50) and set(fig.data["arm"]) == {"single", "warm"} and fig.caption == "runs a, b"
    assert [ax.get_ylabel() for ax in fig.axes] == ["usual", "", ""], "a condition that was never run has no row"
    assert all(len(ax.lines) == 2 * (2 + 1) for ax in fig.axes)
    empty = figures.overoptimisation(tmp_path / "absent.json")
    assert "no study on disk" in " ".join(text.get_text() for text in empty.axes[0].texts)


def test_the_committed_study_is_drawn_and_its_summary_follows_from_its_curves():
    content = json.loads(RESULTS.read_text())
    assert len(content["runs"]) >= 3 and content["summary"] == benchmark.summary(content)
    assert len(figures.overoptimisation(RESULTS).data)
    for run in content["runs"].values():
        for condition in run.values():
            for arm in condition["arms"].values():
                assert len(arm["curve"]["iteration"]) == content["iterations"]
                assert abs(arm["curve"]["kl_per_answer"][0]) < 0.01, "both arms start from the base"
