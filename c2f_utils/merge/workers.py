"""A few threads that share nothing but files: ordered results, bounded look-ahead, one workspace each."""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from c2f_utils.merge.readers import Workspace

_KEPT = 16 << 20  # bytes of freed memory a thread may keep

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Run `function(item, workspace)` over items; with one thread, in the caller's.

    Inside the `with` block torch itself uses one thread: the parallelism is over chunks, and its own would only
    contend for the same cores. The caller's setting returns afterwards.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._spaces: queue.SimpleQueue[Workspace] = queue.SimpleQueue()
        for _ in range(threads):
            self._spaces.put(Workspace())
        self._pool: ThreadPoolExecutor | None = None
        self._torch_threads = 1

    def __enter__(self) -> "Workers":
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # glibc's malloc hands memory back to the system as soon as a few blocks are free, and every temporary then
        # costs page faults anew; freeing one large buffer teaches it to keep up to twice that size per thread.
        np.empty(_KEPT // 2, dtype=np.uint8)
        if self.threads > 1:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="merge")
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def map(self, function: Callable[[Item, Workspace], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield results in the items' order; items are taken only a few ahead, so a generator of them stays lazy."""
        if self._pool is None:
            for item in items:
                yield self._call(function, item)
            return
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(self._pool.submit(self._call, function, item))
            if len(waiting) > 2 * self.threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _call(self, function: Callable[[Item, Workspace], Result], item: Item) -> Result:
        space = self._spaces.get()
        try:
            return function(item, space)
        finally:
            self._spaces.put(space)
