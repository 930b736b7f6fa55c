"""What the opening cell of a notebook shows: the run, the settings that decide this stage, and, folded, the versions.

Of all settings that reach a stage only those are listed that a reader of its notebook would ask for, each with its
meaning from `settings/config.py`; any other is listed where it differs from its profile's.
"""

from c2f_utils.notebook.show import Html
from c2f_utils.report.letters import in_html
from c2f_utils.settings.config import Settings
from c2f_utils.settings.load import load_settings

DECIDING = {
    "00_environment_and_data": "data.source data.preferences data.operations data.vocabulary data.test_prompts",
    "01_base_model": (
        "models.base pretrain.hidden_size pretrain.layers pretrain.tokens pretrain.tokens_per_step "
        "pretrain.learning_rate_matrices pretrain.learning_rate_other"
    ),
    "02_reward_model": (
        "models.reward data.preferences reward.pairs reward.held_out_pairs reward.label_noise reward.length_bonus "
        "reward.cut_share reward.learning_rate reward.epochs reward.members"
    ),
    "03_coarse_rlhf": (
        "coarse.law coarse.iterations coarse.prompts coarse.epochs coarse.minibatches coarse.actor_learning_rate "
        "coarse.critic_learning_rate coarse.critic_head coarse.clip coarse.kl_coefficient coarse.kl_target "
        "coarse.lambda_policy coarse.lambda_critic coarse.cut models.lora"
    ),
    "04_length_schedules": (
        "schedules.laws coarse.law coarse.iterations coarse.prompts coarse.cut coarse.evaluate_every "
        "coarse.evaluation_tokens"
    ),
    "05_instruction_model": (
        "models.instruct instruct.tokens instruct.worked_share instruct.examples_per_step instruct.learning_rate"
    ),
    "06_residue_merging": (
        "merge.operator merge.coefficients merge.token_price merge.select merge.out_dtype merge.sections "
        "merge.other_operators merge.controls data.validation_prompts evaluation.max_tokens"
    ),
    "07_evaluation": "evaluation.max_tokens evaluation.decodings evaluation.prefixes data.test_prompts merge.controls",
}
_STUDY = ("schedules.study_laws", "schedules.credit", "schedules.critic_free", "schedules.study_seeds")


def deciding(settings: Settings, stage: str) -> list[tuple[str, str, str | None, str]]:
    """What decides a stage: dotted name, value, the profile's value where it is another (else None), meaning.

    Values are in words; one that is null is left out unless the profile says otherwise.
    """
    usual = load_settings(settings.profile, settings.seed, study=settings.study).for_stage(stage)
    wanted = [*DECIDING.get(stage, "").split(), *(_STUDY if stage == "04_length_schedules" and settings.study else ())]
    mine = settings.for_stage(stage)
    sections = {name: values for name, values in mine.items() if isinstance(values, dict)}
    others = [f"{name}.{key}" for name, values in sections.items() for key in values]
    rows = []
    for dotted in dict.fromkeys([*wanted, *others]):
        section, key = dotted.split(".")
        value, profile = mine[section][key], usual[section][key]
        if value != profile or (dotted in wanted and value is not None):
            meaning = type(getattr(settings, section)).model_fields[key].description or ""
            rows.append((dotted, _words(value), _words(profile) if value != profile else None, meaning))
    return rows


def opening(rows: dict[str, object], settings: list[tuple[str, str, str | None, str]], versions: dict) -> Html:
    """One piece of HTML of the run's facts, the settings (those that differ from the profile's in bold) and a fold of
    versions; its text marks them with a star."""
    facts = "".join(f"<tr>{_left(f'<b>{in_html(k)}</b>')}{_left(in_html(v))}</tr>" for k, v in rows.items())
    lines, body = [f"{name}: {value}" for name, value in rows.items()], ""
    for name, value, profile, meaning in settings:
        shown, plain = in_html(value), f"  {name} = {value}"
        if profile is not None:
            shown = f"<b>{shown}</b> (profile: {in_html(profile)})"
            plain = f"* {name} = {value} (profile: {profile})"
        body += f"<tr>{_left(f'<code>{in_html(name)}</code>')}{_left(shown)}{_left(in_html(meaning))}</tr>"
        lines.append(plain)
    if settings:
        lines.insert(len(rows), "settings that decide this stage (*: not the profile's):")
        body = f"<p><b>Settings that decide this stage</b>; bold: not the profile's</p><table>{body}</table>"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    fold = f"<details><summary>Versions</summary>{in_html(packages)}</details>"
    return Html(f"<table>{facts}</table>{body}{fold}", "\n".join([*lines, f"versions: {packages}"]))


def _words(value: object) -> str:
    """A setting as a reader would write it: a law with its own numbers, a list without brackets."""
    if isinstance(value, dict):
        numbers = {key: item for key, item in value.items() if item is not None and key != "name"}
        parts = [f"{key}: {_words(item)}" if isinstance(item, dict) else f"{key} {_words(item)}"
                 for key, item in numbers.items()]  # fmt: skip
        nested = any(isinstance(item, dict) for item in numbers.values())
        named = [str(value["name"])] if "name" in value else []
        return ("; " if nested else ", ").join([*named, *parts]) or "none"
    if isinstance(value, list):
        separator = "; " if any(isinstance(item, dict) for item in value) else ", "
        return separator.join(map(_words, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def _left(markup: str) -> str:
    return f"<td style='text-align:left;vertical-align:top'>{markup}</td>"
