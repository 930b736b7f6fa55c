"""Model answers as plain HTML: works in JupyterLab, in executed notebooks and in exports, without widgets or scripts.

Everything a model or a data set wrote is shown letter by letter. Words inside a 4-gram that has occurred before in the
same answer are marked, so that loops are seen at a glance.
"""

import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from c2f_utils.files import root
from c2f_utils.redundancy import repeated_spans
from c2f_utils.report.letters import in_html, without_mathematics

_CHIP = "display:inline-block;border:1px solid #bbb;border-radius:8px;padding:0 6px;margin:0 4px 4px 0;font-size:85%"
_TEXT = "white-space:pre-wrap;text-align:left;vertical-align:top;overflow-wrap:anywhere"
_STOPS = {"eos": "ended by itself", "limit": "cut by the limit", "string": "ended by itself (stop text)"}


class Html:
    """A piece of HTML that notebooks render; `text` is what a terminal shows instead."""

    def __init__(self, markup: str, text: str = "") -> None:
        self.markup = markup
        self.text = text or re.sub(r"<[^>]+>", " ", markup)

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return without_mathematics(self.markup)


def marked(text: str) -> str:
    """The text letter by letter, with every run of words that lie in a repeated 4-gram inside one `<mark>`."""
    pieces = re.findall(r"\s+|\S+", text)
    repeated = iter(repeated_spans([piece for piece in pieces if not piece.isspace()]))
    flags = [None if piece.isspace() else bool(next(repeated)) for piece in pieces]
    out, inside = [], False
    for index, (piece, flag) in enumerate(zip(pieces, flags, strict=True)):
        # A gap belongs to the mark when both of its neighbours do.
        following = flags[index + 1] if index + 1 < len(flags) else False
        flag = (inside and bool(following)) if flag is None else flag
        if flag != inside:
            out.append("<mark>" if flag else "</mark>")
            inside = flag
        out.append(in_html(piece))
    return "".join(out) + ("</mark>" if inside else "")


def chips(sample: Mapping[str, object]) -> str:
    """Small labels of an answer: tokens, limit, reward, utility, how it stopped; what is unknown (null) is left out."""
    labels = []
    if sample.get("tokens") is not None:
        limit = f" of at most {sample['limit']}" if sample.get("limit") else ""
        labels.append(f"{sample['tokens']}{limit} tokens")
    labels += [f"{key} {sample[key]:.2f}" for key in ("reward", "utility") if sample.get(key) is not None]
    if sample.get("correct_steps") is not None:
        labels.append(f"{sample['correct_steps']} correct step" + "s" * (sample["correct_steps"] != 1))
    if sample.get("stop") is not None:
        labels.append(_STOPS.get(str(sample["stop"]), str(sample["stop"])))
    return "".join(f"<span style='{_CHIP}'>{in_html(label)}</span>" for label in labels)


def links(*files: Path) -> Html:
    """Links to files, relative to the notebook's folder, so that JupyterLab and an export can follow them; those after
    the second are in a fold."""
    items, base = [], root()
    for path in files:
        name = os.path.relpath(path, base) if path.is_relative_to(base) else str(path)
        place = quote(os.path.relpath(path).replace(os.sep, "/"))
        items.append(f"<li><a href='{place}' target='_blank'>{in_html(name)}</a></li>")
    markup = f"<ul>{''.join(items[:2])}</ul>"
    if more := items[2:]:
        markup += f"<details><summary>{len(more)} more</summary><ul>{''.join(more)}</ul></details>"
    return Html(markup, "\n".join(str(path) for path in files))


def sample_browser(samples: Iterable[Mapping[str, object]], limit: int = 8) -> Html:
    """One fold per prompt (the first open), its answers side by side in the order of training.

    A sample has `prompt`, `text` and `iteration` (or `model`), and optionally what `chips` shows; at most `limit`
    prompts.
    """
    by_prompt: dict[str, list[Mapping[str, object]]] = {}
    for sample in samples:
        by_prompt.setdefault(str(sample["prompt"]), []).append(sample)
    folds = []
    for number, (prompt, answers) in enumerate(list(by_prompt.items())[:limit]):
        shown = [(_heading(sample), sample) for sample in answers]
        folds.append(
            f"<details{' open' if number == 0 else ''}><summary>{in_html(_short(prompt))}</summary>"
            f"{prompt_of(prompt) if _short(prompt) != prompt else ''}{_columns(shown)}</details>"
        )
    return Html("".join(folds) or "<p>No samples.</p>")


def side_by_side(
    samples_by_model: Mapping[str, Sequence[Mapping[str, object]]], limit: int = 4, blind: bool = False, seed: int = 0
) -> Html:
    """The models' answers to the same prompts in equal columns; only prompts that every model has answered are shown.

    With `blind`, the columns are called A, B, C, ... in an order shuffled anew for each prompt, without the labels that
    tell models apart, and the names are in a fold. `vote.vote` keeps what a reader chooses.
    """
    answers = {model: {str(sample["prompt"]): sample for sample in found} for model, found in samples_by_model.items()}
    first = next(iter(answers.values()), {})
    prompts = [prompt for prompt in first if all(prompt in found for found in answers.values())][:limit]
    order = random.Random(seed)  # its own generator: looking at samples must not move the experiment's
    blocks = []
    for prompt in prompts:
        models = list(answers)
        if blind:
            order.shuffle(models)
        names = [chr(ord("A") + index) for index in range(len(models))] if blind else models
        named = list(zip(names, models, strict=True))
        block = prompt_of(prompt) + _columns([(name, answers[model][prompt]) for name, model in named], not blind)
        if blind:
            key = ", ".join(f"{name} = {model}" for name, model in named)
            block += f"<details><summary>Which is which?</summary>{in_html(key)}</details>"
        blocks.append(block)
    return Html("<hr>".join(blocks) or "<p>No prompt was answered by every model.</p>")


def _columns(answers: Sequence[tuple[str, Mapping[str, object]]], labelled: bool = True) -> str:
    labels = [chips(sample) for _, sample in answers] if labelled else []
    return columns([name for name, _ in answers], [marked(str(sample["text"])) for _, sample in answers], labels)


def columns(names: Sequence[str], texts: Sequence[str], labels: Sequence[str] = ()) -> str:
    """Equal columns of texts that are HTML, under names and, where there are any, labels."""
    width = f"width:{100 / len(names):.2f}%"
    heads = "".join(f"<th style='{width};text-align:left{_rule(name)}'>{in_html(name)}</th>" for name in names)
    chosen = "".join(f"<td style='text-align:left;vertical-align:top'>{label}</td>" for label in labels)
    body = "".join(f"<td style='{_TEXT}'>{text}</td>" for text in texts)
    rows = "".join(f"<tr>{row}</tr>" for row in (heads if any(names) else "", chosen, body) if row)
    return f"<table style='table-layout:fixed;width:100%'>{rows}</table>"


def _rule(name: str) -> str:
    """A line under a model's name in the colour it has in every figure."""
    from c2f_utils.report.style import ROLE_COLOURS

    return f";border-bottom:3px solid {ROLE_COLOURS[name]}" if name in ROLE_COLOURS else ""


def prompt_of(prompt: str) -> str:
    """A prompt above its answers."""
    return f"<p style='white-space:pre-wrap'><b>{in_html(prompt)}</b></p>"


def _heading(sample: Mapping[str, object]) -> str:
    return f"iteration {sample['iteration']}" if sample.get("iteration") is not None else str(sample.get("model", ""))


def _short(text: str, length: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
