"""Models that are not held in memory: tensors read from a checkpoint, or made, when they are asked for.

Notebook 06 merges three models again and again while two others, the merge and the reward model, are at work. Held
as well, the three would be most of its memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache

from torch import Tensor

from c2f_utils.errors import problems
from c2f_utils.merge.aligned import align_all, open_inputs
from c2f_utils.merge.readers import Files, Loaded, Opened, Source, Workspace
from c2f_utils.merge.recipe import Recipe


class Lazy(Mapping[str, Tensor]):
    """A state dict whose tensors are made when they are asked for; the last two are kept."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), lru_cache(maxsize=2)(make)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)


class Stored(Lazy):
    """A checkpoint as a state dict, and ranges of its tensors; what an adapter changes is the base's plus the change,
    in float32."""

    def __init__(self, sources: Mapping[str, Source], files: Files) -> None:
        super().__init__(sources, self._whole)
        self.sources, self.files = sources, files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.sources[name].info.shape)

    def ordered(self, names: Iterable[str]) -> "Stored":
        """The same with its tensors in the order of `names`, which must hold them all: files sort them otherwise."""
        return Stored({name: self.sources[name] for name in names if name in self.sources}, self.files)

    def _whole(self, name: str) -> Tensor:
        source = self.sources[name]
        found = Opened({"": source}, self.files).load(0, source.info.numel, Workspace())
        values = found.raw[""].float() + found.deltas[""] if source.delta else found.raw[""]
        return values.view(source.info.shape)


class Held:
    """One tensor of every model, stored or in memory, with the stream's reading interface."""

    def __init__(self, name: str, models: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.name, self.models = name, models
        stored = {role: model for role, model in models.items() if isinstance(model, Stored)}
        files = next((model.files for model in stored.values()), Files())
        self.stored = Opened({role: model.sources[name] for role, model in stored.items()}, files)

    def load(self, start: int, stop: int, workspace: Workspace, roles: tuple[str, ...] | None = None) -> Loaded:
        """Elements start .. stop of the models named (default all), on the CPU."""
        wanted = roles or tuple(self.models)
        stored = tuple(role for role in wanted if role in self.stored.models)
        found = self.stored.load(start, stop, workspace, stored) if stored else Loaded(start, {}, {})
        for role in wanted:
            if role not in stored:
                found.raw[role] = self.models[role][self.name].detach().reshape(-1)[start:stop].cpu()
        return found


def open_stored(recipe: Recipe) -> dict[str, Stored]:
    """The recipe's models by role (instruct, base, coarse.0, ...) under instruct's names.

    Raises C2FError with everything that headers and configurations show to be wrong, as a plan does.
    """
    found: list[str] = []
    models = open_inputs(recipe, found, [], {}, {})
    aligned = {} if found else align_all(models, recipe.ignore, [], found, [])
    if found:
        raise problems("the models cannot be merged:", found)
    files = Files()
    return {
        role: Stored({name: sources[name] for name in aligned["instruct"]}, files) for role, sources in aligned.items()
    }
