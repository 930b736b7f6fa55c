"""Logistic regression on soft labels with a normal prior, for many resamples of the same rows at once."""

import numpy as np

STEPS = 60  # far more than Newton's method takes; a fit that is not settled by then has no maximum
LONGEST_STEP = 3.0  # logits; a full step from a flat place would overshoot

FREE = 0.01  # precision of a prior that only keeps a coefficient finite: a standard deviation of 10 logits


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logits)), in a form that cannot overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def logistic(
    features: np.ndarray, labels: np.ndarray, weights: np.ndarray, mean: np.ndarray, precision: np.ndarray
) -> np.ndarray:
    """Coefficients [draws, k] that minimise cross-entropy plus a normal prior, by Newton's method.

    `features` [rows, k]; `labels` [rows] in [0, 1]; `weights` [draws, rows], how often each row counts; `mean` and
    `precision` [k] of the prior: each coefficient costs precision / 2 * (coefficient - mean)^2 beside the summed
    cross-entropy. Every precision is above zero, so that there is one minimum, also where a model wins every time.
    """
    draws, size = len(weights), features.shape[1]
    found = np.tile(mean, (draws, 1)).astype(float)
    products = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)
    for _ in range(STEPS):
        chances = sigmoid(found @ features.T)
        slope = (weights * (chances - labels)) @ features + precision * (found - mean)
        curve = ((weights * chances * (1 - chances)) @ products).reshape(draws, size, size) + np.diag(precision)
        step = np.linalg.solve(curve, slope[..., None])[..., 0]
        length = np.abs(step).max(axis=1, keepdims=True)
        found -= step * np.minimum(1, LONGEST_STEP / np.maximum(length, 1e-12))
        if length.max() < 1e-8:
            break
    return found
