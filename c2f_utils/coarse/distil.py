"""On-policy distillation of the Coarse Actor into the instruction model, a rival of the residue merge.

The student answers, and at every token of its own answers the reverse KL to a teacher is made smaller: KL(student ||
teacher) = sum over words v of p(v) (log p(v) - log q(v)), exact over the vocabulary, as in generalised knowledge
distillation (Agarwal et al., arXiv 2306.13649). Two teachers share the grading, our reading of multi-teacher
distillation (arXiv 2606.30406): the Coarse Actor up to and with the first sentence that states a result, from there on
the model that the student started as. A Coarse Actor that never ends must not grade the end, or answers only grow.

Left out: no gradient through the sampling, and as in PPO an answer is learnt from in several steps.
"""

import torch
from torch import Tensor, nn

from c2f_utils.coarse import ppo
from c2f_utils.coarse.experience import Experience
from c2f_utils.coarse.trainer import LOGGED, CoarseTrainer
from c2f_utils.domain import stated
from c2f_utils.domain.samples import Sample
from c2f_utils.errors import C2FError
from c2f_utils.models.packing import collate


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) [N] in nats, of log-probabilities [N, V]; the gradient is that of the student."""
    return (student.exp() * (student - teacher)).sum(-1)


def graded_by_coarse(sample: Sample) -> int:
    """How many of an answer's first tokens the Coarse Actor grades: all where no result is stated."""
    return next(iter(stated.ends(sample.prompt.problem, sample.sampled)), len(sample.sampled))


class Distillation(CoarseTrainer):
    """The trainer's loop with another loss: `teacher` is the Coarse Actor, the policy's reference the second teacher.

    Reward, critic and price of KL play no part. Raises C2FError for prompts without a problem, where nobody knows
    which sentence states a result.
    """

    def __init__(self, *given, teacher: nn.Module, **named):
        super().__init__(*given, **named)
        self.teacher = teacher.requires_grad_(False)
        if any(prompt.problem is None for prompt in self.prompts):
            raise C2FError(
                "on-policy distillation needs problems of the embedded domain: elsewhere nobody knows where an answer "
                "states its result; take 'distilled' and 'distilled_merge' out of merge.controls"
            )

    def judge(self, e: Experience) -> Experience:
        """Nothing is rewarded; the mask [B, T] says which tokens there are, and all of them teach."""
        e.mask = e.trained = ppo.token_mask([len(s.sampled) for s in e.samples])
        return e

    def credit(self, e: Experience) -> Experience:
        return e

    def loss(self, e: Experience, group: list[int], step_tokens: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Reverse KL of one micro-batch, a mean over the tokens of its whole optimiser step."""
        samples, temperature = [e.samples[i] for i in group], self.config.temperature
        batch = collate(samples, self.pad_id, self.device, sampled=True)
        head = self.policy.head
        with torch.no_grad():
            teacher = head.distribution(self.teacher, batch, temperature)
            with self.policy.reference() as own:
                later = head.distribution(own, batch, temperature)
        first = torch.cat([torch.arange(len(s.sampled)) < graded_by_coarse(s) for s in samples]).to(self.device)
        student = head.distribution(self.policy.actor, batch, temperature)
        loss = reverse_kl(student, torch.where(first[:, None], teacher, later)).sum() / step_tokens
        if not torch.isfinite(loss):
            self._refuse_non_finite(loss, "loss", e.samples, group)
        zero = torch.zeros((), device=self.device)
        return loss, dict.fromkeys(LOGGED, zero) | {"policy_loss": loss.detach(), "ratio_error": 0.0}

    def advance(self, e: Experience, stats: dict[str, float]) -> dict:
        """Keep in one row what this iteration was; the limit stays."""
        self.rollout_tokens += int(e.mask.sum())
        self.iteration += 1
        count = len(e.samples)
        row = {
            "iteration": self.iteration,
            "limit": self.law.limit,
            "rollout_tokens": self.rollout_tokens,
            "mean_tokens": sum(s.tokens for s in e.samples) / count,
            "truncated_share": sum(s.cut for s in e.samples) / count,
            "graded_by_coarse": sum(map(graded_by_coarse, e.samples)) / int(e.mask.sum()),
            "reverse_kl": stats["policy_loss"],
        }
        self.history.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
        return self.history[-1]
