"""Over-optimisation of a reward model: training reward against held-out reward and true utility, by KL to the base.

Question: how far can a policy be pushed before the reward it is trained on stops being worth anything, and does an
average of reward models (WARM) move that point? Inputs: curves of coarse actors by iteration, made by
`benchmarks/overoptimisation.py`: training reward, reward of a held-out model trained on other pairs, true utility, KL.
Outputs: the curves over sqrt(KL), the axis of Gao et al. (2023), and their peaks, compared seed by seed.
"""

from collections.abc import Sequence

import numpy as np

from c2f_utils import stats

METRICS = ("held_out", "utility")
WINDOW = 5  # iterations of the moving mean on which peaks are looked for: the answers of one iteration are few


def columns(rows: Sequence[dict]) -> dict[str, list[float]]:
    """Rows of one curve as lists by name, the form kept on disk."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def smooth(values: Sequence[float], window: int = WINDOW) -> np.ndarray:
    """Centred moving mean over `window` points, fewer at the ends."""
    numbers = np.asarray(values, float)
    half = window // 2
    return np.array([numbers[max(0, i - half) : i + half + 1].mean() for i in range(len(numbers))])


def root_kl(curve: dict[str, list[float]]) -> np.ndarray:
    """sqrt of the smoothed KL per answer; an estimate below zero counts as zero."""
    return np.sqrt(np.maximum(smooth(curve["kl_per_answer"]), 0.0))


def features(curve: dict[str, list[float]]) -> dict[str, float]:
    """What one curve says, from its moving means: end of the training reward and KL, and by metric the peak, sqrt(KL)
    at the peak, the end, and the drop from peak to end."""
    x, training = root_kl(curve), smooth(curve["training"])
    found = {"training_end": training[-1], "root_kl_end": x[-1], "tokens_end": smooth(curve["tokens"])[-1]}
    for metric in METRICS:
        y = smooth(curve[metric])
        peak = int(y.argmax())
        found |= {
            f"{metric}_peak": y[peak],
            f"{metric}_root_kl_at_peak": x[peak],
            f"{metric}_end": y[-1],
            f"{metric}_drop": y[peak] - y[-1],
        }
    found["gap_end"] = training[-1] - found["held_out_end"]
    return {name: float(value) for name, value in found.items()}


def at_root_kl(curve: dict[str, list[float]], metric: str, where: float) -> float:
    """The smoothed metric when the policy first reaches this sqrt(KL), linear between iterations."""
    return float(np.interp(where, np.maximum.accumulate(root_kl(curve)), smooth(curve[metric])))


def compare(pairs: Sequence[tuple[dict, dict]]) -> dict[str, dict]:
    """First curve minus second, paired by seed: every feature, and the metrics at the largest sqrt(KL) both reach.

    One entry {"first", "second", "difference", "low", "high", "n"} per feature: means over seeds, and the t-interval of
    the paired differences (null bounds for a single seed).
    """
    first, second = ([features(curve) for curve in side] for side in zip(*pairs, strict=True))
    for a, b, (curve, other) in zip(first, second, pairs, strict=True):
        reach = min(root_kl(curve).max(), root_kl(other).max())
        for metric in METRICS:
            a[f"{metric}_at_equal_kl"] = at_root_kl(curve, metric, reach)
            b[f"{metric}_at_equal_kl"] = at_root_kl(other, metric, reach)
    found = {}
    for name in first[0]:
        mine, others = [row[name] for row in first], [row[name] for row in second]
        interval = stats.seed_interval(np.subtract(mine, others))
        means = {"first": float(np.mean(mine)), "second": float(np.mean(others))}
        found[name] = means | {"difference": interval.value, "low": interval.low, "high": interval.high}
        found[name] = {key: value if value is None else round(value, 4) for key, value in found[name].items()}
        found[name]["n"] = interval.n
    return found
