"""Actor, critic and frozen reference behind one call: log-probabilities, entropies and values of answer tokens."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from c2f_utils.models.packing import Batch

CHUNKED_ABOVE = 4096  # vocabularies above this size never see full logits

CHUNK = 1024  # words whose logits exist at a time


def trunk_and_head(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """The decoder stack and the output matrix [V, H] of a causal model, seen through a PEFT wrapper."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.model, causal.lm_head.weight


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
    full = (F.linear(hidden.float(), weight.float()) / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(full.exp() * full).sum(-1)
    return full.gather(-1, targets[:, None])[:, 0], entropy


class Critic(nn.Module):
    """A value function: its own trunk (or none, when it reads the actor's) and a linear head in float32."""

    def __init__(self, hidden_size: int, trunk: nn.Module | None = None):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_reward(cls, reward_model: nn.Module, mean: float, std: float) -> "Critic":
        """Start as the normalised reward model: V(s) = (R(s) - mean) / std at every prefix s."""
        critic = cls(reward_model.config.hidden_size, copy.deepcopy(reward_model.model))
        with torch.no_grad():
            critic.head.weight.copy_(reward_model.score.weight.float() / std)
            critic.head.bias.fill_(-mean / std)
        return critic

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden.float())[..., 0]


class ActorCritic(nn.Module):
    """Actor and critic behind one trainable entry point, so that wrappers for distributed training always see the
    call."""

    def __init__(self, actor: nn.Module, critic: Critic):
        super().__init__()
        self.actor, self.critic = actor, critic
        # With adapters the reference is the actor itself with the adapters off; otherwise a frozen copy.
        adapters = hasattr(actor, "disable_adapter")
        self._frozen = (
            [] if adapters else [copy.deepcopy(actor).requires_grad_(False)]
        )  # a list hides it from parameters()

    @property
    def dtype(self) -> torch.dtype:
        """The type in which actor and reference compute."""
        return trunk_and_head(self.actor)[1].dtype

    def forward(
        self, batch: Batch, temperature: float = 1.0, actor: bool = True
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Log-probability, entropy and value of every answer token, each [N] float32; no [B, T, V] array is made.

        With `actor=False` only values are computed (critic warm-up and scoring).
        """
        shared = self.critic.trunk is None
        hidden = None
        if actor or shared:
            trunk, head = trunk_and_head(self.actor)
            hidden = trunk(input_ids=batch.ids, use_cache=False).last_hidden_state[batch.rows, batch.columns]
        states = hidden if shared else self._states(batch)[batch.rows, batch.columns]
        # While only the critic learns, a shared trunk must not: its weights are the actor's.
        values = self.critic(states if actor or not shared else states.detach())
        if not actor:
            return None, None, values
        return *token_logps(hidden, head, batch.targets, temperature), values

    @torch.no_grad()
    def final_values(self, batch: Batch) -> Tensor:
        """V after the last token of each row, [B]: what a cut answer is worth to the critic."""
        shared = self.critic.trunk is None
        states = (
            trunk_and_head(self.actor)[0](input_ids=batch.ids, use_cache=False).last_hidden_state
            if shared
            else self._states(batch)
        )
        return self.critic(states[torch.arange(len(batch.last)), batch.last])

    def _states(self, batch: Batch) -> Tensor:
        return self.critic.trunk(input_ids=batch.ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def reference_logps(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [N] under the frozen base policy, at the same temperature."""
        with self._reference() as reference:
            trunk, head = trunk_and_head(reference)
            hidden = trunk(input_ids=batch.ids, use_cache=False).last_hidden_state[batch.rows, batch.columns]
            return token_logps(hidden, head, batch.targets, temperature)[0]

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        if self._frozen:
            yield self._frozen[0]
        else:
            with self.actor.disable_adapter():
                yield self.actor

    def recompute_activations(self) -> None:
        """Keep only layer inputs for the backward pass, in the trunks of actor and critic (gradient checkpointing).

        The library does so in training mode only; that mode changes nothing else, because dropout is off
        (`disable_dropout`).
        """
        for trunk in (self.actor, self.critic.trunk):
            if trunk is not None:
                trunk.gradient_checkpointing_enable({"use_reentrant": False})
                trunk.train()

    def compile_layers(self) -> None:
        """Compile the decoder layers that scoring and updates run through, one by one: they share their code.

        Fused kernels round at other places, and differently with and without gradients: a bfloat16 policy's first
        ratio is then near one, not exactly one.
        """
        # Variants of one layer: adapters on and off, with gradients and without, fixed and varying shapes.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for model in (self.actor, *self._frozen):
            for layer in trunk_and_head(model)[0].layers:
                layer.compile()
        for layer in self.critic.trunk.layers if self.critic.trunk is not None else ():
            layer.compile()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Named parameters that training changes; a checkpoint holds these and nothing else."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
