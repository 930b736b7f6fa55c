"""Suites of tasks, asked by lm-eval of a model that is already loaded.

Question: what is a model worth on tasks that others know? A suite is a data file (`suite_files/`): ours on problems of
this project or on files of the user's, or a list of lm-eval's own tasks. Each task is prepared once, then asked of one
model after another. lm-eval's caches stay off: its result cache knows a request and not who answered it, its request
cache survives a changed prompt. What is kept here is named by a digest of everything that decides it (`Prepared.key`).
"""

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from c2f_utils.domain import forms, task_files
from c2f_utils.domain.problems import Problem, stated
from c2f_utils.errors import C2FError
from c2f_utils.files import plain, read_json, read_jsonl, read_mapping, write_json, write_text
from c2f_utils.models.library_trainers import quiet
from c2f_utils.weights import first_line

OURS = ("embedded", "local", "general_11")
CHOICES = 4  # of an embedded problem: its result and three others
FEWSHOT_SEED = 1234  # lm-eval's own default
FEWSHOT = "fewshot"  # split with the worked examples of a local file


@dataclass
class Prepared:
    """One task (or group of tasks) as lm-eval loaded it. `headline` is the metric and filter that tables show, None for
    the first that it has; `identity` is a digest of its configuration and documents; `chance` the share that guessing
    among its choices gets right."""

    name: str
    suite: str
    headline: str | None
    loaded: dict = field(repr=False)  # as TaskManager.load gives it
    identity: str
    chance: float | None

    def key(self, model: str, tokenizer, template: bool, limit: int, batch: int) -> dict:
        """Everything that decides its results: `model` is the digest of weights, their type and configuration."""
        import lm_eval

        return {
            "task": self.name, "task_identity": self.identity, "headline": self.headline, "model": model,
            "tokenizer": _digest([tokenizer.get_vocab(), _backend(tokenizer)]),
            "template": _digest(tokenizer.chat_template) if template else None,
            "limit": limit, "batch": batch, "lm_eval": lm_eval.__version__, "fewshot_seed": FEWSHOT_SEED,
        }  # fmt: skip


# What is asked


def embedded(problems: Sequence[Problem], seed: int, limit: int, folder: Path) -> list[dict]:
    """The tasks of suite `embedded` on these problems, written to `folder`; an answer has at most `limit` tokens."""
    rng = random.Random(f"choices-{seed}")
    rows: dict[str, list[dict]] = {"c2f_choice": [], "c2f_generation": []}
    for problem in problems:
        question = " ".join(problem.words)
        others = [value for value in range(problem.largest + 1) if value != problem.answer]
        values = [problem.answer, *rng.sample(others, CHOICES - 1)]
        rng.shuffle(values)
        choices = [" ".join(stated(value)) for value in values]
        rows["c2f_choice"].append({"question": question, "choices": choices, "right": values.index(problem.answer)})
        rows["c2f_generation"].append({"question": question, "answer": str(problem.answer)})
    return [_written(entry, entry["task"], rows[entry["task"]], [], limit, folder) for entry in suite("embedded")]


def local(tasks: Sequence[task_files.TaskFile], shots: int, limit: int, folder: Path) -> list[dict]:
    """The tasks of suite `local`, one per file, written to `folder`; the first `shots` rows are worked examples.

    Raises C2FError for a file without a row beside its examples.
    """
    shapes = {entry["task"]: entry for entry in suite("local")}
    for task in tasks:
        if len(task.rows) <= shots:
            raise C2FError(
                f"{task.path} holds {len(task.rows)} rows, and tasks.shots = {shots} of them are worked examples; "
                "add rows, or lower tasks.shots"
            )
    return [_written(shapes[t.shape], t.name, t.rows[shots:], t.rows[:shots], limit, folder) for t in tasks]


def suite(name: str) -> list[dict]:
    """The entries of a suite of ours: lm-eval's configuration of each task, and its `headline`."""
    return read_mapping(Path(__file__).parent / "suite_files" / f"{name}.yaml", "suite")["tasks"]


