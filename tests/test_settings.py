"""Settings: strict types, every problem at once, numbers as people write them, and what each stage depends on."""

import json
import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError

from c2f_utils.errors import C2FError
from c2f_utils.files import read_mapping
from c2f_utils.runs.run import PARENTS
from c2f_utils.settings import config
from c2f_utils.settings.config import PROFILES, STAGES
from c2f_utils.settings.load import load_settings


def refused(overrides: dict, profile: str = "smoke") -> str:
    with pytest.raises(C2FError) as caught:
        load_settings(profile, overrides=overrides)
    return str(caught.value)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads_and_is_complete(profile):
    settings = load_settings(profile)
    assert settings.profile == profile and settings.seed == 0 and settings.run_id == "lab" and not settings.study
    assert settings.embedded == (profile in ("smoke", "tiny", "gpu_demo"))
    assert {"fixed_short", "fixed_long", "clock_linear"} <= set(settings.schedules.laws)


def test_the_gpu_profiles_train_adapters_on_real_models_without_touching_the_embedding():
    settings = load_settings("mistral_7b")
    assert (
        settings.models.base == "mistralai/Mistral-7B-v0.1"
        and settings.models.lora
        and settings.models.dtype == "bfloat16"
    )
    assert settings.models.instruct.endswith("-v0.1"), "v0.2 differs in rope and sliding window"
    assert "\n\nHuman:" in settings.data.stop_strings
    assert not {"embed_tokens", "lm_head"} & set(settings.models.lora.targets)


def test_an_unknown_profile_is_named_with_those_that_exist():
    with pytest.raises(
        C2FError, match="unknown profile 'huge'; expected one of smoke, tiny, gpu_demo, small_gpu, mistral"
    ):
        load_settings("huge")


def test_nested_and_dotted_overrides_mean_the_same():
    nested = load_settings("smoke", overrides={"coarse": {"iterations": 7, "law": {"name": "fixed", "limit": 9}}})
    dotted = load_settings("smoke", overrides={"coarse.iterations": 7, "coarse.law": {"name": "fixed", "limit": 9}})
    assert nested == dotted and nested.coarse.iterations == 7
    assert nested.coarse.law.start is None, "a law is replaced as a whole"
    assert nested.coarse.prompts == load_settings("smoke").coarse.prompts, "the rest of the section stays"


def test_one_key_of_a_law_can_be_changed():
    assert load_settings("smoke", overrides={"coarse.law.maximum": 40}).coarse.law.maximum == 40


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("reward.learning_rate", "1e-6", "is text; write a number without quotes"),
        ("coarse.iterations", "5", "is text; write a number without quotes"),
        ("models.gradient_checkpointing", "false", "is text; write True or False"),
        ("coarse.iterations", 2.5, "coarse.iterations = 2.5"),
        ("coarse.iterations", True, "coarse.iterations = True"),
        ("coarse.iterations", 0, "greater than 0"),
        ("reward.learning_rate", float("nan"), "finite"),
        ("reward.learning_rate", 2.0, "less than 1"),
        ("reward.cut_share", 1.5, "less than or equal to 1"),
        ("coarse.critic", "none", "coarse.critic = 'none'"),
        ("coarse.lambda_policy", "fast", "coarse.lambda_policy"),
        ("coarse.law", {"name": "step"}, "coarse.law.name = 'step'"),
        ("merge.coefficients", [], "merge.coefficients"),
        ("merge.coefficients", ["0.5"], "write a number without quotes"),
        ("run_idd", 1, "run_idd = 1: there is no such setting"),
        ("coarse.iteration", 1, "no such setting; did you mean iterations? known here: law, iterations"),
        ("iterations", 5, "a setting is written with its section: coarse.iterations=5"),
        ("models.lora.rnk", 1, "did you mean rank? known here: rank, alpha, targets"),
        ("schedules.laws.fixed_long.limt", 1, "did you mean limit?"),
        ("coarse.law", "linear", "coarse.law = 'linear': expected a group of settings with keys among name, limit"),
        ("coarse.lambda_policy", 3, "coarse.lambda_policy = 3: expected less than or equal to 1 or 'adaptive'"),
        ("schedules.critic_free", {"a": {"trainer": "grpo"}}, "schedules.critic_free.a.law is missing; give"),
        ("coarse.law.lenght", 1, "known here: name, limit"),
    ],
)
def test_a_wrong_value_is_named_with_the_spelling_to_use(key, value, said):
    message = refused({key: value})
    assert said in message and key.split(".")[-1] in message


