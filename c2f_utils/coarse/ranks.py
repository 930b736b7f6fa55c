"""What several training processes have to agree on, in one room; with a single process every method does nothing.

Two ways to spread a model, chosen by the launch configuration (`launch/*.yaml`). Replicated (DDP's arithmetic, meant
for LoRA): every process holds the weights, and gradients are summed once per optimiser step, after the last
micro-batch. No hook fires in between, so the processes need not have the same number of micro-batches and one that
ran out of memory can redo its part. Sharded (FSDP2, for full fine-tuning): weights, gradients and Adam moments are
split; `whole` gathers the weights once for decoding and scoring. There every forward is collective: the processes
agree on the number of micro-batches and fill up with ones of weight zero. Simplified: decoding needs the gathered
model (and its frozen reference) to fit each device.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from c2f_utils.errors import C2FError
from c2f_utils.rollout.anatomy import layers_of, trunk_of

T = TypeVar("T")
BUCKET = 1 << 26  # gradient elements of one all-reduce


class Ranks:
    """A single process; also the interface of several (`Processes`)."""

    rank, world, sharded = 0, 1, False

    def deal(self, items: Sequence[T]) -> list[T]:
        """This process's share of a list that all of them hold: every `world`-th item."""
        return list(items[self.rank :: self.world])

    def gather(self, rows: list[Tensor]) -> list[Tensor]:
        """The inverse of `deal` for 1-D tensors of any length (CPU): the rows of all processes in the order of the
        undealt list.
        """
        return rows

    def passes(self, groups: list[list[int]], lengths: Sequence[int]) -> list[tuple[list[int], float]]:
        """This process's micro-batches with their weights, all 1.

        With split weights every pass is collective: processes with fewer groups keep the others company, with their
        shortest sequence (of `lengths`, tokens) at weight 0.
        """
        return [(group, 1.0) for group in groups]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on some process."""
        return flag

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes, same shape."""
        return values

    def most(self, value: float) -> float:
        """The largest value of any process."""
        return value

    def agree(self, value: float, what: str) -> None:
        """Raise C2FError, everywhere, unless every process has the same value."""

    def start_equal(self, policy: nn.Module) -> None:
        """Give every process the weights of the first one, and split them where the launch configuration says so."""

    def whole(self, policy: nn.Module):
        """A context in which every process sees full weights."""
        return _nothing()

    def plain(self, model: nn.Module, fresh: Callable[[], nn.Module]) -> nn.Module:
        """The model as an ordinary one: itself, or where it is split a `fresh` one with its weights (first process;
        every one asks).
        """
        return model

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their sums over processes; a parameter without a gradient anywhere keeps none."""

    def full(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor that may be split; every process must ask."""
        return tensor

    def assign(self, parameter: Tensor, value: Tensor) -> None:
        """Copy a whole value into a tensor that may be split."""
        parameter.copy_(value)

    def like(self, value: Tensor, parameter: Tensor) -> Tensor:
        """A whole value, laid out over devices and processes as the parameter is."""
        return value.to(parameter.device)

    def wait(self) -> None:
        """Return when every process has come here."""


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class Processes(Ranks):
    """Several processes started by `accelerate launch`; gloo on CPUs, NCCL on GPUs."""

    def __init__(self, sharded: bool = False):
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        self.rank, self.world, self.device, self.sharded = (
            state.process_index,
            state.num_processes,
            state.device,
            sharded,
        )

    def _all(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of equal shape, on the CPU."""
        mine = tensor.to(self.device).contiguous()
        found = [torch.empty_like(mine) for _ in range(self.world)]
        torch.distributed.all_gather(found, mine)
        return [t.cpu() for t in found]

    def _reduced(self, tensor: Tensor, how: str) -> Tensor:
        moved = tensor.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(moved, getattr(torch.distributed.ReduceOp, how))
        return moved.to(tensor.device)

    def gather(self, rows: list[Tensor]) -> list[Tensor]:
        sizes = torch.stack(self._all(torch.tensor([len(rows), sum(map(len, rows))])))
        most, longest = sizes.max(0).values.tolist()
        lengths = self._all(_padded(torch.tensor([len(row) for row in rows]), most))
        flat = self._all(_padded(torch.cat(rows), longest))
        # Boolean slices, not `split(lengths)` alone: the padding behind a process's rows is not theirs.
        parts = [
            f[:total].split(n[:count].tolist())
            for f, n, (count, total) in zip(flat, lengths, sizes.tolist(), strict=True)
        ]
        return [parts[i % self.world][i // self.world] for i in range(int(sizes[:, 0].sum()))]

    def passes(self, groups: list[list[int]], lengths: Sequence[int]) -> list[tuple[list[int], float]]:
        idle = int(self.most(len(groups))) - len(groups) if self.sharded else 0
        company = [([min(range(len(lengths)), key=lengths.__getitem__)], 0.0)] * idle
        return [*((group, 1.0) for group in groups), *company]

    def any(self, flag: bool) -> bool:
        return bool(self._reduced(torch.tensor(int(flag)), "MAX"))

    def sum(self, values: Tensor) -> Tensor:
        return self._reduced(values, "SUM")

    def most(self, value: float) -> float:
        return float(self._reduced(torch.tensor(value, dtype=torch.float64), "MAX"))

    def agree(self, value: float, what: str) -> None:
        found = [float(v) for v in self._all(torch.tensor([value], dtype=torch.float64))]
        if any(v != found[0] for v in found):
            raise C2FError(
                f"{what} differs between processes ({found}); "
                "it must be a function of what all of them see, without random numbers of its own"
            )

    def start_equal(self, policy: nn.Module) -> None:
        for tensor in (*policy.parameters(), *policy.buffers()):
            moved = tensor.detach().to(self.device)
            torch.distributed.broadcast(moved, 0)
            tensor.data.copy_(moved)
        if self.sharded:
            _shard(policy)

    @contextmanager
    def whole(self, policy: nn.Module) -> Iterator[None]:
        if not self.sharded:
            yield
            return
        modules = [m for m in policy.modules() if hasattr(m, "unshard")]
        policy.set_reshard_after_forward(
            False
        )  # or each forward would split the weights again and the next one wait for all
        for module in modules:
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
            policy.set_reshard_after_forward(True)

    def plain(self, model: nn.Module, fresh: Callable[[], nn.Module]) -> nn.Module:
        if not self.sharded:
            return model
        state = {name: self.full(value) for name, value in model.state_dict().items()}
        if self.rank:
            return model
        whole = fresh()
        whole.load_state_dict(state)
        return whole

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.sharded:
            return  # the backward has done it
        has = self._reduced(torch.tensor([int(p.grad is not None) for p in parameters], dtype=torch.int32), "MAX")
        bucket: list[nn.Parameter] = []
        for parameter in (p for p, h in zip(parameters, has.tolist(), strict=True) if h):
            if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
                self._sum_bucket(bucket)
                bucket = []
            bucket.append(parameter)
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, parameters: list[nn.Parameter]) -> None:
        flat = torch.cat(
            [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().float() for p in parameters]
        )
        torch.distributed.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def full(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def assign(self, parameter: Tensor, value: Tensor) -> None:
        parameter.copy_(self.like(value, parameter))

    def like(self, value: Tensor, parameter: Tensor) -> Tensor:
        if not hasattr(parameter, "device_mesh"):
            return value.to(parameter.device)
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    def wait(self) -> None:
        torch.distributed.barrier()


def _padded(row: Tensor, length: int) -> Tensor:
    return torch.cat([row, row.new_zeros(length - len(row))])


def _shard(policy: nn.Module) -> None:
    """Split every decoder layer of actor and critic, then the rest (embeddings, norms, heads) as one group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if hasattr(policy.actor, "disable_adapter"):
        raise C2FError(
            "adapters are small: nothing is won by splitting them; use the launch configuration ddp, "
            "or models.lora: null"
        )
    mesh = init_device_mesh(next(policy.parameters()).device.type, (torch.distributed.get_world_size(),))
    trunks = [trunk_of(policy.actor), policy.critic.trunk]
    for trunk in (t for t in trunks if t is not None):
        for layer in layers_of(trunk):
            fully_shard(layer, mesh=mesh)
    fully_shard(policy.critic.head, mesh=mesh)  # float32 always; a group has one type
    fully_shard(policy, mesh=mesh)
    for module in (m for m in policy.modules() if hasattr(m, "set_gradient_divide_factor")):
        # Losses are already divided by the tokens of all processes: gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def launched() -> bool:
    """Whether this process is one of several started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start() -> Ranks:
    """The processes this one belongs to; the launch configuration says whether weights are split
    (`ACCELERATE_USE_FSDP`).
    """
    if not launched():
        return Ranks()
    return Processes(os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true")
