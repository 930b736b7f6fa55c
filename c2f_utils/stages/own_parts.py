"""Laws, rewards and merge operators of the user's own: what tells one from another, recorded with the stage.

No setting names an object that a notebook cell made. So its source and what it was made with are inputs of the stage:
the same again is loaded, another one is refused or, with `overwrite`, set aside.
"""

import inspect
import re

from torch import nn

from c2f_utils import limits
from c2f_utils.errors import C2FError, short
from c2f_utils.runs import provenance
from c2f_utils.runs.registry import OF_SETTINGS
from c2f_utils.runs.stage import Stage


def record(here: Stage, **parts: object) -> None:
    """Make each object (None: that of the settings) an input of the stage under its name; raises C2FError where the
    stage was begun with another one."""
    for name, own in parts.items():
        here.add_input(name, provenance.fingerprint(identity(own)), _in_words(own))


def refuse(law: object, reward: object) -> None:
    """Raise C2FError for what can be no law or no reward; None is that of the settings."""
    if law is not None and not isinstance(law, limits.Law):
        raise C2FError(f"law = {short(law)}; expected an object of a class of limits.Law, as Doubling(8) is, or None")
    if reward is not None and not callable(reward):
        raise C2FError(f"reward = {short(reward)}; expected a function from samples to one reward each, or None")


def identity(own: object) -> dict[str, str]:
    """What tells one object of the user's from another: its source, and for an object what it was made with."""
    if own is None:
        return OF_SETTINGS
    return {"source": _source(own), "state": _plain(sorted(_state(own).items()))}


def _in_words(own: object) -> str:
    """The object's name and what it was made with, for a message; two with the same words differ in their code."""
    if own is None:
        return "that of the settings"
    name = own.__qualname__ if inspect.isroutine(own) else type(own).__qualname__
    made = ", ".join(f"{key}={_plain(value):.40}" for key, value in _state(own).items())
    code = provenance.fingerprint(_source(own))[:4]
    return f"{name}({made}), code {code}" if made else f"{name}, code {code}"


def _state(own: object) -> dict[str, object]:
    """What an object was made with; weights are left out, they would cost more to read than they tell."""
    if isinstance(own, nn.Module) or inspect.isroutine(own):
        return {}
    return own.state_dict() if hasattr(own, "state_dict") else dict(getattr(own, "__dict__", {}))


def _source(thing: object) -> str:
    """Source text of a function, or of an object's class: its methods and plain attributes, inherited ones too.

    `inspect.getsource` finds functions typed in a notebook, but no class: a kernel's `__main__` has no file.
    """
    if inspect.isroutine(thing):
        return _code(thing)
    parts = []
    for kind in type(thing).__mro__:
        if kind in (object, limits.Law, nn.Module):
            continue
        parts.append(kind.__qualname__)
        for name, value in vars(kind).items():
            if isinstance(value, property):
                parts += [_code(part) for part in (value.fget, value.fset) if part]
            elif callable(found := getattr(value, "__func__", getattr(value, "func", value))):
                parts.append(f"{name}: {_code(found)}")
            elif not name.startswith("__") and isinstance(value, _PLAIN):
                parts.append(f"{name} = {_plain(value)}")
    return "\n".join(parts)


_PLAIN = str | int | float | bool | None | tuple | list | dict


def _code(function: object) -> str:
    """Source text of a function; its instructions and constants where none is kept, else its name."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return f"{code.co_code.hex()} {code.co_names} {_plain(code.co_consts)}" if code else _plain(function)


def _plain(value: object) -> str:
    """`repr` without the addresses and places that change from one session to the next."""
    return re.sub(r" at 0x[0-9a-f]+|, file \".*?\", line \d+", "", repr(value))