def test_a_rule_of_a_section_is_said_without_the_section():
    message = refused({"coarse.critic": "shared"})
    assert message.endswith("coarse: critic 'shared' has a head on the actor's trunk: set critic_head to 'zero'")


def test_rules_between_sections_get_a_line_each():
    assert refused({"data.source": "preferences"}).count("\n  - ") == 3


def test_all_problems_are_reported_at_once():
    message = refused({"coarse.iterations": "5", "reward.pares": 3, "evaluation.max_tokens": -1})
    assert message.count("\n  - ") == 3


@pytest.mark.parametrize("run_id", ["", "a/b", "..", ".hidden", "x" * 65, "a b"])
def test_run_ids_are_safe_as_folder_names(run_id):
    with pytest.raises(C2FError, match="run_id = .*: expected 1 to 64 letters, digits"):
        load_settings("smoke", run_id=run_id)


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        load_settings("smoke").coarse.iterations = 5


def test_our_yaml_reads_scientific_notation_as_a_number_and_text_as_text(tmp_path):
    text = "a: 1e-6\nb: 1E5\nc: 1.5e-3\nd: -2e-1\ne: '1e-6'\nf: 1e-6x\ng: false\nh: 0x1e5\n"
    (tmp_path / "o.yaml").write_text(text)
    found = read_mapping(tmp_path / "o.yaml")
    assert [found[key] for key in "abcd"] == [1e-6, 1e5, 1.5e-3, -0.2]
    assert found["e"] == "1e-6" and found["f"] == "1e-6x" and found["g"] is False and found["h"] == 0x1E5
    assert yaml.safe_load("a: 1e-6") == {"a": "1e-6"}, "if this changes, our reader is not needed any more"


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "a: [1\n", "a: !!python/object/apply:os.getcwd []\n"])
def test_an_overrides_file_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "o.yaml").write_text(text)
    with pytest.raises(C2FError, match="o.yaml"):
        read_mapping(tmp_path / "o.yaml")


def test_an_empty_overrides_file_changes_nothing_and_a_missing_one_is_refused(tmp_path):
    (tmp_path / "o.yaml").write_text("# nothing yet\n")
    assert read_mapping(tmp_path / "o.yaml") == {}
    with pytest.raises(C2FError, match="expected a readable YAML or JSON file"):
        read_mapping(tmp_path / "missing.yaml")


def test_the_embedded_domain_takes_no_foreign_models_and_preferences_need_them():
    assert "models.base" in refused({"models.base": "owner/name"})
    for key, value in (("preferences", "/nope.jsonl"), ("preference_subsets", ["harmless-base"])):
        message = refused({f"data.{key}": value})
        assert f"data.{key} = {value!r} is not read" in message and "set data.source to 'preferences'" in message
    message = refused({"data.source": "preferences"})
    assert (
        "models.base is null" in message
        and "models.instruct is null" in message
        and "data.preferences is null" in message
    )


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_settings_that_decide_it(stage):
    found = load_settings("smoke", seed=3, run_id="x").for_stage(stage)
    assert found["profile"] == "smoke" and found["seed"] == 3 and "run_id" not in found


def test_a_setting_decides_the_stages_that_use_it_and_no_others():
    usual, other = load_settings("smoke"), load_settings("smoke", overrides={"merge.token_price": 0.5})
    assert {name for name in STAGES if usual.for_stage(name) != other.for_stage(name)} == {
        "06_residue_merging",
        "07_evaluation",
    }


def test_study_decides_the_schedules_only():
    usual, study = load_settings("tiny"), load_settings("tiny", study=True)
    assert [name for name in STAGES if usual.for_stage(name) != study.for_stage(name)] == ["04_length_schedules"]


