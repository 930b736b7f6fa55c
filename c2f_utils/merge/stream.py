"""Run a plan in chunks: memory depends on the chunk alone, and a single rename is the commit.

Output files are laid out from their headers first, so every chunk has its place and any thread may write it. Work is
journalled in spans of a tensor; a killed merge continues after its last span. Until the final rename everything lies
in `<out>.partial-<key>`.
"""

import errno
import hashlib
import json
import os
import shutil
import struct
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from c2f_utils import files as small_files
from c2f_utils import threads as cores
from c2f_utils.errors import C2FError, problems
from c2f_utils.merge import gather, ranges
from c2f_utils.merge.checkpoint import stamp
from c2f_utils.merge.companions import content
from c2f_utils.merge.compute import Done, Task, merge_chunk
from c2f_utils.merge.headers import ITEM_BYTES, Same, read_header
from c2f_utils.merge.journal import Journal
from c2f_utils.merge.kernels import BLOCK
from c2f_utils.merge.merge_report import (
    REPORT,
    Report,
    build_report,
    decode_statistics,
    encode_statistics,
    load_report,
    model_card,
)
from c2f_utils.merge.plan import Placement, Plan, Segment
from c2f_utils.merge.readers import Files, Opened, Workspace
from c2f_utils.merge.rounding import Tally
from c2f_utils.merge.workers import Workers
from c2f_utils.weights import INDEX

SPAN = 1 << 24  # elements per journal line; fixed, because a resumed merge may use another chunk size
_FLUSH_EVERY = 1 << 28  # bytes written between two flushes


