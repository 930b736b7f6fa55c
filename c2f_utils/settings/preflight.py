"""What settings and files alone already show to be impossible, found before a kernel starts and without torch.

Types and unknown keys are `config.py`'s; this room opens what the settings name: model folders, the preference file,
the laws' limits beside the model's positions. Hub ids pass: what they hold is checked when they are loaded.
"""

import difflib
import importlib.util
import json
import os
import sys
from pathlib import Path

from c2f_utils import weights
from c2f_utils.domain import forms, preferences, task_files, user_text
from c2f_utils.errors import C2FError, short
from c2f_utils.files import UNPARSABLE, root
from c2f_utils.positions import positions_of
from c2f_utils.settings.config import PAIR_ANSWER_TOKENS, Settings
from c2f_utils.settings.merge_options import OPTIONS, option_problems
from c2f_utils.settings.rlhf import CriticFree

FEWEST_PROMPTS = 4  # one for validation, one for test, two to train on
# An embedded question with n steps: begin-of-sequence, 7 words, 4 per step, 4 words; a forced beginning adds 6.
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
_MOST_WEIGHTS = 1_000_000_000
_PROBLEMS = {2: 26_000, 3: 530_000}  # distinct embedded problems of 2 and 3 steps in validation and in test; then many
_GPU = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA's driver, the same below Windows, AMD's
_QUESTION, _STEP, _FORCED = 12, 4, 6


def findings(settings: Settings) -> list[str]:
    """One line per impossibility: the setting, its value, what was expected, what to do; empty if there is none."""
    found: list[str] = []
    for check in (
        _models,
        _device,
        _counts,
        _pretrain,
        _compiled,
        _vllm,
        _preferences,
        _text,
        _laws,
        _baselines,
        _operators,
        _positions,
        _tasks,
    ):
        found += check(settings)
    return found


def check_folder(source: str, what: str) -> None:
    """Raise C2FError if `source` is a local path that does not hold a readable safetensors model; hub ids pass."""
    path = Path(source)
    if weights.is_hub(source):
        return
    if not path.exists():
        raise C2FError(f"{what} = {source!r} does not exist; expected a model folder or a hub id such as 'owner/name'")
    said = f"{what} = {source!r} is not a model:"
    if not (path / "config.json").is_file():
        raise C2FError(f"{said} no config.json in it; expected a Hugging Face model folder")
    if not isinstance(_config(path), dict) or "model_type" not in _config(path):
        raise C2FError(f"{said} its config.json names no model_type; expected a Hugging Face model folder")
    found = weights.files(path)
    if not found:
        raise C2FError(
            f"{what} = {source!r} has no *.safetensors file; "
            "expected safetensors weights (pickled checkpoints are not loaded)"
        )
    from safetensors import SafetensorError, safe_open

    for file in found:
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise C2FError(f"{said} {file.name} is damaged or half copied ({error}); copy it again") from None


def not_found(source: str | Path) -> str:
    """What to add to a failure to load where `source` is no folder: a path with one slash passes for a hub id."""
    if Path(source).exists():
        return ""
    places = " or ".join(dict.fromkeys(map(str, (Path.cwd(), root()))))
    return (
        f"; there is no folder {str(source)!r} in {places}, and the hub has no such model or cannot be reached: "
        "mend the path, or the hub id 'owner/name'"
    )


def _config(folder: Path) -> object:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, *UNPARSABLE):
        return None


def _models(settings: Settings) -> list[str]:
    models = settings.models
    named = [(getattr(models, key), f"models.{key}") for key in ("base", "instruct", "reward") if getattr(models, key)]
    found = [line for source, what in named for line in _said(check_folder, source, what)]
    for key in ("base", "instruct", "reward"):
        source, revision = getattr(models, key), getattr(models, f"{key}_revision")
        if revision and source and "@" in source and weights.is_hub(source):
            found.append(f"models.{key} = {source!r} and models.{key}_revision = {revision!r} name two; keep one")
        elif revision and not (source and weights.is_hub(source)):
            found.append(
                f"models.{key}_revision = {revision!r} has no effect on models.{key} = {source!r}, which is no hub id; "
                "leave it out, or name a hub model"
            )
    base, instruct = (_config(Path(source)) if source else None for source in (models.base, models.instruct))
    if not found and base and instruct:  # both local; a hub model is compared when it is loaded
        found += [
            f"models.instruct = {models.instruct!r} has {key} {instruct.get(key)}, models.base has {base.get(key)}; "
            "a residue merge needs an instruction model that was fine-tuned from the same base"
            for key in _SHAPE
            if base.get(key) != instruct.get(key)
        ]
    for key in ("base", "instruct"):
        source, setting = getattr(models, key), f"models.{key}_form"
        if getattr(models, f"{key}_form") == "template" and source and not _has_template(Path(source)):
            found.append(forms.no_template(setting, source))
    return found