def test_stages_agree_with_the_run_room():
    assert set(STAGES) == set(PARENTS)


def test_every_setting_is_documented_or_obvious():
    """Units live in field descriptions: a number of tokens, a share or a price without one is a riddle."""
    sections = [
        getattr(config, name) for name in ("Data", "Pretrain", "Reward", "Coarse", "Instruct", "Merge", "Evaluation")
    ]
    for section in sections:
        for name, field in section.model_fields.items():
            if any(word in name for word in ("tokens", "share", "price", "coefficient")) and name != "coefficients":
                assert field.description or section.__doc__, f"{section.__name__}.{name}"


def test_settings_load_without_torch():
    code = (
        "import sys\nfrom c2f_utils.settings.load import load_settings\n"
        "load_settings('smoke'); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_relative_path_is_found_from_the_notebooks_folder_too(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "c2f_utils").mkdir(parents=True)
    (project / "c2f_utils" / "__init__.py").touch()
    (project / "notebooks").mkdir()
    (project / "data").mkdir()
    turns = [f"\n\nHuman: question {i}\n\nAssistant:" for i in range(8)]
    rows = [json.dumps({"chosen": f"{turn} yes", "rejected": f"{turn} no"}) for turn in turns]
    (project / "data" / "pairs.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(project / "notebooks")
    chosen = {"data.preferences": "data/pairs.jsonl", "models.base": "owner/base", "models.instruct": "owner/instruct"}
    settings = load_settings("mistral_7b", overrides=chosen)
    assert settings.data.preferences == str(project / "data" / "pairs.jsonl")


@pytest.mark.parametrize(
    ("overrides", "left"),
    [
        ({"schedules": {"laws": {}}}, []),
        ({"schedules.laws": {}}, []),
        ({"schedules": {"laws": None}}, []),
        ({"schedules": {"laws": {"fixed_short": None}}}, ["fixed_long", "clock_linear"]),
        ({"schedules.laws.fixed_short": None}, ["fixed_long", "clock_linear"]),
        ({"schedules.laws": {}, "schedules": {"laws": {"mine": {"name": "fixed", "limit": 9}}}}, ["mine"]),
        ({"schedules": {"laws": {"unknown": None}}}, ["fixed_short", "fixed_long", "clock_linear"]),
    ],
)
def test_null_and_an_empty_mapping_take_the_profiles_laws_away(overrides, left):
    assert list(load_settings("tiny", overrides=overrides).schedules.laws) == left


def test_a_law_that_is_taken_away_takes_the_profiles_credit_with_it():
    settings = load_settings("tiny", overrides={"schedules": {"study_laws": {"stop_fixed": None}}})
    assert "stop_fixed" not in settings.schedules.study_laws and list(settings.schedules.credit) == ["stop_logistic"]
    message = refused({"schedules": {"credit": {"stop_fixed": {"cut": "penalty"}}}})
    assert "schedules.credit names stop_fixed, which is no law" in message, "what the user wrote is not dropped"


def test_null_elsewhere_is_a_value():
    assert load_settings("small_gpu", overrides={"models.lora": None}).models.lora is None


def test_small_gpu_names_an_instruction_model_of_its_own_base():
    """The merge needs one base: the two names agree up to the ending that marks the base."""
    models = load_settings("small_gpu").models
    assert models.base == f"{models.instruct}-Base"


@pytest.mark.parametrize("cap", [0.0, 1.0, 2.5])
def test_an_importance_cap_is_off_or_at_least_one(cap):
    assert load_settings("smoke", overrides={"coarse.importance_cap": cap}).coarse.importance_cap == cap
    assert "0 (off) or at least 1" in refused({"coarse.importance_cap": 0.5})


def test_another_judge_keeps_the_other_settings_of_the_profile():
    judge = load_settings("smoke", overrides={"judge.name": "reward"}).judge
    assert (judge.name, judge.questions) == ("reward", load_settings("smoke").judge.questions) == ("reward", 4)
