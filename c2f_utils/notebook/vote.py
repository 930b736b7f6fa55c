"""Reading two models' answers blind: which is better, kept in a file of the run.

`vote(run)` shows a pair as A and B, `vote(run, "A", note="...")` keeps the choice and shows the next, `tally(run)` ends
the blindness. Nothing but the prompt and the two texts is shown: numbers of tokens, limits, scores, why an answer
stopped, colours and marked repetitions would tell models apart, or lead the reader. How long a text is and where it
breaks off stay visible: they are what is judged. No tally is shown between two pairs, as it would say who was A.

A line of `votes.jsonl`: {"models": [first, second], "decoding", "seed", "vote": number, "prompt", "a": the model shown
as A, "choice": "A", "B" or "tie", "note", "time"}. Lines are appended and never changed.
"""

import random
from collections.abc import Sequence

from c2f_utils import stats
from c2f_utils.errors import C2FError, short
from c2f_utils.files import append_jsonl, read_jsonl
from c2f_utils.notebook.progress import unattended
from c2f_utils.notebook.show import Html, columns, prompt_of
from c2f_utils.report.letters import in_html
from c2f_utils.runs import locks
from c2f_utils.runs.run import Run

CHOICES = ("A", "B", "tie")
_STAGE = "07_evaluation"
_shown: dict[tuple, int] = {}  # by folder and models: number of the vote that the pair on the screen waits for


def vote(
    run: Run,
    choice: str | None = None,
    note: str = "",
    models: Sequence[str] = ("fine", "instruct"),
    decoding: str = "sampled_t1",
    seed: int = 0,
) -> Html | None:
    """Keep a choice ("A", "B" or "tie") between the two answers that are shown, and show the next two.

    Every prompt that both models answered in 07 comes once, in the order of `seed`, before one comes again. Nothing
    happens in a run without a reader. Raises C2FError for a choice that is none, or that no pair shown waits for.
    """
    if unattended():
        return None
    pairs = _pairs(run, models, decoding)
    path = run.dir / _STAGE / "votes.jsonl"
    place = (str(path), tuple(models), decoding, seed)
    done = len(_votes(run, models, decoding, seed))
    if choice is not None:
        if choice not in CHOICES:
            raise C2FError(f"choice = {short(choice)}; expected one of {', '.join(CHOICES)}")
        if _shown.get(place) != done:
            raise C2FError(f"no pair is shown that waits for {choice!r}; look first: notebook.vote(run)")
        prompt, first = _next(pairs, models, done, seed)
        append_jsonl(path, {
            "models": list(models), "decoding": decoding, "seed": seed, "vote": done, "prompt": prompt, "a": first,
            "choice": choice, "note": str(note), "time": locks.now(),
        })  # fmt: skip
        done += 1
    _shown[place] = done
    prompt, first = _next(pairs, models, done, seed)
    second = models[1 - list(models).index(first)]
    texts = [("A", pairs[prompt][first]), ("B", pairs[prompt][second])]
    kept = f"{done} of {len(pairs)} pairs read"
    again = "" if done % len(pairs) or not done else "; all have been read, notebook.tally(run) says what was chosen"
    said = f'{kept}{again}. Choose in a cell: notebook.vote(run, "A", note="why"), or "B", or "tie".'
    body = columns([name for name, _ in texts], [in_html(text) for _, text in texts])
    return Html(f"{prompt_of(prompt)}{body}<p>{in_html(said)}</p>")


def tally(
    run: Run, models: Sequence[str] = ("fine", "instruct"), decoding: str = "sampled_t1", seed: int = 0
) -> Html | None:
    """How often the first model was preferred, ties half, with a Wilson interval for as many trials as prompts; and
    every note."""
    if unattended():
        return None
    votes = _votes(run, models, decoding, seed)
    if not votes:
        return Html("<p>No votes yet.</p>")
    chosen = [v["choice"] if v["choice"] == "tie" else v["a"] if v["choice"] == "A" else _other(v) for v in votes]
    won = (chosen.count(models[0]) + chosen.count("tie") / 2) / len(votes)
    trials = len({v["prompt"] for v in votes})
    bounds = stats.wilson(won * trials, trials)
    counts = ", ".join(f"{name} {chosen.count(name)}" for name in (*models, "tie"))
    said = f"{counts}; {models[0]} preferred in {won:.0%}, 95 % interval {bounds.low:.0%} to {bounds.high:.0%}"
    notes = [f"{choice}: {v['note']}" for choice, v in zip(chosen, votes, strict=True) if v["note"]]
    items = "".join(f"<li>{in_html(each)}</li>" for each in notes)
    return Html(f"<p>{in_html(said)} ({len(votes)} votes on {trials} prompts).</p><ul>{items}</ul>")


def _other(row: dict) -> str:
    return next(name for name in row["models"] if name != row["a"])


def _pairs(run: Run, models: Sequence[str], decoding: str) -> dict[str, dict[str, str]]:
    """By prompt the texts of both models; C2FError where there is nothing to compare."""
    if len(models) != 2 or len(set(models)) != 2:
        raise C2FError(f"models = {short(list(models))}; expected two different ones")
    path, found = run.dir / _STAGE / "samples.jsonl", {}
    rows = [row for row in read_jsonl(path) if row["decoding"] == decoding]
    known = list(dict.fromkeys(row["model"] for row in rows))
    if unknown := [name for name in models if name not in known]:
        there = f"there are {', '.join(known)}" if known else f"{path} has no such answers: run 07 first"
        raise C2FError(f"models names {', '.join(map(short, unknown))} under {decoding}; {there}")
    for row in rows:
        if row["model"] in models:
            found.setdefault(row["prompt"], {})[row["model"]] = row["text"]
    return {prompt: texts for prompt, texts in found.items() if len(texts) == 2}


def _votes(run: Run, models: Sequence[str], decoding: str, seed: int) -> list[dict]:
    rows = read_jsonl(run.dir / _STAGE / "votes.jsonl")
    mine = {"models": list(models), "decoding": decoding, "seed": seed}
    return [row for row in rows if all(row[key] == value for key, value in mine.items())]


def _next(pairs: dict, models: Sequence[str], done: int, seed: int) -> tuple[str, str]:
    """The prompt of vote number `done`, and the model that is shown as A; the same whenever it is asked."""
    order = random.Random(f"{seed}-{done // len(pairs)}")  # its own generator: reading must not move the experiment's
    prompts = list(pairs)
    order.shuffle(prompts)
    firsts = [order.choice(list(models)) for _ in prompts]
    return prompts[done % len(pairs)], firsts[done % len(pairs)]