def _written(entry: dict, name: str, rows: list[dict], examples: list[dict], limit: int, folder: Path) -> dict:
    """One task with its rows and its YAML file in `folder`, which lm-eval's command line takes as --include_path."""
    paths = {"test": folder / f"{name}.jsonl"} | ({FEWSHOT: folder / f"{name}.{FEWSHOT}.jsonl"} if examples else {})
    for split, content in (("test", rows), (FEWSHOT, examples)):
        if split in paths:
            write_text(paths[split], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content))
    config = {key: value for key, value in entry.items() if key != "headline"} | {
        "task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": len(examples),
        # Absolute: lm-eval looks for relative ones where it was started.
        "dataset_kwargs": {
            "data_files": {split: str(path.absolute()) for split, path in paths.items()},
            "cache_dir": str((folder / "cache").absolute()),
        },
    }  # fmt: skip
    if examples:
        config |= {"fewshot_split": FEWSHOT, "fewshot_config": {"sampler": "first_n"}}
    if config["output_type"] == "generate_until":
        config["generation_kwargs"] = config["generation_kwargs"] | {"max_gen_toks": limit}
    write_text(folder / f"{name}.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return config | {"headline": entry["headline"]}


def prepare(entries: Sequence[tuple[str, str | dict]], log: Path) -> list[Prepared]:
    """Load tasks, given as (suite, configuration or name of lm-eval's); what lm-eval says goes to `log`.

    Raises C2FError for a name that lm-eval does not know and for data that cannot be had from here.
    """
    with _silent(log):
        from lm_eval.tasks import TaskManager

        # Looking through lm-eval's own thousands of tasks takes ten seconds.
        foreign = [entry["task"] if isinstance(entry, dict) else entry for _, entry in entries if _foreign(entry)]
        manager = TaskManager(include_defaults=bool(foreign))
        if unknown := [name for name in foreign if name not in manager.all_tasks]:
            raise C2FError(
                f"tasks.suites: lm-eval knows no task {', '.join(map(repr, unknown))}; expected embedded, local, "
                "general_11 or a name from `lm_eval ls tasks`"
            )
        return [_prepared(manager, suite, entry) for suite, entry in entries]


def _foreign(entry: str | dict) -> bool:
    return isinstance(entry, str) or "dataset_path" not in entry


def _prepared(manager, suite: str, entry: str | dict) -> Prepared:
    entry = {"task": entry} if isinstance(entry, str) else dict(entry)
    headline = entry.pop("headline", None)
    try:
        loaded = manager.load([entry["task"] if _foreign(entry) else entry])
        docs = {name: list(task.eval_docs) for name, task in loaded["tasks"].items()}
    except Exception as error:  # data sets come by many libraries; all their errors mean the same to the user
        raise C2FError(
            f"tasks.suites: the data of {entry['task']} cannot be loaded ({first_line(error)}); it comes from the hub: "
            "unset HF_HUB_OFFLINE, set HF_HOME to a cache that has it, or take it out of tasks.suites"
        ) from error
    said = []
    for name, task in loaded["tasks"].items():
        # As lm-eval's own entry does: what the task says, else none.
        task.set_config("num_fewshot", entry.get("num_fewshot", task.get_config("num_fewshot") or 0))
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        config = {key: value for key, value in task.dump_config().items() if key != "dataset_kwargs"}
        examples = list(task.fewshot_docs()) if task.get_config("num_fewshot") else []
        said.append([name, config, docs[name], examples])
    choices = [
        len(task.doc_to_choice(doc)) if task.OUTPUT_TYPE == "multiple_choice" else 0
        for name, task in loaded["tasks"].items()
        for doc in docs[name]
    ]
    chance = sum(1 / n for n in choices) / len(choices) if choices and all(choices) else None
    return Prepared(entry["task"], suite, headline, loaded, _digest(said), chance)


# Who is asked


def harness(model, tokenizer, template: bool, batch: int, log: Path):
    """A loaded model as lm-eval takes one. Raises C2FError unless prompts become the tokens that they are elsewhere in
    this project: BOS once, no EOS at the end."""
    with _silent(log):
        from lm_eval.models.huggingface import HFLM

        # A template says where BOS stands; otherwise the tokenizer does.
        found = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, add_bos_token=False if template else None)
    asked = "Question: how many?\nAnswer:"
    if template:
        text = found.apply_chat_template([{"role": "user", "content": asked}])
        ours = forms.prompt_ids(f"{forms.HUMAN} {asked}{forms.ASSISTANT}", "template", tokenizer)
    else:
        text, ours = asked, forms.prompt_ids(asked, "raw", tokenizer)
    theirs = found.tok_encode(text)
    if theirs != ours:
        raise C2FError(
            f"tasks: with the tokenizer of {tokenizer.name_or_path!r} lm-eval reads the prompt {asked!r} as "
            f"{theirs}, and 07 as {ours}; its scores would be of other prompts: set tasks.suites to []"
        )
    return found


