"""A dialogue is put to each model in its own form, and what cannot be is refused before work."""

import json
from pathlib import Path

import offline_mistral
import pytest
import yaml
from finished_runs import c2f, finished, results, rows

from c2f_utils import weights
from c2f_utils.domain import forms, preferences
from c2f_utils.errors import C2FError
from c2f_utils.files import read_mapping
from c2f_utils.rollout.sampler import eos_ids
from c2f_utils.runs.run import READING, Run
from c2f_utils.settings.config import Models
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import data
from c2f_utils.stages.inputs import fitted_tokenizer

TRANSCRIPT = "\n\nHuman: Hello?\nYou there\n\nAssistant: Yes.\n\nHuman: Good\n\nAssistant:"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def words():
    made = offline_mistral.tokenizer([row["chosen"] for row in offline_mistral.pairs()])
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def offline(tmp_path) -> dict:
    """Overrides of a toy model in the real formats; the instruction model's tokenizer has a chat template."""
    overrides = read_mapping(offline_mistral.build(tmp_path / "models", tmp_path / "o.yaml", "float32"))
    Path(overrides["models"]["instruct"], "chat_template.jinja").write_text(TEMPLATE)
    return overrides


def test_a_transcript_becomes_turns_and_the_open_one_is_left_out():
    assert forms.messages(TRANSCRIPT) == [
        {"role": "user", "content": "Hello?\nYou there"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Good"},
    ]
    assert forms.messages(TRANSCRIPT + " Bye")[-1] == {"role": "assistant", "content": "Bye"}


def test_what_stands_before_the_first_header_is_not_lost():
    asked = [{"role": "user", "content": "hi"}]
    assert forms.messages("You are a pirate.\n\nHuman: hi\n\nAssistant:") == [
        {"role": "system", "content": "You are a pirate."}, *asked
    ]  # fmt: skip
    said = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "more"}]
    assert forms.messages("Human: hi\n\nAssistant: yes\n\nHuman: more\n\nAssistant:") == asked + said


def test_a_prompt_is_the_transcript_or_the_template_filled_in(words):
    for form in ("raw", "human_assistant"):
        assert words.decode(forms.prompt_ids(TRANSCRIPT, form, words)) == TRANSCRIPT
    asked = words.decode(forms.prompt_ids(TRANSCRIPT, "template", words))
    assert asked == "[user]Hello?\nYou there</s>[assistant]Yes.</s>[user]Good</s>[assistant]"


def test_the_next_turns_header_ends_answers_in_the_form_that_says_so():
    assert forms.stop_strings("raw", []) == forms.stop_strings("template", []) == []
    assert forms.stop_strings("human_assistant", []) == ["\n\nHuman:"]
    assert forms.stop_strings("human_assistant", ["\n\nHuman:"]) == ["\n\nHuman:"]


def test_an_answer_continues_its_prompt_and_has_no_eos_of_the_tokenizers_making(words):
    from tokenizers import processors

    plain = words(TRANSCRIPT + " Bye.")["input_ids"]
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words.eos_token_id)]
    )
    prompt = forms.prompt_ids(TRANSCRIPT, "raw", words)
    assert words.eos_token_id not in prompt
    assert [*prompt, *forms.answer_ids(" Bye.", TRANSCRIPT, "raw", words)] == plain
    assert words.decode(forms.answer_ids(" Bye.", TRANSCRIPT, "template", words)) == "Bye."


def test_a_dialogue_that_the_template_refuses_is_named(words):
    words.chat_template = "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(C2FError, match=r"refuses the dialogue .*Hello.*\(turns must alternate\)"):
        forms.prompt_ids(TRANSCRIPT, "template", words)


@pytest.mark.parametrize("key", ["base_form", "instruct_form"])
def test_a_template_that_the_tokenizer_lacks_is_refused_before_work(offline, key):
    Path(offline["models"]["instruct"], "chat_template.jinja").unlink()
    offline["models"][key] = "template"
    with pytest.raises(C2FError, match=f"models.{key} = 'template', but the tokenizer of .* has no chat template"):
        load_settings("mistral_7b", overrides=offline)


def test_a_template_is_found_wherever_a_tokenizer_keeps_it(offline):
    offline["models"]["instruct_form"] = "template"
    assert load_settings("mistral_7b", overrides=offline).models.instruct_form == "template"
    folder = Path(offline["models"]["instruct"])
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    assert load_settings("mistral_7b", overrides=offline)


def test_the_embedded_domain_knows_no_forms():
    with pytest.raises(C2FError, match="models.base_form = 'template' needs data.source 'preferences'"):
        load_settings("tiny", overrides={"models.base_form": "template"})


def test_prompts_and_pairs_are_in_the_bases_form(offline, words):
    Path(offline["models"]["base"], "chat_template.jinja").write_text(TEMPLATE)
    offline["models"]["base_form"] = "template"
    settings = load_settings("mistral_7b", overrides=offline)
    prompt = data.prompts(settings, "train", 1, words)[0]
    assert words.decode(prompt.ids).startswith("[user]") and prompt.text.startswith(preferences.HUMAN)
    pair = data.hub_pairs(settings, words)[0][0]
    answer = words.decode(pair.tokens[0][pair.prompt_tokens :])
    assert words.decode(pair.tokens[0]).startswith("[user]") and answer.endswith("</s>") and answer[0] != " "


