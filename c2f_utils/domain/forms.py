"""How a dialogue is put to a model: as the data has it, or in the chat template of the model's own tokenizer.

Question: what does a model read before its answer, and how does its answer read in a transcript? A dialogue is a
transcript as HH-RLHF has it. A base model knows such text; an instruction model was often trained on a template with
tokens of its own, and is weaker without it. Scores are compared on transcripts, in which the reward model was trained.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Literal

from c2f_utils.domain.preferences import ASSISTANT, HUMAN
from c2f_utils.errors import C2FError

# As the data has it; the same, and the next turn's header ends an answer; the tokenizer's chat template.
Form = Literal["raw", "human_assistant", "template"]

THINKS = "enable_thinking"  # the variable by which templates of Qwen3 and others decide on a thinking part

IN_WORDS = {"raw": "transcript", "human_assistant": "transcript", "template": "chat template"}


def messages(transcript: str) -> list[dict[str, str]]:
    """The turns of a transcript as {"role", "content"}; an empty last turn of the assistant is the question's end and
    left out.

    What stands before the first header is the system's turn; a transcript may also begin with the first human header
    without its line breaks.
    """
    if transcript.startswith(HUMAN.lstrip()):
        transcript = HUMAN + transcript.removeprefix(HUMAN.lstrip())
    before, *parts = re.split(f"({re.escape(HUMAN)}|{re.escape(ASSISTANT)})", transcript)
    roles = {HUMAN: "user", ASSISTANT: "assistant"}
    turns = [{"role": "system", "content": before.strip()}] if before.strip() else []
    turns += [
        {"role": roles[header], "content": said.strip()} for header, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns


def prompt_ids(transcript: str, form: Form, tokenizer) -> list[int]:
    """Token ids of a dialogue that waits for the assistant's answer; raises C2FError for a dialogue that the template
    refuses."""
    if form != "template":
        return _encoded(transcript, tokenizer)
    try:
        text = tokenizer.apply_chat_template(messages(transcript), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise C2FError(
            f"the chat template of {tokenizer.name_or_path!r} refuses the dialogue {transcript[:60]!r} ({error}); set "
            "models.base_form and models.instruct_form to 'raw', or leave such dialogues out"
        ) from error
    return _encoded(text, tokenizer, add_special_tokens=False)


def _encoded(text: str, tokenizer, **options) -> list[int]:
    """Token ids without the EOS that some tokenizers put after every text."""
    ids = tokenizer(text, **options)["input_ids"]
    put = ids[-1:] == [tokenizer.eos_token_id] and options.get("add_special_tokens", True)
    return ids[:-1] if put else ids  # a template's own last EOS stays


def answer_ids(answer: str, transcript: str, form: Form, tokenizer) -> list[int]:
    """Token ids of a text as the answer to a dialogue, without EOS; in a transcript they continue its last header."""
    if form == "template":
        return _encoded(answer.strip(), tokenizer, add_special_tokens=False)
    prompt, whole = _encoded(transcript, tokenizer), _encoded(transcript + answer, tokenizer)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return _encoded(answer, tokenizer, add_special_tokens=False)


def stop_strings(form: Form, of_data: Sequence[str]) -> list[str]:
    """The texts that end an answer, beside EOS."""
    return [*of_data, *([HUMAN] if form == "human_assistant" and HUMAN not in of_data else [])]


def refuse_missing(form: Form, tokenizer, setting: str) -> None:
    """Raise C2FError when a form asks for a chat template that the tokenizer does not have."""
    if form == "template" and not tokenizer.chat_template:
        raise C2FError(no_template(setting, tokenizer.name_or_path))


def refuse_undecided(tokenizer, options: Mapping[str, object]) -> None:
    """Raise C2FError for a chat template with the variable `enable_thinking` that the options do not give; a model that
    always thinks, or is asked by another variable, is not known by this."""
    if THINKS in tokenizer.chat_template and THINKS not in options:
        raise C2FError(
            f"the chat template of {tokenizer.name_or_path!r} asks whether the model thinks first ({THINKS}), and "
            "left to itself it mostly does, at the cost of the answer's limit: set models.template_options to "
            f"{{{THINKS}: false}}, or to true where thoughts are to be measured, rewarded and judged as answers"
        )


def refuse_endless(tokenizer, ends: Collection[int]) -> None:
    """Raise C2FError where the chat template ends an answer in a special token that does not end the model's answers:
    they would go on into turns of their own making."""
    behind = end_of_turn(tokenizer)
    if behind and not {*behind} & {*ends}:
        named = tokenizer.convert_ids_to_tokens([behind[0], *sorted(ends)])
        raise C2FError(
            f"the chat template of {tokenizer.name_or_path!r} ends an answer with {named[0]!r}, and its model's "
            f"answers end at {', '.join(map(repr, named[1:]))} only; name it in eos_token_id of generation_config.json "
            "or as eos_token of tokenizer_config.json, or take the template away and use the form 'raw'"
        )


def end_of_turn(tokenizer) -> list[int]:
    """The special tokens that the chat template puts right behind an answer; none where it puts other text, or
    refuses."""
    said = "This is what was answered."
    turns = [{"role": "user", "content": "What was answered?"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # whatever it raises is said where a dialogue of the data is put in this form
        return []
    behind = tokenizer(text.rpartition(said)[2].lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    return list(takewhile(special.__contains__, behind))


def set_options(tokenizer, options: Mapping[str, object]) -> None:
    """Have every use of the tokenizer's chat template, also by libraries, get these variables."""
    if options:
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **options)


def no_template(setting: str, source: str) -> str:
    """What to say of a model without the chat template that `setting` asks for."""
    return (
        f"{setting} = 'template', but the tokenizer of {source!r} has no chat template; expected one in "
        f"chat_template.jinja or tokenizer_config.json: add it, or set {setting} to 'raw' or 'human_assistant'"
    )