def ask(task: Prepared, lm, template: bool, limit: int, log: Path) -> tuple[dict, list[dict]]:
    """One task's results and one row per question; `limit` is the number of questions, 0 for all.

    The results hold `score` (the headline metric), all `metrics` as lm-eval names them, `shots`, `versions` and `n`;
    a row the question's place and hashes, the response, the target and its own metrics.
    """
    with _silent(log):
        from lm_eval.evaluator import evaluate

        found = evaluate(
            lm, task.loaded, limit=limit or None, bootstrap_iters=0, apply_chat_template=template,
            fewshot_as_multiturn=True,
        )  # fmt: skip
    reported = {
        key: value
        for key, value in (found.get("groups", {}) | found["results"])[task.name].items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    headline = task.headline or next(iter(reported), None)
    if headline not in reported:
        raise C2FError(
            f"task {task.name} has no metric {headline!r}; it reports {', '.join(reported) or 'none that is a number'}"
        )
    rows = [row for name, samples in found["samples"].items() for row in _rows(name, samples)]
    shots = sorted({found["n-shot"][name] for name in found["samples"]})
    result = {
        "score": reported[headline], "metric": headline, "metrics": reported, "n": len(rows), "shots": shots[-1],
        "versions": {name: found["versions"].get(name) for name in found["samples"]},
        "cut_prompts": _cut(lm, task, found["samples"]),
    }  # fmt: skip
    return plain(result), plain(rows)


def _rows(name: str, samples: list[dict]) -> Iterator[dict]:
    """One row per document; lm-eval gives one per document and filter."""
    rows: dict[int, dict] = {}
    for sample in samples:
        row = rows.setdefault(sample["doc_id"], {
            "task": name, "doc": sample["doc_id"], "doc_hash": sample["doc_hash"],
            "prompt_hash": sample["prompt_hash"], "prompt": sample["arguments"][0][0],
            "response": [answer for answers in sample["resps"] for answer in answers], "target": sample["target"],
            "read": {}, "metrics": {},
        })  # fmt: skip
        row["read"][sample["filter"]] = sample["filtered_resps"]
        values = {name: sample[name] for name in sample["metrics"]}
        row["metrics"] |= {
            f"{metric},{sample['filter']}": float(value)
            for metric, value in values.items()
            if isinstance(value, int | float) or hasattr(value, "item")
        }
    yield from rows.values()


def _cut(lm, task: Prepared, samples: dict[str, list[dict]]) -> int:
    """Prompts of which lm-eval left out the beginning, because prompt and answer would not fit the model."""
    cut = set()
    for name, rows in samples.items():
        for row in rows:
            prompt, second = row["arguments"][0][0], row["arguments"][0][1]
            room = second.get("max_gen_toks", lm.max_gen_toks) if isinstance(second, dict) else 0
            longest = max([0, *(len(lm.tok_encode(second)) for _, second in row["arguments"])]) if not room else room
            if len(lm.tok_encode(prompt)) + longest > lm.max_length:
                cut.add((name, row["doc_id"]))
    return len(cut)


# What is kept


def place_of(key: dict) -> str:
    """Name of the folder of what has this key."""
    return _digest(key)[:24]


def kept(folder: Path, key: dict) -> tuple[dict, list[dict]] | None:
    """Results and rows of this task and this model, if an earlier call finished them."""
    place = folder / place_of(key)
    if not (place / "result.json").is_file():
        return None
    return read_json(place / "result.json")["result"], read_jsonl(place / "samples.jsonl")


def keep(folder: Path, key: dict, result: dict, rows: list[dict]) -> None:
    """Write rows, then results with the key that names them: where there are results, there are all rows."""
    place = folder / place_of(key)
    write_text(place / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(place / "result.json", {"key": key, "result": result})


def values(result: dict, rows: Sequence[dict]) -> list[float] | None:
    """The headline metric of every question, if the score is their mean; None where it is something else."""
    found = [row["metrics"].get(result["metric"]) for row in rows]
    if not found or None in found or not math.isclose(sum(found) / len(found), result["score"], abs_tol=1e-9):
        return None
    return found


def _backend(tokenizer) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else None


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()


@contextlib.contextmanager
def _silent(log: Path) -> Iterator[None]:
    """Bars and lines of lm-eval and of the libraries under it go to a file; a notebook would drown in them."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file, quiet():
        with contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
            yield