def test_ends_are_those_of_tokenizer_config_and_generation_config_together(words):
    model = offline_mistral.model(len(words))
    model.config.eos_token_id, model.generation_config.eos_token_id = 5, [7, 8]
    assert eos_ids(words, model) == {words.eos_token_id, 5, 7, 8}


def test_a_template_whose_end_of_turn_is_no_end_of_the_models_answers_is_refused(words):
    ends = {words.eos_token_id}
    forms.refuse_endless(words, ends)
    words.chat_template = TEMPLATE.replace("</s>", "\n")  # no special token: nothing can be said
    assert forms.end_of_turn(words) == []
    words.chat_template = TEMPLATE.replace("</s>", "<unk></s>")
    forms.refuse_endless(words, ends)
    words.chat_template = TEMPLATE.replace("</s>", "\n<unk>\n")
    with pytest.raises(C2FError, match="ends an answer with '<unk>', and its model's answers end at '</s>' only"):
        forms.refuse_endless(words, ends)
    forms.refuse_endless(words, ends | {words.unk_token_id})


def test_whether_a_model_thinks_first_is_decided_by_the_settings_and_before_training(offline, tmp_path):
    folder = Path(offline["models"]["instruct"])
    thinking = TEMPLATE.replace("[assistant]", "[assistant]{% if enable_thinking %}[think]{% endif %}")
    (folder / "chat_template.jinja").write_text(thinking)

    def tokenizer(**models):
        return fitted_tokenizer(str(folder), "instruct", Models(**offline["models"] | models))

    with pytest.raises(C2FError, match="enable_thinking.*set models.template_options to {enable_thinking: false}"):
        tokenizer()
    for thinks in (False, True):
        chosen = tokenizer(template_options={"enable_thinking": thinks})
        text = chosen.decode(forms.prompt_ids(TRANSCRIPT, "template", chosen))
        assert ("[think]" in text.replace(" ", "")) == thinks
    (tmp_path / "o.yaml").write_text(yaml.safe_dump(offline))
    done = c2f(tmp_path, "run", "01", "--profile", "mistral_7b", "--overrides", str(tmp_path / "o.yaml"))
    assert done.returncode and "models.template_options" in done.stderr + done.stdout


def test_a_profile_s_template_options_can_be_taken_back():
    assert load_settings("small_gpu").models.template_options == {"enable_thinking": False}
    assert load_settings("small_gpu", overrides={"models.template_options": {}}).models.template_options == {}


def test_what_a_local_model_is_read_with_is_an_input(offline, outputs):
    folder = Path(offline["models"]["instruct"])
    before = weights.reading(str(folder))
    (folder / "README.md").write_text("a card")
    assert weights.reading(str(folder)) == before and weights.reading("owner/name") is None
    run = Run(load_settings("mistral_7b", overrides=offline))
    name = f"{READING}instruct"
    assert run.inputs("05_instruction_model", expected=["01_base_model"])[0][name] == before
    (folder / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert weights.reading(str(folder)) != before
    assert run.inputs("05_instruction_model", expected=["01_base_model"])[0][name] != before
    run.here = run.stage("06_residue_merging")
    run.here.begin({})
    earlier = type("Stage", (), {"name": "05", "run_id": "r", "provenance": lambda self: {"inputs": {name: before}}})
    run._found["05_instruction_model"] = earlier()
    with pytest.raises(
        C2FError, match="05 of run 'r' was made with another tokenizer, chat template or.*instruct: put"
    ):
        run.use_reading("instruct", weights.reading(str(folder)))


@pytest.mark.slow
def test_instruction_model_and_fine_actor_are_measured_in_both_forms_and_the_table_says_which(offline, tmp_path):
    offline["models"]["instruct_form"] = "template"
    offline["merge"] |= {"sections": ["label_free"], "controls": ["interpolation"], "other_operators": []}
    (tmp_path / "o.yaml").write_text(yaml.safe_dump(offline))
    finished(tmp_path, "run", "all", "--profile", "mistral_7b", "--overrides", str(tmp_path / "o.yaml"))
    found = results(tmp_path / "lab", "07")["models"]
    labels = {name: row["label"] for name, row in found.items()}
    assert labels["instruct"] == "instruct, chat template" and labels["instruct_raw"] == "instruct, transcript"
    assert labels["fine"] == "fine actor, chat template" and labels["fine_raw"] == "fine actor, transcript"
    assert labels["base"] == "base, transcript" and labels["coarse"] == "coarse actor, transcript"
    for row in rows(tmp_path / "lab" / "07_evaluation" / "samples.jsonl"):
        assert row["prompt"].endswith(preferences.ASSISTANT), "answers are scored in the transcript"
    merged = results(tmp_path / "lab", "06")
    choices = {row["rule"]: row["coefficient"] for row in merged["label_free"]["rules"]}
    assert choices.pop("reward") == merged["chosen"]["coefficient"] and not any(choices.values()), "no checker here"
    assert all(row["perplexity"] > 1 and row["judged"] is None for row in merged["label_free"]["rows"])
    fine = tmp_path / "lab" / "06_residue_merging" / "model"
    assert (fine / "chat_template.jinja").read_text() == TEMPLATE and (fine / "generation_config.json").is_file()
