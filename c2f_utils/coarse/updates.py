"""One optimiser step out of micro-batches of any number: accumulate, agree with the other processes, clip, step.

AdamW works in float32. Parameters in another type (bfloat16, full fine-tuning) get a float32 master that the
optimiser owns and that is rounded into the model after each step: at learning rates near 1e-6 bfloat16 alone would
swallow every update. Their gradients are summed over micro-batches in float32, too. Heads are float32 already, and so
are adapters on the CPU; on a GPU adapters have the trunk's type, and masters.
"""

import torch
from torch import Tensor, nn

from c2f_utils.coarse.ranks import Ranks
from c2f_utils.errors import C2FError
from c2f_utils.settings.config import Coarse


class Updates:
    """The optimiser with its masters; `weights` are what it trains, by the model's parameter names."""

    def __init__(self, policy: nn.Module, config: Coarse, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.parameters: dict[str, nn.Parameter] = policy.trainable()
        self.weights = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        self._mastered = [(p, self.weights[n]) for n, p in self.parameters.items() if p is not self.weights[n]]
        actor = [w for n, w in self.weights.items() if not n.startswith("critic.")]
        critic = [w for n, w in self.weights.items() if n.startswith("critic.")]
        groups = [
            {"params": actor, "lr": config.actor_learning_rate},
            {"params": critic, "lr": config.critic_learning_rate},
        ]
        self.optimiser = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=True)

    def clear(self) -> None:
        """Forget the gradients of an optimiser step that begins, or begins anew."""
        self.optimiser.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, weight: float = 1.0) -> None:
        """Add the gradient of one micro-batch's loss; `weight` is 0 for a pass that only keeps others company."""
        (loss if weight == 1.0 else loss * weight).backward()
        self._absorb()

    def step(self) -> list[Tensor]:
        """Sum gradients over processes, clip actor and critic apart (the critic's scale must not throttle the actor),
        step, and return both norms.

        A norm that is not finite means that no step was taken.
        """
        self.ranks.sum_gradients(list(self.weights.values()))
        norms = []
        for group in self.optimiser.param_groups:
            norms.append(self.ranks.full(nn.utils.clip_grad_norm_(group["params"], self.config.gradient_clip)))
        if all(bool(torch.isfinite(norm)) for norm in norms):
            self.optimiser.step()
            self.publish()
        self.clear()
        return norms

    def moments(self) -> dict[str, Tensor]:
        """Adam's state as `weight name/key`, whole where weights are split; every process must ask."""
        return {
            f"{name}/{key}": self.ranks.full(value.detach())
            for name, weight in self.weights.items()
            for key, value in self.optimiser.state.get(weight, {}).items()
        }

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor], where: object) -> None:
        """Take over trained weights and what `moments` gave; raises C2FError when they are of another model."""
        if weights.keys() != self.weights.keys():
            raise C2FError(
                f"checkpoint {where} holds other parameters than the model; use overwrite=True to start anew"
            )
        for name, weight in self.weights.items():
            self.ranks.assign(weight, weights[name])
        for key, value in moments.items():
            name, _, what = key.rpartition("/")
            weight = self.weights[name]
            # The step count is a scalar; a copy onto the parameter's device serves a fused optimiser everywhere.
            placed = self.ranks.like(value, weight) if value.ndim else value.to(weight.device)
            self.optimiser.state[weight][what] = placed
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        for parameter, master in self._mastered:
            parameter.copy_(master)

    @torch.no_grad()
    def _absorb(self) -> None:
        for parameter, master in self._mastered:
            if parameter.grad is not None:
                master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                parameter.grad = None