def run_merge(
    plan: Plan, out_dir: Path | str, chunk_mib: float = 4, resume: bool = True, threads: int | None = None
) -> Report:
    """Merge into `out_dir`, or return the report of the same merge finished there.

    The folder must not exist or be empty. `chunk_mib` is MiB per buffer, `threads` the number of workers (default
    `C2F_THREADS`, else 2); neither changes a byte. Raises C2FError for a plan with problems, inputs changed since
    planning, NaN or infinity in any input, an overflow of the output dtype, a full disk (then the partial folder
    stays for resuming), and an output folder that holds something else.
    """
    out_dir = Path(out_dir).absolute()
    threads = (cores.requested() or min(2, cores.available())) if threads is None else threads
    _refuse_bad_call(plan, out_dir, chunk_mib, threads)
    if (out_dir / REPORT).exists():
        report = load_report(out_dir)
        if report.key != plan.key:
            raise C2FError(f"{out_dir} holds another merge; choose another folder, or remove it first")
        Path(f"{_partial(plan, out_dir)}.jsonl").unlink(missing_ok=True)  # left when a kill came just after the commit
        return report
    if out_dir.exists() and any(out_dir.iterdir()):
        raise C2FError(
            f"{out_dir} is not empty; choose another folder, because mixing old and new files would damage both"
        )
    _check_stamps(plan)
    partial = _partial(plan, out_dir)
    if partial.is_symlink():
        raise C2FError(f"{partial} is a link, and nothing is written through it; remove it")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(Path(f"{partial}.jsonl"), plan.key, fresh=not resume or not partial.is_dir())
    except OSError as error:
        raise C2FError(f"{out_dir.parent}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        report = _Merge(plan, out_dir, partial, journal, chunk_mib, threads).run()
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else error.strerror
        raise C2FError(
            f"{partial}: {what} while writing {plan.bytes_written} bytes; mend that and run again to resume"
        ) from error
    except Exception as error:
        if isinstance(error.__cause__, OSError):  # a small file found the disk full: the weights are kept for resuming
            raise
        # Bad input or a defect in an operator: nothing here can be resumed, so nothing is left behind.
        shutil.rmtree(partial, ignore_errors=True)
        journal.remove()
        raise
    finally:
        journal.close()
    return report


def _partial(plan: Plan, out_dir: Path) -> Path:
    """Beside the output, so that the final rename never crosses file systems."""
    return out_dir.with_name(f"{out_dir.name}.partial-{plan.key[:12]}")


def _refuse_bad_call(plan: Plan, out_dir: Path, chunk_mib: float, threads: int) -> None:
    found = list(plan.problems)
    if not 0.25 <= chunk_mib <= 1024:
        found.append(f"chunk_mib is {chunk_mib}, expected 0.25 to 1024")
    if threads < 1:
        found.append(f"threads is {threads}, expected 1 or more")
    if out_dir.exists() and not out_dir.is_dir():
        found.append(f"{out_dir} is a file; choose another folder")
    if found:
        raise problems("the merge cannot run:", found)


def _check_stamps(plan: Plan) -> None:
    changed = [
        f"{path} changed since the plan was made"
        for label, path in plan.stamped.items()
        if not path.exists() or stamp(path, read_header(path).digest) != plan.stamps[label]
    ]
    if changed:
        raise problems("the inputs are not those of the plan; plan again:", changed)


class _Merge:
    """State of one run: the open files and what the journal already holds."""

    def __init__(
        self, plan: Plan, out_dir: Path, partial: Path, journal: Journal, chunk_mib: float, threads: int
    ) -> None:
        self.plan, self.out_dir, self.partial, self.journal = plan, out_dir, partial, journal
        # in elements; 4 bytes is the widest common float
        self.chunk = max(BLOCK, int(chunk_mib * 2**20 / 4) // BLOCK * BLOCK)
        self.threads = threads
        self.spans: dict[tuple[str, int], dict] = {}
        self.statistics: dict[str, dict] = {}
        self.outputs: dict[str, int] = {}

    def run(self) -> Report:
        started = time.perf_counter()
        resumed = bool(self.journal.lines)
        for line in self.journal.lines:
            if "statistics" in line:
                self.statistics[line["statistics"]] = line["values"]
            elif "span" in line:
                self.spans[tuple(line["span"][:2])] = line
        if not resumed:
            self._create()
        with Files() as inputs, Workers(self.threads) as workers:
            try:
                for file in self.plan.files:
                    self.outputs[file.name] = os.open(self.partial / file.name, os.O_RDWR | os.O_NOFOLLOW)
                self._recheck(workers)
                self._check_equal(inputs, workers)
                with Flusher() as flusher:
                    self._merge_all(inputs, workers, flusher)
                for handle in self.outputs.values():
                    os.fsync(handle)
            finally:
                for handle in self.outputs.values():
                    os.close(handle)
        _check_stamps(self.plan)
        report = self._commit()
        report.seconds, report.resumed = time.perf_counter() - started, resumed
        report.bytes_read, report.bytes_written = self.plan.bytes_read, self.plan.bytes_written
        return report

    def _create(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        free = shutil.disk_usage(self.partial.parent).free
        if free < self.plan.bytes_written:
            raise C2FError(
                f"{self.partial.parent}: the merge needs {self.plan.bytes_written} bytes, {free} are free; "
                f"free space or choose another disk"
            )
        self.partial.mkdir()
        for file in self.plan.files:
            with open(self.partial / file.name, "wb") as handle:
                handle.write(file.header)
                handle.flush()
                try:
                    os.posix_fallocate(handle.fileno(), 0, file.nbytes)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
                    os.ftruncate(handle.fileno(), file.nbytes)
        self.journal.begin(self.plan.key)

    def _recheck(self, workers: Workers) -> None:
        """Forget spans whose bytes are not those the journal promises."""
        by_name = {placement.name: placement for placement in self.plan.placements}

        def intact(line: dict, workspace: Workspace) -> bool:
            name, start, stop = line["span"]
            placement = by_name[name]
            size = ITEM_BYTES[placement.dtype]
            checks = []
            for low, high in ranges.blocks(start, stop):
                view = workspace.bytes("recheck", (high - low) * size)
                os.preadv(self.outputs[placement.file], [view], placement.offset + low * size)
                checks.append(zlib.crc32(view))
            return _digest(checks) == line["check"]

        lines = list(self.spans.values())
        for line, good in zip(lines, workers.map(intact, lines), strict=True):
            if not good:
                del self.spans[tuple(line["span"][:2])]

    def _check_equal(self, inputs: Files, workers: Workers) -> None:
        """Constants and heads stored twice must be what the plan took them for."""

        def compare(item: tuple[Same, int, int], workspace: Workspace) -> bool:
            same, start, stop = item
            parts = []
            for side in (same.left, same.right):
                buffer = workspace.bytes(("same", len(parts)), (stop - start) * ITEM_BYTES[side.dtype])
                parts.append(inputs.read(side, start, stop, buffer))
            return bool(np.array_equal(*parts))

        items = [
            (same, low, high) for same in self.plan.equal for low, high in ranges.chunks(0, same.left.numel, self.chunk)
        ]
        for (same, _, _), equal in zip(items, workers.map(compare, items), strict=True):
            if not equal:
                left, right = same.left, same.right
                raise C2FError(
                    f"{left.file}: {left.name!r} differs from {right.name!r} of {right.file}, but both must be equal; "
                    f"{same.remedy}"
                )

    def _merge_all(self, inputs: Files, workers: Workers, flusher: "Flusher") -> None:
        operator, options = self.plan.operator, self.plan.options
        opened = {placement.name: Opened(placement.sources, inputs) for placement in self.plan.placements}
        targets = {p.name: ranges.Target(p.name, opened[p.name], p.merged) for p in self.plan.placements if p.merged}
        if operator.statistics and options.get("scope") == "global" and targets:
            if "*" not in self.statistics:
                self._gather("*", list(targets.values()), workers)

        def chunk(task: Task, workspace: Workspace) -> Done:
            return merge_chunk(self.plan, task, self.outputs, workspace)

        waiting: deque[Task] = deque()
        rows, checks = [], []
        for done in workers.map(chunk, self._tasks(opened, targets, workers, waiting)):
            task = waiting.popleft()
            flusher.wrote(
                self.outputs[task.placement.file], (task.stop - task.start) * ITEM_BYTES[task.placement.dtype]
            )
            rows += done.rows
            checks += done.checks
            span_end = min(task.segment.stop, (task.start // SPAN + 1) * SPAN)
            if task.stop == span_end or task.placement.rank_two:
                start = 0 if task.placement.rank_two else max(task.segment.start, task.start // SPAN * SPAN)
                line = {
                    "span": [task.placement.name, start, task.stop],
                    "check": _digest(checks),
                    "tally": list(Tally.total(rows).row),
                }
                self.journal.append(line)
                self.spans[task.placement.name, start] = line
                rows, checks = [], []

    def _gather(self, name: str, targets: list[ranges.Target], workers: Workers) -> None:
        recipe = self.plan.recipe
        found = gather.gather(
            self.plan.operator, self.plan.options, targets, len(recipe.coarse_models), recipe.seed, self.chunk, workers
        )
        self.statistics[name] = encode_statistics(found[0])
        self.journal.append({"statistics": name, "values": self.statistics[name]})

    def _tasks(self, opened: dict, targets: dict, workers: Workers, waiting: deque[Task]) -> Iterator[Task]:
        """Yield the chunks still to do, tensor by tensor, each tensor's statistics just before its first chunk."""
        for placement in self.plan.placements:
            stats = None
            for segment in placement.segments:
                for start, stop in _spans(placement, segment):
                    if (placement.name, start) in self.spans:
                        continue
                    if segment.kind == "merge" and self.plan.operator.statistics and stats is None:
                        if "*" not in self.statistics and placement.name not in self.statistics:
                            self._gather(placement.name, [targets[placement.name]], workers)
                        stats = decode_statistics(self.statistics.get(placement.name) or self.statistics["*"])
                    for low, high in [(start, stop)] if placement.rank_two else ranges.chunks(start, stop, self.chunk):
                        task = Task(placement, segment, opened[placement.name], stats, low, high)
                        waiting.append(task)
                        yield task

    def _commit(self) -> Report:
        """Write the small files, flush, and make the folder appear under its final name in one step."""
        tallies = {}
        digest = hashlib.sha256()
        for placement in self.plan.placements:
            lines = [self.spans[placement.name, start] for s in placement.segments for start, _ in _spans(placement, s)]
            tallies[placement.name] = Tally.total([tuple(line["tally"]) for line in lines])
            checks = [line["check"] for line in lines]
            digest.update(json.dumps([placement.name, placement.dtype, placement.shape, checks]).encode())
        report = build_report(self.plan, self.out_dir, tallies, self.statistics, digest.hexdigest())
        for path in self.plan.copies:
            small_files.write_bytes(self.partial / path.name, content(path))
        small_files.write_json(self.partial / "config.json", self.plan.config)
        if self.plan.sharded:
            weight_map = {placement.name: placement.file for placement in self.plan.placements}
            total = sum(placement.nbytes for placement in self.plan.placements)
            small_files.write_json(self.partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        small_files.write_json(self.partial / REPORT, report.to_dict())
        small_files.write_text(self.partial / "README.md", model_card(report))
        _sync(self.partial)
        os.rename(self.partial, self.out_dir)
        _sync(self.out_dir.parent)
        self.journal.remove()
        return report


class Flusher:
    """Sends what was written to the disk while the merge goes on, on a thread of its own.

    Left to the end, the final flush takes a third to a half of what a plain copy takes. What a flush reports is raised
    at the next one or on leaving: a later flush would not report the same lost page again.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "flush")
        self._running: list[Future] = []
        self._waiting = 0

    def wrote(self, handle: int, size: int) -> None:
        """Count `size` bytes of an open file; starts a flush for every `_FLUSH_EVERY` of them."""
        self._waiting += size
        if self._waiting >= _FLUSH_EVERY:
            for flush in [flush for flush in self._running if flush.done()]:
                flush.result()
            self._running.append(self._thread.submit(os.fdatasync, handle))
            self._waiting = 0

    def __enter__(self) -> "Flusher":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for flush in self._running:
                flush.result()


def _spans(placement: Placement, segment: Segment) -> Iterator[tuple[int, int]]:
    if placement.rank_two:
        yield segment.start, segment.stop
        return
    start = segment.start
    while start < segment.stop:
        stop = min(segment.stop, (start // SPAN + 1) * SPAN)
        yield start, stop
        start = stop


def _digest(checks: list[int]) -> int:
    """One checksum for a span from those of its fixed blocks."""
    return zlib.crc32(struct.pack(f"<{len(checks)}I", *checks))


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
