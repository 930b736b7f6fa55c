"""One optimiser step out of micro-batches of any number: accumulate, agree with the other processes, clip, step.

AdamW works in float32. Parameters in another type (bfloat16, full fine-tuning) get a float32 master that the
optimiser owns and that is rounded into the model after each step: at learning rates near 1e-6 bfloat16 alone would
swallow every update. Their gradients are summed over micro-batches in float32, too. Heads are float32 already, and so
are adapters on the CPU; on a GPU adapters have the trunk's type, and masters.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from c2f_utils.budget import TokenBudget
from c2f_utils.config import Coarse
from c2f_utils.packing import pack
from c2f_utils.ranks import Ranks

Stats = dict[str, Tensor | float]


class Updates:
    """The optimiser with its masters; `weights` are what it trains, by the model's parameter names."""

    def __init__(self, policy: nn.Module, config: Coarse, ranks: Ranks, budget: TokenBudget):
        self.config, self.ranks, self.budget = config, ranks, budget
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

    def accumulate(self, lengths: Sequence[int], backward: Callable[[list[int], float], Stats]) -> list[Stats]:
        """Gradients of one optimiser step, summed over micro-batches and processes; statistics of each micro-batch.

        `lengths` are the padded tokens of this process's sequences, `backward(indices, weight)` adds one
        micro-batch's gradient.
        """

        def attempt(budget: int) -> list[Stats]:
            self.optimiser.zero_grad(set_to_none=True)
            groups = pack(lengths, budget)
            # With split weights every pass is collective: processes with fewer of them keep the others company, at
            # weight zero.
            idle = int(self.ranks.most(len(groups))) - len(groups) if self.ranks.sharded else 0
            stats = [self._absorbed(backward(group, 1.0)) for group in groups]
            for _ in range(idle):
                self._absorbed(backward([min(range(len(lengths)), key=lengths.__getitem__)], 0.0))
            return stats

        stats = self.budget.spend(attempt, max(lengths, default=0))
        self.ranks.sum_gradients(list(self.weights.values()))
        return stats

    def step(self) -> list[Tensor]:
        """Clip actor and critic apart (the critic's scale must not throttle the actor), step, and return both norms.

        A norm that is not finite means that no step was taken.
        """
        norms = []
        for group in self.optimiser.param_groups:
            norms.append(self.ranks.full(nn.utils.clip_grad_norm_(group["params"], self.config.gradient_clip)))
        if all(bool(torch.isfinite(norm)) for norm in norms):
            self.optimiser.step()
            self.publish()
        self.optimiser.zero_grad(set_to_none=True)
        return norms

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        for parameter, master in self._mastered:
            parameter.copy_(master)

    @torch.no_grad()
    def _absorbed(self, stats: Stats) -> Stats:
        for parameter, master in self._mastered:
            if parameter.grad is not None:
                master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                parameter.grad = None
        return stats
