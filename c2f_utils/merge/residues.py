"""Where the coarse residue sits: norm, sparsity, angle to the instruct residue and spectrum, tensor by tensor."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from c2f_utils.errors import problems
from c2f_utils.merge import names
from c2f_utils.merge.checkpoint import open_checkpoint
from c2f_utils.merge.kernels import BLOCK
from c2f_utils.merge.rounding import inner
from c2f_utils.weights import locate

_EXACT = 1024  # smallest side up to which all singular values are computed
_TOP = 0.1  # share of singular values whose energy is reported

Model = Mapping[str, Tensor] | str | Path


def anatomy(base: Model, instruct: Model, coarse: Model, spectrum: bool = True) -> list[dict]:
    """Describe d_C = coarse - base and d_I = instruct - base for every floating-point tensor that the three share.

    Models are state dicts or folders. Rows: tensor, layer (None outside layers), module, family, norm_coarse,
    norm_instruct, cosine (None when either is zero), sparsity (share of elements of d_C that are exactly zero),
    top_energy (share of |d_C|^2 in its largest tenth of singular values; None for vectors and zero residues,
    randomised above 1024 on the shorter side). Raises C2FError for folders that cannot be read.
    """
    sets = [
        _StateDict(model) if isinstance(model, Mapping) else _Folder(model, role)
        for role, model in (("base", base), ("instruct", instruct), ("coarse", coarse))
    ]
    rows = []
    for name in sets[1].names():
        if not all(name in one for one in sets) or names.is_buffer(name):
            continue
        parts = [one.tensor(name) for one in sets]
        if (
            not all(part.is_floating_point() for part in parts)
            or len({part.shape for part in parts}) > 1
            or not parts[0].numel()
        ):
            continue
        rows.append(_row(name, *(part.detach().float() for part in parts), spectrum))
    return rows


def _row(name: str, base: Tensor, instruct: Tensor, coarse: Tensor, spectrum: bool) -> dict:
    d_coarse, d_instruct = coarse - base, instruct - base
    cc, ii, ci = (
        _dot(left, right) for left, right in ((d_coarse, d_coarse), (d_instruct, d_instruct), (d_coarse, d_instruct))
    )
    return {
        "tensor": name,
        "layer": names.layer_of(name),
        "module": names.module_of(name),
        "family": names.family_of(name),
        "norm_coarse": math.sqrt(cc),
        "norm_instruct": math.sqrt(ii),
        "cosine": ci / math.sqrt(cc) / math.sqrt(ii) if cc > 0 and ii > 0 else None,
        "sparsity": 1.0 - int(torch.count_nonzero(d_coarse)) / d_coarse.numel(),
        "top_energy": _top_energy(d_coarse, cc) if spectrum and d_coarse.dim() == 2 and cc > 0 else None,
    }


def _dot(left: Tensor, right: Tensor) -> float:
    return math.fsum(
        inner(a, b) for a, b in zip(left.reshape(-1).split(BLOCK), right.reshape(-1).split(BLOCK), strict=True)
    )


def _top_energy(matrix: Tensor, energy: float) -> float:
    side = min(matrix.shape)
    count = max(1, round(_TOP * side))
    if side <= _EXACT:
        values = torch.linalg.svdvals(matrix)[:count]
    else:
        state = torch.random.get_rng_state()  # svd_lowrank draws from the global generator; leave it as it was
        torch.manual_seed(0)
        values = torch.svd_lowrank(matrix, q=count, niter=2)[1]
        torch.random.set_rng_state(state)
    return min(1.0, float(values.double().square().sum()) / energy)


class _StateDict:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


class _Folder:
    """Reads one tensor at a time, so that large models fit."""

    def __init__(self, source: str | Path, role: str) -> None:
        found: list[str] = []
        self._checkpoint = open_checkpoint(role, locate(str(source), role), found)
        if found:
            raise problems("the models cannot be compared:", found)

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint.tensors

    def names(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def tensor(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._checkpoint.tensors[name].file, "pt") as handle:
            return handle.get_tensor(name)
