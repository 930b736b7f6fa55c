"""Parallel averaging of RL and SFT: both update the same weights, and the mean of the two goes on.

Our reading of arXiv 2606.04272 (a rival of the residue merge: nothing is merged afterwards): at every optimiser step
w <- (w_RL + w_SFT) / 2, where each side steps from w by its own gradient with an Adam state of its own. The critic
belongs to RL alone. The examples are spread over the steps of the whole training, each is seen once; the learning rate
of SFT falls linearly to zero, as the instruction model's does.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from c2f_utils.coarse.ranks import Ranks
from c2f_utils.coarse.updates import Updates
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.models.instruct import Example
from c2f_utils.models.packing import collate, pack
from c2f_utils.settings.config import Coarse

SFT = "sft:"  # before the names of its Adam moments in a checkpoint


class ParallelUpdates(Updates):
    """Optimiser steps of RL, each averaged with one of SFT on the next examples."""

    def __init__(
        self,
        policy: nn.Module,
        config: Coarse,
        ranks: Ranks,
        *,
        examples: Sequence[Example],
        learning_rate: float,
        pad_id: int,
        seed: int,
    ):
        super().__init__(policy, config, ranks)
        self.policy, self.pad_id, self.learning_rate = policy, pad_id, learning_rate
        self.steps = config.iterations * config.epochs * config.minibatches
        self.examples = [Sample(Prompt(tuple(prompt), ""), list(answer), "eos", 0) for prompt, answer in examples]
        random.Random(f"parallel-{seed}").shuffle(self.examples)
        self.taken = 0
        self.trained = {name: w for name, w in self.weights.items() if not name.startswith("critic.")}
        self.sft = torch.optim.AdamW(list(self.trained.values()), lr=learning_rate, weight_decay=0.0, fused=True)

    @property
    def sft_tokens(self) -> int:
        """Tokens trained on so far, prompts included."""
        return sum(example.positions for example in self.examples[: self._end(self.taken)])

    def step(self) -> list[Tensor]:
        """One step of RL and one of SFT from the same weights, then their mean; returns the norms of RL's gradients."""
        before = {name: w.detach().clone() for name, w in self.trained.items()}
        norms = super().step()
        by_rl = {name: w.detach().clone() for name, w in self.trained.items()}
        self._assign(before)
        self._learn(self.examples[self._end(self.taken) : self._end(self.taken + 1)])
        self.taken += 1
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.lerp_(by_rl[name], 0.5)
        self.publish()
        return norms

    def moments(self) -> dict[str, Tensor]:
        found = {
            f"{SFT}{name}/{key}": value.detach()
            for name, weight in self.trained.items()
            for key, value in self.sft.state.get(weight, {}).items()
        }
        return super().moments() | found

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor], where: object) -> None:
        by_rl = {key: value for key, value in moments.items() if not key.startswith(SFT)}
        super().load(weights, by_rl, where)
        for key in moments.keys() - by_rl.keys():
            name, _, what = key.removeprefix(SFT).rpartition("/")
            self.sft.state[self.trained[name]][what] = moments[key].to(self.trained[name].device)
        # The critic learns in every step, the actor not while it warms up.
        self.taken = int(max((value for key, value in by_rl.items() if key.endswith("/step")), default=0))

    def _end(self, steps: int) -> int:
        """Examples that so many steps have seen."""
        return len(self.examples) * min(steps, self.steps) // self.steps

    def _learn(self, examples: Sequence[Sample]) -> None:
        """One step of Adam on the mean loss over the answer tokens of these examples, if there are any."""
        tokens, device = sum(s.tokens for s in examples), next(iter(self.trained.values())).device
        for group in pack([s.positions for s in examples], self.config.tokens_per_micro_batch):
            batch = collate([examples[i] for i in group], self.pad_id, device)
            logps = self.policy.head.distribution(self.policy.actor, batch).gather(-1, batch.targets[:, None])
            self.backward(-logps.sum() / tokens)
        nn.utils.clip_grad_norm_(self.trained.values(), self.config.gradient_clip)
        self.sft.param_groups[0]["lr"] = self.learning_rate * (1 - self.taken / self.steps)
        self.sft.step()
        self.clear()

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, weight in self.trained.items():
            weight.copy_(values[name])
        self.publish()