def _device(settings: Settings) -> list[str]:
    """Told without torch: no driver has left a device here, or all of them are hidden."""
    if settings.models.device != "cuda" or not sys.platform.startswith("linux"):
        return []
    if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and any(map(os.path.exists, _GPU)):
        return []
    return ["models.device = 'cuda': this machine shows no GPU; set it to 'auto' or 'cpu', or run where there is one"]


def _counts(settings: Settings) -> list[str]:
    data, coarse = settings.data, settings.coarse
    found = []
    if coarse.evaluation_prompts > data.validation_prompts:
        found.append(
            f"coarse.evaluation_prompts = {coarse.evaluation_prompts} is above data.validation_prompts = "
            f"{data.validation_prompts}, of which they are taken; lower it or raise the other"
        )
    there = _PROBLEMS.get(max(data.operations))
    if settings.embedded and data.vocabulary == "small" and there:
        found += [
            f"data.{key} = {asked}: there are about {there} such problems of at most {max(data.operations)} steps; "
            "lower it, or raise data.operations"
            for key in ("validation_prompts", "test_prompts")
            if (asked := getattr(data, key)) > there
        ]
    return found


def _has_template(folder: Path) -> bool:
    """Whether a local model has a chat template; what a hub model has is seen when it is loaded."""
    if not folder.is_dir() or (folder / "chat_template.jinja").is_file():
        return True
    try:
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, *UNPARSABLE):
        return False
    return bool(isinstance(tokenizer, dict) and tokenizer.get("chat_template"))


def _compiled(settings: Settings) -> list[str]:
    engine, where = settings.coarse.engine, settings.models.device
    if not settings.models.compile or (engine != "continuous" and where != "cpu"):
        return []
    return [
        f"models.compile = true with coarse.engine = {engine!r} and models.device = {where!r}: layers are compiled on "
        "a GPU and not for continuous batching; set models.compile to false"
    ]


def _vllm(settings: Settings) -> list[str]:
    coarse, found = settings.coarse, []
    if coarse.engine != "vllm":
        return []
    if importlib.util.find_spec("vllm") is None:
        found.append("the package vllm, which is not installed: python -m pip install -e '.[vllm]'")
    if settings.models.device == "cpu":
        found.append("a GPU, and models.device is 'cpu': set it to 'auto'")
    if coarse.processes > 1:
        found.append(f"a single process, and coarse.processes is {coarse.processes}: set it to 1")
    if coarse.old_logps == "recorded":
        found.append("old log-probabilities of the trainer, and coarse.old_logps is 'recorded': set it to 'auto'")
    return [f"coarse.engine = 'vllm' needs {line}, or coarse.engine to 'kv'" for line in found]


def _preferences(settings: Settings) -> list[str]:
    data = settings.data
    if settings.embedded or not data.preferences or not preferences.is_local(data.preferences):
        return []
    try:
        pairs, _ = preferences.read(data.preferences, data.preference_split, data.preference_subsets)
    except C2FError as error:
        return [str(error)]
    prompts = len({pair.prompt for pair in pairs})
    if prompts < FEWEST_PROMPTS:
        return [
            f"data.preferences = {data.preferences!r} holds {prompts} different prompts; "
            f"expected at least {FEWEST_PROMPTS}: add more pairs"
        ]
    return []


