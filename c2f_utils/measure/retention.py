"""How much a model has kept: perplexity of texts, and forward KL from the instruction model on its own answers.

Inputs are log-probabilities of the tokens of each document, nats: how they are computed is the caller's business.
Tokens of one document depend on each other, so intervals (95 %) resample whole documents. All figures weigh tokens
equally.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from c2f_utils import stats
from c2f_utils.errors import C2FError
from c2f_utils.stats import Interval


class Scored(NamedTuple):
    """Sum of the log-probabilities (nats) and number of the scored tokens of each document, [documents]."""

    sums: np.ndarray
    tokens: np.ndarray


def scored(logps: Sequence[Sequence[float]]) -> Scored:
    """Sums and counts, float64, of the log-probabilities of every document's tokens; raises C2FError for a document
    without tokens and for values that are no numbers."""
    sums = np.array([np.sum(np.asarray(document, dtype=np.float64)) for document in logps])
    tokens = np.array([len(document) for document in logps])
    if not len(tokens) or not tokens.all():
        raise C2FError(f"{int((tokens == 0).sum())} of {len(tokens)} documents have no token to score; leave them out")
    if bad := int((~np.isfinite(sums)).sum()):
        raise C2FError(f"{bad} of {len(sums)} documents have log-probabilities that are not finite; check the weights")
    return Scored(sums, tokens)


def perplexity(found: Scored, seed: int = 0) -> Interval:
    """exp of the mean negative log-probability per token, over all tokens of all documents."""
    return _interval(lambda sums, tokens: np.exp(-sums.sum(1) / tokens.sum(1)), seed, found.sums, found.tokens)


def perplexity_ratio(found: Scored, reference: Scored, seed: int = 0) -> Interval:
    """Perplexity over that of another model on the same tokens; documents are resampled in pairs."""
    _refuse_other(found, reference)
    apart = reference.sums - found.sums
    return _interval(lambda sums, tokens: np.exp(sums.sum(1) / tokens.sum(1)), seed, apart, found.tokens)


def forward_kl(found: Scored, reference: Scored, seed: int = 0) -> Interval:
    """KL(reference || model) per token, nats, on answers that the reference sampled at T = 1 from its plain softmax.

    A Monte Carlo estimate: the mean of log p_reference - log p_model over the sampled tokens. It needs no distribution
    over the vocabulary, has the right mean, and may be below zero by chance. That of a model to itself is 0.
    """
    _refuse_other(found, reference)
    apart = reference.sums - found.sums
    return _interval(lambda sums, tokens: sums.sum(1) / tokens.sum(1), seed, apart, found.tokens)


def _refuse_other(found: Scored, reference: Scored) -> None:
    if not np.array_equal(found.tokens, reference.tokens):
        raise C2FError(
            f"{len(found.tokens)} documents of {found.tokens.sum()} tokens are compared with {len(reference.tokens)} "
            f"of {reference.tokens.sum()}; expected the same tokens"
        )


def _interval(statistic, seed: int, *columns: np.ndarray) -> Interval:
    found = stats.bootstrap(statistic, *columns, seed=seed)
    return found if found.n > 1 else found._replace(low=None, high=None)  # one document says nothing of others
