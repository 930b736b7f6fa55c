"""A budget of padded tokens per forward/backward pass, tried before training and halved when memory runs out.

The packing changes no gradient (losses are sums over tokens divided by the step's tokens), so a step can be redone
in smaller pieces. Simplified: a budget never grows back, and split weights (FSDP2) cannot redo a step, because the
other processes are already in the middle of a collective: there only the try before training protects.
"""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

import torch
from torch import nn

from c2f_utils.coarse.ranks import Ranks
from c2f_utils.errors import C2FError
from c2f_utils.models.packing import Batch

TINY = 5_000_000_000  # parameters x tokens: below it a pass takes about a second on a CPU and no memory to speak of
_M_MMAP_THRESHOLD = -3  # malloc.h
_CPU_WORDS = ("can't allocate memory", "not enough memory", "DefaultCPUAllocator")


class Attempt:
    """A pass that may run out of memory: the context swallows that one failure and keeps its words, not the exception,
    which would keep the graph of the failed pass alive."""

    def __init__(self, tokens: int):
        self.tokens, self.failure = tokens, ""

    def __enter__(self) -> int:
        return self.tokens

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        ours = isinstance(error, torch.OutOfMemoryError | MemoryError | RuntimeError) and out_of_memory(error)
        self.failure = str(error).splitlines()[0] if ours else ""
        return ours


class TokenBudget:
    """How many padded tokens a forward/backward pass may hold at once."""

    def __init__(self, tokens: int, ranks: Ranks):
        self.tokens, self.ranks = tokens, ranks

    def attempts(self, longest: int) -> Iterator["Attempt"]:
        """One attempt, and another with half the budget while memory runs out on any process.

        Each is a context that gives the padded tokens of one pass: `with attempt as tokens:`; what stands in it must be
        able to start over. `longest` is the longest single sequence, tokens. Raises C2FError when even one sequence at
        a time is too much.
        """
        while True:
            attempt = Attempt(self.tokens)
            yield attempt
            # With split weights the others wait inside a collective of the failed pass: nobody could answer.
            failed = bool(attempt.failure) if self.ranks.sharded else self.ranks.any(bool(attempt.failure))
            if not failed:
                return
            self._shrink(longest, attempt.failure)

    def _shrink(self, longest: int, failure: str) -> None:
        advice = "lower the law's maximum, set models.gradient_checkpointing, or train adapters (models.lora)"
        if self.tokens <= longest:
            raise C2FError(f"out of memory with a single sequence of {longest} tokens ({failure}): {advice}")
        if self.ranks.sharded:
            raise C2FError(
                f"out of memory at coarse.tokens_per_micro_batch {self.tokens} with split weights ({failure}): "
                f"set it to {self.tokens // 2} and start again; or {advice}"
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.tokens //= 2
        print(
            f"out of memory: micro-batches now hold {self.tokens} tokens; the step is redone and its gradient is "
            "the same"
        )


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error) for w in _CPU_WORDS)


def preflight(policy: nn.Module, budget: TokenBudget, width: int, temperature: float, device: torch.device) -> bool:
    """One forward and backward pass with sequences of `width` tokens that fill the budget: memory runs out now or
    never.

    Returns whether it was tried; models too small to run out of anything are skipped. Gradients are dropped, no
    random number is drawn.
    """
    parameters = sum(p.numel() for p in policy.parameters())
    if device.type == "cpu" and parameters * max(width, budget.tokens) < TINY:
        return False
    if device.type == "cpu":
        _return_large_blocks()

    for attempt in budget.attempts(width):
        with attempt as tokens:
            logps, _, values = policy(_batch(max(1, tokens // width), width, device), temperature)
            (logps.sum() + values.sum()).backward()
        policy.zero_grad(set_to_none=True)
    return True


def _return_large_blocks() -> None:
    """Let glibc give blocks of 1 MiB and more back to the system as soon as they are freed; elsewhere nothing happens.

    Left alone it keeps them in its heap after a while (the threshold follows the largest block ever freed), and the
    heap is cut into pieces by micro-batches of ever new shapes: the peak would creep up as the limit moves.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _batch(rows: int, width: int, device: torch.device) -> Batch:
    """Rows of one prompt token and an answer that fills the rest: the most answer tokens a micro-batch can have."""
    answer = width - 1
    return Batch(
        ids=torch.zeros(rows, width, dtype=torch.long, device=device),
        rows=torch.arange(rows, device=device).repeat_interleave(answer),
        columns=torch.arange(answer, device=device).repeat(rows),
        targets=torch.zeros(rows * answer, dtype=torch.long, device=device),
        last=torch.full((rows,), width - 1, device=device),
        lengths=[answer] * rows,
    )