def _text(settings: Settings) -> list[str]:
    source, safety = settings.retention.text, settings.safety
    found = _said(user_text.read, safety.wordlist, "safety.wordlist") if safety.wordlist else []
    found += _said(user_text.read, safety.requests, "safety.requests") if safety.requests else []
    found += _said(check_folder, safety.reward, "safety.reward") if safety.reward else []
    if source is None:
        return found
    if settings.embedded:
        return [
            *found,
            f"retention.text = {source!r} is not read: the embedded domain's model knows none of its words; leave it "
            "out, or set data.source to 'preferences' and name models.base and models.instruct",
        ]
    return found + _said(user_text.read, source, "retention.text")


def _used_laws(settings: Settings) -> dict[str, object]:
    schedules = settings.schedules
    others = {f"schedules.laws.{name}": law for name, law in schedules.laws.items()}
    study = {f"schedules.study_laws.{name}": law for name, law in schedules.study_laws.items()}
    study |= {f"schedules.critic_free.{name}": entry.law for name, entry in schedules.critic_free.items()}
    return {"coarse.law": settings.coarse.law} | others | (study if settings.study else {})


def _laws(settings: Settings) -> list[str]:
    from c2f_utils.settings.laws import make_law

    found = []
    for where, law in _used_laws(settings).items():
        for line in _said(make_law, law):
            whole = f"; a law is named whole, with all its keys: {where}={{'name': '{law.name}', 'KEY': VALUE, ...}}"
            found.append(f"{where}: {line}" + whole * ("missing: " in line))
    return found


def _operators(settings: Settings) -> list[str]:
    """Operators that notebook 06 would refuse; a name unlike all of ours may be registered in that notebook."""
    found, strange = [], strange_operators(settings)
    for where, spec in _named_operators(settings).items():
        name = spec.get("name")
        if not isinstance(name, str) or not name:
            found.append(
                f"{where} = {short(spec)} has no name; expected {{'name': 'trim', 'density': 0.3}} or the like"
            )
        elif name in OPTIONS:
            found += [f"{where}, {line}" for line in option_problems(name, spec, OPTIONS[name])]
        elif name in strange and (near := difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.85)):
            found.append(
                f"{where}: there is no operator {name!r}; did you mean {near[0]!r}? known: {', '.join(OPTIONS)} (one "
                "of your own with so similar a name must be registered before the cell that starts notebook 06)"
            )
    return found


def strange_operators(settings: Settings) -> list[str]:
    """Names of operators in the settings that are none of ours and have not been registered in this process."""
    loaded = sys.modules.get("c2f_utils.merge.operators")  # where a notebook has registered one of its own
    known = {*OPTIONS, *(loaded.known_operators() if loaded else ())}
    names = [spec.get("name") for spec in _named_operators(settings).values()]
    return [name for name in names if isinstance(name, str) and name not in known]


def _named_operators(settings: Settings) -> dict[str, dict]:
    others = {f"merge.other_operators.{number}": spec for number, spec in enumerate(settings.merge.other_operators)}
    return {"merge.operator": {"name": settings.merge.operator}} | others


def _pretrain(settings: Settings) -> list[str]:
    if not settings.embedded:
        return []
    found, pretrain = [], settings.pretrain
    if pretrain.weights > _MOST_WEIGHTS:
        found.append(
            f"pretrain: a model of {pretrain.weights:.1e} weights; expected at most {_MOST_WEIGHTS:.0e}, since it is "
            "made here: lower pretrain.hidden_size, pretrain.intermediate_size or pretrain.layers"
        )
    for key, by in (("hidden_size", "heads"), ("heads", "key_value_heads")):
        whole, part = getattr(pretrain, key), getattr(pretrain, by)
        if whole % part:
            found.append(
                f"pretrain.{by} = {part} does not divide pretrain.{key} = {whole}; choose one that does, e.g. "
                f"{max(n for n in range(1, part) if whole % n == 0)}"
            )
    return found


def _baselines(settings: Settings) -> list[str]:
    schedules = settings.schedules
    taken = {"logistic", *schedules.laws, *schedules.study_laws} & set(schedules.critic_free)
    found = [f"schedules.critic_free.{name}: a law has this name already; choose another" for name in sorted(taken)]
    for name, entry in schedules.critic_free.items() if settings.study else ():
        found += [f"schedules.critic_free.{name}: {line}" for line in refused_baseline(entry, settings)]
    return found


