"""Actor, critic and frozen reference behind one call: log-probabilities, entropies and values of answer tokens."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from c2f_utils.coarse.heads import Head, last_states
from c2f_utils.models.packing import Batch
from c2f_utils.rollout.anatomy import layers_of, output_weight, trunk_of


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
        critic = cls(reward_model.score.weight.shape[1], copy.deepcopy(trunk_of(reward_model)))
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
        self.actor, self.critic, self.head = actor, critic, Head(actor)
        # With adapters the reference is the actor itself with the adapters off; otherwise a frozen copy.
        adapters = hasattr(actor, "disable_adapter")
        self._frozen = (
            [] if adapters else [copy.deepcopy(actor).requires_grad_(False)]
        )  # a list hides it from parameters()

    @property
    def dtype(self) -> torch.dtype:
        """The type in which actor and reference compute."""
        return output_weight(self.actor).dtype

    def forward(
        self, batch: Batch, temperature: float = 1.0, actor: bool = True
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Log-probability, entropy and value of every answer token, each [N] float32; no [B, T, V] array is made.

        With `actor=False` only values are computed (critic warm-up and scoring).
        """
        shared = self.critic.trunk is None
        hidden = None
        if actor or shared:
            hidden = last_states(trunk_of(self.actor), batch)[batch.rows, batch.columns]
        states = hidden if shared else last_states(self.critic.trunk, batch)[batch.rows, batch.columns]
        # While only the critic learns, a shared trunk must not: its weights are the actor's.
        values = self.critic(states if actor or not shared else states.detach())
        if not actor:
            return None, None, values
        return *self.head.logps(self.actor, hidden, batch.targets, temperature), values

    @torch.no_grad()
    def final_values(self, batch: Batch) -> Tensor:
        """V after the last token of each row, [B]: what a cut answer is worth to the critic."""
        states = last_states(trunk_of(self.actor) if self.critic.trunk is None else self.critic.trunk, batch)
        return self.critic(states[torch.arange(len(batch.last)), batch.last])

    def reference_logps(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [N] under the frozen base policy, at the same temperature."""
        with self.reference() as reference:
            return self.head.score(reference, batch, temperature)

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """Inside the block the frozen policy that training started from; of adapters the model without them."""
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
            for layer in layers_of(trunk_of(model)):
                layer.compile()
        for layer in layers_of(self.critic.trunk) if self.critic.trunk is not None else ():
            layer.compile()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Named parameters that training changes; a checkpoint holds these and nothing else."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
