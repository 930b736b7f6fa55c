"""From a trunk's last states to log-probabilities of tokens: through the output matrix, or the model's own head.

One product with the output matrix is what most models do and what a chunked kernel can do in float32 without ever
holding all logits. Where a model does more (soft caps, logit scales, biases, adapters on the head) its own `forward`
is asked, with a trunk that answers the states we have. Which of the two holds is measured on the real object, with
states large enough that a soft cap would show. Auxiliary losses of expert routers are not part of either.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from c2f_utils.errors import C2FError
from c2f_utils.models.packing import Batch
from c2f_utils.rollout.anatomy import output_weight, trunk_of, unwrapped
from c2f_utils.weights import first_line

CHUNKED_ABOVE = 4096  # vocabularies above this size never see full logits
CHUNK = 1024  # words (kernel) or positions (own head) whose logits exist at a time
LARGE = 100.0  # largest logit of the comparison: beyond every soft cap
TOLERANCE = {torch.float32: 1e-5}  # of the largest logit
COARSE = 0.02  # the same for bfloat16 and float16: their logits are rounded to 0.4 %


def last_states(trunk: nn.Module, batch: Batch) -> Tensor:
    """Last hidden states [B, T, H]; padding stands behind what is real, so causality hides it."""
    return trunk(input_ids=batch.ids, use_cache=False).last_hidden_state


class Head:
    """How the last states of one causal model become log-probabilities; `model` of every call is it or a copy of it.

    Raises C2FError for a model whose logits are not finite or no function of its trunk's last states, and for adapters
    on a head that shares its weights with the embedding.
    """

    def __init__(self, model: nn.Module):
        causal = unwrapped(model)
        head = causal.get_output_embeddings()
        if hasattr(head, "base_layer") and causal.config.get_text_config().tie_word_embeddings:
            raise C2FError(
                f"models.lora.targets names the output head, which {type(causal).__name__} shares with its embedding: "
                "merged adapters would change both; take it out of the targets"
            )
        try:
            self.plain = self._measured(causal, head)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise C2FError(
                f"{type(causal).__name__} cannot be trained here: its trunk and head do not work apart "
                f"({type(error).__name__}: {first_line(error)}); choose another base model"
            ) from error

    @torch.no_grad()
    def _measured(self, causal: nn.Module, head: nn.Module) -> bool:
        """Whether logits are one product with the output matrix."""
        ids = torch.arange(1, 9, device=head.weight.device)[None] % head.weight.shape[0]
        found = trunk_of(causal)(input_ids=ids, use_cache=False)
        self.kind, states = type(found), found.last_hidden_state[0]
        own = causal(input_ids=ids, use_cache=False).logits[0]
        if not own.isfinite().all():
            raise C2FError(
                f"{type(causal).__name__} answers with logits that are no finite numbers: its weights are damaged, or "
                f"too large for {own.dtype}; check the files of the model, or set models.dtype to 'float32'"
            )
        if not _equal(self._logits(causal, states), own):
            raise ValueError("its logits are no function of its trunk's last states")
        if type(head) is not nn.Linear or head.bias is not None:
            return False  # a bias or an adapter that is still zero would not show
        product = F.linear(states.float(), head.weight.float())
        factor = LARGE / product.abs().max().clamp_min(1e-6)
        return _equal(self._logits(causal, (states * factor).to(states.dtype)), product * factor)

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [N] of all answer tokens of a batch, as the trainer sees them."""
        hidden = last_states(trunk_of(model), batch)[batch.rows, batch.columns]
        return self.logps(model, hidden, batch.targets, temperature)[0]

    def distribution(self, model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [N, V] of every word at every answer token, with gradients; all of them exist at once, so
        this is for small vocabularies."""
        hidden = last_states(trunk_of(model), batch)[batch.rows, batch.columns]
        logits = self._logits(unwrapped(model), hidden)
        return (logits.float() / temperature).log_softmax(-1)

    def logps(self, model: nn.Module, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [N] (nats, float32) of `targets` after last states [N, H]."""
        if self.plain:
            return token_logps(hidden, output_weight(model), targets, temperature)
        causal = unwrapped(model)
        if output_weight(model).shape[0] <= CHUNKED_ABOVE:
            return self._own(causal, hidden, targets, temperature)
        parts = [
            checkpoint(self._own, causal, h, t, temperature, use_reentrant=False)
            for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        ]
        return torch.cat([p for p, _ in parts]), torch.cat([e for _, e in parts])

    def _own(self, causal: nn.Module, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return _of_logits(self._logits(causal, hidden), targets, temperature)

    def _logits(self, causal: nn.Module, hidden: Tensor) -> Tensor:
        """Logits [N, V] that the model's own forward makes of last states [N, H]."""
        trunk, answer = trunk_of(causal), self.kind(last_hidden_state=hidden[None])
        before = trunk.__dict__.get("forward")
        trunk.forward = lambda *_, **__: copy.copy(answer)
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            return causal(input_ids=ids, use_cache=False).logits[0]
        finally:
            del trunk.forward
            if before is not None:
                trunk.forward = before


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N] (nats, float32) of `targets` under softmax(hidden W^T / temperature).

    The head computes in float32 whatever the trunk does. Large vocabularies go through TRL's chunked kernel, so that
    no [N, V] array exists in forward or backward.
    """
    if weight.shape[0] > CHUNKED_ABOVE:
        from trl.kernels import ChunkedLogProbFunction

        logps, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden.float(), weight, None, targets, temperature, CHUNK, None, 1.0, ("entropy",)
        )
        return logps.float(), entropy.float()
    return _of_logits(F.linear(hidden.float(), weight.float()), targets, temperature)


def _of_logits(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    full = (logits.float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(full.exp() * full).sum(-1)
    return full.gather(-1, targets[:, None])[:, 0], entropy


def _equal(found: Tensor, expected: Tensor) -> bool:
    error = (found.float() - expected.float()).abs().max()
    return bool(error <= TOLERANCE.get(found.dtype, COARSE) * expected.abs().max())
