"""How many threads torch should use here, measured rather than guessed.

Question: are two or more threads faster than one on this machine, now? Small models spend their time in short
parallel regions; on a busy machine every region waits for its slowest thread, so two threads can be ten times slower
than one. Floating-point sums depend on the count, so a stage records it in `config.json` and keeps it when it is
continued.
"""

import os
import statistics
import time

from c2f_utils.errors import C2FError, short

MOST = 1024
GAIN = 1.15  # more threads must be at least this much faster than one: they also take the machine from others


def available() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def requested() -> int | None:
    """The count asked for by `C2F_THREADS`, or None; raises C2FError unless it is a positive whole number."""
    text = os.environ.get("C2F_THREADS", "").strip()
    if not text:
        return None
    if not text.isdecimal() or len(text) > 9:
        raise C2FError(f"C2F_THREADS is {short(text)}; expected a positive whole number; unset it to measure")
    return checked(int(text), "C2F_THREADS =")


def checked(count: int, what: str) -> int:
    """The count, if a machine may have as many threads; else C2FError that begins with `what`."""
    if not 1 <= count <= MOST:
        raise C2FError(f"{what} {short(count)}; expected a whole number from 1 to {MOST}")
    return count


def choose(seconds: dict[int, float]) -> int:
    """The fastest count, but 1 unless it wins by `GAIN`; `seconds` maps each count to the time of equal work."""
    fastest = min(seconds, key=lambda count: (seconds[count], count))
    return fastest if seconds[1] >= GAIN * seconds[fastest] else 1


def probe(budget: float = 1.0) -> int:
    """Time small training steps at 1, 2, 4, ... threads for about `budget` seconds; sets and returns the best count.

    The candidates take turns, so that a passing load on the machine meets all of them.
    """
    import torch

    candidates = [count for count in (2**power for power in range(8)) if count <= available()]
    if len(candidates) == 1:
        return apply(1)
    generator = torch.Generator().manual_seed(0)  # the global generator belongs to the experiment
    inputs = torch.randn(1024, 64, generator=generator)
    first = torch.randn(64, 160, generator=generator).requires_grad_()
    second = torch.randn(160, 64, generator=generator).requires_grad_()

    def step() -> None:
        loss = (torch.nn.functional.silu(inputs @ first) @ second).square().mean()
        torch.autograd.grad(loss, (first, second))

    seconds: dict[int, list[float]] = {count: [] for count in candidates}
    deadline = time.perf_counter() + budget
    while time.perf_counter() < deadline or min(map(len, seconds.values())) < 3:
        for count in candidates:
            torch.set_num_threads(count)
            step()  # wakes the pool; not timed
            start = time.perf_counter()
            for _ in range(5):
                step()
            seconds[count].append(time.perf_counter() - start)
    # The mean, not the median: rare long waits at a barrier are the very thing to avoid.
    return apply(choose({count: statistics.fmean(times) for count, times in seconds.items()}))


def apply(count: int) -> int:
    """Set torch's threads (and, for child processes, OMP_NUM_THREADS) to `count`; returns it."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    import torch

    torch.set_num_threads(count)
    return count