def refused_baseline(entry: CriticFree, settings: Settings) -> list[str]:
    """What makes a critic-free baseline impossible under these settings, one line each; its law must be possible."""
    from c2f_utils.limits import refuse_unfed
    from c2f_utils.settings.laws import make_law

    coarse = settings.coarse
    found = _said(lambda: refuse_unfed(make_law(entry.law)))
    for count, what in ((coarse.minibatches, "coarse.minibatches"), (entry.generations, "generations")):
        if coarse.prompts % count:
            found.append(f"coarse.prompts = {coarse.prompts} is no multiple of {what} = {count}; choose one that is")
    if coarse.cut in ("bootstrap", "continue"):
        found.append(f"coarse.cut = {coarse.cut!r} asks the critic what would follow; choose 'score' or 'penalty'")
    if coarse.cut in ("average", "mask"):
        found.append(f"coarse.cut = {coarse.cut!r} is known to our trainer only; choose 'score' or 'penalty'")
    if settings.models.dtype == "bfloat16" and settings.models.lora is None:  # they keep no float32 masters
        found.append("models.dtype = 'bfloat16' without models.lora: their steps would vanish; set one or the other")
    if coarse.overlong or coarse.length_budget:
        found.append("coarse.overlong and coarse.length_budget are known to our trainer only; set both to 0")
    if coarse.processes > 1:
        found.append(f"coarse.processes = {coarse.processes}: these baselines run in one process; set it to 1")
    if forms.stop_strings(settings.models.base_form, settings.data.stop_strings):
        found.append("data.stop_strings: these trainers end answers at EOS only; leave schedules.critic_free empty")
    if settings.models.base_form == "template":
        found.append("models.base_form = 'template': these trainers are given transcripts; set it to 'raw'")
    if entry.reward == "verifiable" and not settings.embedded:
        found.append("reward 'verifiable' needs problems with known answers, which hub data has not; choose 'model'")
    return found


def _positions(settings: Settings) -> list[str]:
    """Every limit plus the longest prompt must fit the model's positions; those of hub ids are checked when loaded."""
    limits = {
        f"{where}, largest limit": max(n for n in (law.limit, law.start, law.maximum, *(law.steps or [])) if n)
        if _any(law)
        else 0
        for where, law in _used_laws(settings).items()
    }
    limits |= {
        "coarse.evaluation_tokens": settings.coarse.evaluation_tokens,
        "evaluation.max_tokens": settings.evaluation.max_tokens,
    }
    if settings.embedded:
        (fewest, most), steps = settings.data.operations, len(settings.data.world.ordinals)
        if not 2 <= fewest <= most <= steps:
            return [
                f"data.operations = {[fewest, most]}: expected two numbers from 2 to {steps}, the smaller first: "
                "write [3, 5]"
            ]
        positions, prompt, name = (
            settings.pretrain.max_positions,
            _QUESTION + _STEP * most + _FORCED,
            "pretrain.max_positions",
        )
        if settings.reward.base_share:
            limits["answers in preference pairs"] = PAIR_ANSWER_TOKENS
        advice = f"lower the limit or raise {name}"
    else:
        prompt, name = settings.data.max_prompt_tokens, "models.base"
        positions = _positions_of(settings.models.base)
        advice = "lower the limit or data.max_prompt_tokens, or choose a model with more positions"
    if positions is None:
        return []
    found = [
        f"{where} = {limit} tokens: with a prompt of up to {prompt} tokens that is beyond the model's "
        f"{positions} positions ({name}); {advice}"
        for where, limit in limits.items()
        if limit + prompt > positions
    ]
    if not settings.embedded and settings.reward.max_tokens > positions:
        found.append(
            f"reward.max_tokens = {settings.reward.max_tokens} is beyond the model's {positions} positions "
            f"({name}); lower it"
        )
    return found


def _tasks(settings: Settings) -> list[str]:
    tasks = settings.tasks
    return _said(lambda: task_files.read(task_files.folder(tasks.folder))) if "local" in (tasks.suites or []) else []


def _any(law) -> bool:
    return any((law.limit, law.start, law.maximum, law.steps))


def _positions_of(source: str) -> int | None:
    config = _config(Path(source))
    return positions_of(config) if isinstance(config, dict) else None


def _said(check, *arguments) -> list[str]:
    try:
        check(*arguments)
    except C2FError as error:
        return [str(error)]
    return []
