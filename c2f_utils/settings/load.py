"""From a profile and overrides to checked settings: read, merged, validated, and opened (`preflight.py`)."""

import copy
from pathlib import Path
from typing import get_origin

from pydantic import ValidationError

from c2f_utils.errors import C2FError, problems, short
from c2f_utils.files import DEEPEST, read_mapping, too_deep
from c2f_utils.settings.config import PROFILES, Schedules, Settings
from c2f_utils.settings.in_words import explained


def load_settings(
    profile: str, seed: int = 0, run_id: str = "lab", overrides: dict[str, object] | None = None, study: bool = False
) -> Settings:
    """Profile, what it says of the domain that the overrides choose, then overrides (nested or dotted keys), checked
    as a whole.

    Raises C2FError listing every unknown key and every value of the wrong type, with the spelling to use; then
    everything that the files it names make impossible (`preflight.py`).
    """
    if profile not in PROFILES:
        raise C2FError(f"unknown profile {short(profile)}; expected one of {', '.join(PROFILES)}")
    values = read_mapping(Path(__file__).parent / "profiles" / f"{profile}.yaml")
    overrides = overrides or {}
    _refuse_parameters(overrides)
    priced = set(values.get("schedules", {}).get("credit", {}))
    by_domain = values.pop("domains", {})
    _merge(values, by_domain.get(_domain(overrides), {}))
    for key, value in copy.deepcopy(overrides).items():  # merged in place, and the caller's stay as they are
        _merge(values, _nested(str(key), value))
    _forget_credit(values.get("schedules"), priced)
    values |= {"profile": profile, "seed": seed, "run_id": run_id, "study": study}
    for section, key in _PATHS:
        _locate(values.get(section), key)
    from c2f_utils.settings import preflight  # opens what these types name, and so comes after them

    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise problems("the settings cannot be used:", explained(Settings, error)) from None
    if found := preflight.findings(settings):
        raise problems("the settings cannot be used:", found)
    return settings


def _domain(overrides: dict[str, object]) -> object:
    """The embedded domain that overrides choose, if they do and its name can be one."""
    chosen: dict[str, object] = {}
    for key, value in overrides.items():
        _merge(chosen, copy.deepcopy(_nested(str(key), value)))
    data = chosen.get("data")
    name = data.get("domain") if isinstance(data, dict) else None
    return name if isinstance(name, str) else None


def dotted(overrides: dict[str, object], prefix: str = "") -> list[str]:
    """The dotted name of everything that overrides set, in order."""
    found = []
    for key, value in overrides.items():
        inner = isinstance(value, dict) and value
        found += dotted(value, f"{prefix}{key}.") if inner else [f"{prefix}{key}"]
    return found


def _refuse_parameters(overrides: dict[str, object]) -> None:
    """Raise C2FError for parameters of a run among the overrides, which would have no effect, and endless nesting."""
    if too_deep(overrides):
        raise C2FError(f"the overrides are nested more than {DEEPEST} levels deep; expected coarse.iterations=5 ...")
    found = [
        f"{name} is no setting but a parameter: give it as --{name.replace('_', '-')}, or in a notebook's first cell"
        for name in ("profile", "seed", "run_id", "study")
        if name in overrides
    ]
    if found:
        raise problems("the overrides cannot be used:", found)


def _forget_credit(schedules: object, priced: set[str]) -> None:
    """Drop the profile's own credit for laws that the overrides took away."""
    if isinstance(schedules, dict) and isinstance(schedules.get("credit"), dict):
        laws = {**(schedules.get("laws") or {}), **(schedules.get("study_laws") or {})}
        for name in priced - laws.keys():
            schedules["credit"].pop(name, None)


_PATHS = (
    ("models", "base"), ("models", "instruct"), ("models", "reward"), ("data", "preferences"), ("retention", "text"),
    ("safety", "wordlist"), ("judge", "prompts"), ("judge", "references"), ("judge", "templates"),
)  # fmt: skip


def _locate(section: object, key: str) -> None:
    """Let a relative path that the working folder lacks mean the project's: a notebook's kernel starts elsewhere."""
    from c2f_utils.files import root

    value = section.get(key) if isinstance(section, dict) else None
    if isinstance(value, str) and not Path(value).exists() and (root() / value).exists():
        section[key] = str(root() / value)


def _nested(key: str, value: object) -> dict[str, object]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value)} if rest else {first: value}


def _merge(into: dict, update: dict, where: str = "") -> None:
    for key, value in update.items():
        here = f"{where}.{key}".strip(".")
        # A law is one choice: where another is named, half of the old one's keys must not survive in it.
        whole = bool(where) and isinstance(value, dict) and "name" in value  # `judge` has a name and is a section
        if here in NAMED and not value:  # `laws: {}` and `laws: null`: none of the profile's
            into[key] = {}
        elif where in NAMED and value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and not whole and (here in NAMED or isinstance(into.get(key), dict)):
            _merge(into.setdefault(key, {}), value, here)
        else:
            into[key] = value


# Sections whose keys are names of the user's choice: null takes one away, {} all of them.
NAMED = {f"schedules.{name}" for name, field in Schedules.model_fields.items() if get_origin(field.annotation) is dict}
NAMED |= {"models.template_options"}
