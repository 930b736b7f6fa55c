"""The report of one or several runs, redrawn from their results files alone; nothing is computed by a model here.

Question: what goes in the paper, and how far does it carry? Inputs: run directories. Outputs: `report.md`,
`report.html` (one file, pictures inside), `figures/` (PDF, PNG, CSV), `tables/` (CSV, Markdown, LaTeX) and
`manifest.json` with the SHA-256 of each file and of the results behind them. What is missing is named together with
the notebook that makes it. Needs no torch.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from c2f_utils.errors import C2FError, CannotWrite
from c2f_utils.files import sha256, write_json, write_text
from c2f_utils.report import against, compare, contents, figures, first_page, sources, tables, typeset, verdicts
from c2f_utils.report.document import Document, to_html, to_markdown
from c2f_utils.report.letters import in_markdown
from c2f_utils.report.results import DECODINGS, MAIN, origin_of

_DRAWING_ERRORS = (C2FError, KeyError, IndexError, TypeError, ValueError, AttributeError)


def build(
    run_dir: object,
    out_dir: object,
    runs: Iterable[object] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the whole report to `out_dir` and return the path of `report.html`; `progress` is called with the figures
    and tables there are and, as far as they can be counted beforehand, all of them.

    `run_dir` is the run shown in full; `runs` are further runs (directories, or ids beside it), compared with it run
    by run. If `run_dir` holds no results, the first of `runs` is shown in full. Raises C2FError when no run has any.
    """
    places = (Path(getattr(place, "dir", place)) for place in (run_dir, out_dir))
    return _Builder(*places, runs, progress).build()


def overview(run_dir: object) -> str:
    """The short form of a report as Markdown: its first page, the table of models and every sentence, or what has not
    been run."""
    run = Path(getattr(run_dir, "dir", run_dir))
    stages = sources.find_stages(run)
    found, damaged = sources.results_of(stages)
    said = first_page.sentences({name: stages[name] for name in found}, found)
    parts = [*damaged, _listed(said)]
    if results := found.get("07_evaluation"):
        frame = contents.summary_of(results)
        decoding = sources.decodings(results)[0]
        parts += [f"Models of run {in_markdown(run.name)}, {DECODINGS[decoding]}. {in_markdown(typeset.note(frame))}"]
        parts += [re.sub(r"(\d), (?=[−\d])", "\\1,\u00a0", typeset.markdown(frame))]  # no line ends in an interval
    for name, results in found.items():
        words = [] if verdicts.dry(stages[name]) else verdicts.everything({name: results}).get(name, [])
        if words := [line for line in words if line not in said]:
            parts.append(f"**{sources.STAGES[name][0]}**\n\n" + _listed(words))
    if missing := [name for name in sources.STAGES if name not in found]:
        parts.append("Not run yet: " + ", ".join(f"notebooks/{name}.ipynb" for name in missing) + ".")
    return "\n\n".join(parts) + "\n"


def _listed(words: Iterable[str]) -> str:
    return "\n".join(f"- {in_markdown(line)}" for line in words)


class _Builder:
    """State of one report: the document so far, the files written, and what could not be made."""

    def __init__(self, run: Path, out: Path, runs: Iterable[object], progress: Callable[[int, int], None]) -> None:
        others = list(dict.fromkeys(sources.run_path(run, other) for other in runs))
        candidates = sources.with_results(run, others)
        if not candidates:
            names = ", ".join(str(path) for path in [run, *others])
            raise C2FError(f"no results in {names}; run the notebooks first: {sources.command(run, 'all')}")
        self.run, self.out = candidates[0], out
        self.runs = candidates
        self.empty = [path for path in others if not sources.find_stages(path)]
        there = sources.find_stages(self.run)
        self.results, self.missing = sources.results_of(there)
        self.stages = {name: there[name] for name in self.results}
        self.progress, self.pieces = progress, 0
        self.expected = self._expected()
        self.written: list[str] = []
        self.said: list[str] = []
        self.dry = any(verdicts.dry(path) for path in self.stages.values())
        self.document = Document(f"Coarse-to-fine report: run {self.run.name}")

    def build(self) -> Path:
        self._first_page()
        self._origins()
        self._provenance()
        for name in sources.STAGES:
            self._stage(name)
        if len(self.runs) > 1:
            self._seeds()
        self._timings()
        self._missing()
        self.document.heading("What this does not show")
        self.document.bullets(list(sources.DOES_NOT_SHOW))
        self.progress(self.expected, self.expected)
        return self._write()

    # Parts

    def _words(self, name: str) -> list[str]:
        """What is said of a stage beyond the first page; nothing of a dry run."""
        if self.dry:
            return []
        try:
            words = verdicts.everything({name: self.results[name]}).get(name, [])
            words = [*words, *contents.words_of(name, self.results[name])]
            return [line for line in words if line not in self.said]
        except _DRAWING_ERRORS as error:
            self.missing.append(f"words on {name}: could not be found ({type(error).__name__}: {error})")
            return []

    def _first_page(self) -> None:
        """What the run shows, in sentences, then in the first figures and tables, then where to find the rest."""
        doc = self.document
        doc.heading("What this run shows, and what it does not")
        try:
            judged = [run for run in self.runs if "07_evaluation" in sources.find_stages(run)]
            alike = next((arm for arm in compare.arms(judged) if self.run in arm), [])
            stages = [sources.find_stages(run)["07_evaluation"] for run in alike]
            seeds = [sources.read(path / "config.json").get("settings", {}).get("seed") for path in stages]
            self.said = first_page.sentences(self.stages, self.results, seeds)
        except _DRAWING_ERRORS as error:
            self._failed("page", "the first", error)
        doc.bullets(self.said)
        if "07_evaluation" in self.results:
            self._figures("07_evaluation", first=True)
        self._figure("hero", lambda: figures.hero(self.stages), "The run in one picture.")
        doc.heading("Contents", 3)
        doc.contents()
        if found := self.results.get("07_evaluation"):
            doc.heading("The models in numbers")
            way = DECODINGS[self._decodings()[0]]
            self._table("models_summary", lambda: contents.summary_of(found), f"All models, {way}.")
            caption = f"Fine minus every other model, {way}; p after Holm's correction over all rows."
            self._table("07_against", lambda: against.table(found, self._decodings()[0]), caption)

    def _origins(self) -> None:
        self.document.heading("What is the paper's and what is ours")
        self.document.text(sources.PAPER)
        self.document.text(sources.OURS)

    def _figures(self, name: str, first: bool) -> None:
        """The figures of a stage that belong on the first page, or the others."""
        for key, draw, caption in contents.figures_of(name, self.stages[name], self.results):
            if first == (key == "forest"):
                self._figure(f"{name[:2]}_{key}", draw, caption)

    def _provenance(self) -> None:
        doc = self.document
        doc.heading("Runs, seeds and versions")
        self._figure("lineage", lambda: figures.lineage(self.run), "Which stage was made from which.")
        paths = [path for run in self.runs for path in sources.find_stages(run).values()]
        paths = list(dict.fromkeys(paths))
        self._table("runs", lambda: sources.runs_table(paths), "Every stage this report was made from.")
        lent = [
            f"{path.name} comes from run {path.parent.name}" for path in self.stages.values() if path.parent != self.run
        ]
        if lent:
            doc.text("Lent by other runs: " + "; ".join(lent) + ".")
        sessions = [
            session for path in paths for session in sources.read(path / "provenance.json").get("sessions") or []
        ]
        kinds = {}
        for session in sessions:
            machine = session.get("machine") or {}
            line = "; ".join(
                f"{key} {value}" for key, value in [*machine.items(), *(session.get("versions") or {}).items()]
            )
            kinds.setdefault(line, None)
        doc.bullets([f"Software and machine: {line}." for line in kinds if line])
        commits = {str((session.get("code") or {}).get("commit")) for session in sessions}
        if len(commits) > 1:
            doc.text(f"Attention: the stages were made by {len(commits)} versions of the code.")
        if any((session.get("code") or {}).get("dirty") for session in sessions):
            doc.text("Attention: some stages were made by code with changes that are not in the commit named.")

    def _stage(self, name: str) -> None:
        title, question = sources.STAGES[name]
        doc = self.document
        doc.heading(f"{name[:2]} {title}")
        doc.text(question)
        if name not in self.results:
            self.missing.append(
                f"{name}: not run; notebooks/{name}.ipynb makes it ({sources.command(self.run, name[:2])})"
            )
            doc.text(f"Not run yet: notebooks/{name}.ipynb makes this section.")
            return
        self.missing += [f"{name}: {file} is damaged" for file in sources.damaged(self.stages[name])]
        status = sources.read(self.stages[name] / "status.json")
        if status.get("status") not in (None, "done"):
            doc.text(f"This stage is {status['status']}, not done: its numbers are those of an unfinished run.")
            self.missing.append(f"{name}: {status['status']}, not done; run it again to continue")
        if status.get("alarms"):
            doc.bullets([f"Alarm while running: {alarm}" for alarm in status["alarms"]])
        doc.bullets(self._words(name))
        self._figures(name, first=False)
        for key, make, caption in contents.tables_of(name, self.results[name], self.stages[name]):
            self._table(f"{name[:2]}_{key}", make, caption)
        facts = sources.facts_table(self.results[name])
        if len(facts):
            self._table(f"{name[:2]}facts_table", lambda: facts, "Single numbers of this stage.")
        if name == "03_coarse_rlhf":
            self._probes()
        if name == "07_evaluation":
            self._samples()

    def _decodings(self) -> list[str]:
        return sources.decodings(self.results["07_evaluation"])

    def _probes(self) -> None:
        probes = self.results["03_coarse_rlhf"].get("probes") or []
        prompt = probes[0]["prompt"] if probes else None
        mine = [row for row in probes if row["prompt"] == prompt]
        if mine:
            self.document.heading("One probe prompt during training", 3)
            rows = [mine[0], mine[-1]] if len(mine) > 1 else mine
            columns = [
                (f"iteration {row['iteration']}, {row.get('tokens')} tokens", sources.marked_words(row["text"]))
                for row in rows
            ]
            self.document.answers(sources.clip(prompt), columns)

    def _samples(self) -> None:
        rows = sources.rows(self.stages["07_evaluation"] / "samples.jsonl")
        way = self._decodings()[0]
        rows = [row for row in rows if row.get("decoding") == way and row.get("model") in MAIN]
        models = self.results["07_evaluation"].get("models") or {}
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:2]
        if not prompts:
            return
        self.document.heading("Answers side by side", 3)
        self.document.text(
            f"The first prompts of the test, {DECODINGS[way]}; repeated 4-grams are marked in the HTML report."
        )
        for prompt in prompts:
            mine = {row["model"]: row for row in reversed(rows) if row["prompt"] == prompt}
            columns = [
                (
                    f"{models.get(name, {}).get('label') or name} ({mine[name].get('tokens')} tokens)",
                    sources.marked_words(mine[name]["text"]),
                )
                for name in MAIN
                if name in mine
            ]
            self.document.answers(sources.clip(prompt), columns)

    def _seeds(self) -> None:
        doc, name = self.document, "07_evaluation"
        doc.heading("Across runs")
        judged = {run.name: sources.find_stages(run).get(name) for run in self.runs}
        for run, path in judged.items():
            if path is None:
                made_by = sources.command(self.run.parent / run, name[:2])
                self.missing.append(f"{name} of run {run}: not run; notebooks/{name}.ipynb makes it ({made_by})")
        names = [run for run, path in judged.items() if path is not None]
        found = [sources.read(judged[run] / "results.json") for run in names]
        seeds = [sources.read(judged[run] / "config.json").get("settings", {}).get("seed") for run in names]
        if len(names) < 2:
            doc.text("Fewer than two runs have an evaluation, so nothing is said across runs.")
            return
        doc.text("Runs: " + ", ".join(f"{run} (seed {seed})" for run, seed in zip(names, seeds, strict=True)) + ".")
        if len(set(seeds)) < len(seeds):
            doc.text("Attention: some runs share a seed; they are not independent, and the intervals are too narrow.")
        experiments = compare.arms([run for run in self.runs if run.name in names])
        if len(experiments) == 1:
            self._repetitions("runs", found, names)
            return
        doc.text(
            f"Attention: these are {len(experiments)} experiments, not seeds of one. Their settings differ as the "
            "table says; nothing is averaged over them."
        )
        runs = [run for run in self.runs if run.name in names]
        self._table("runs_settings", lambda: compare.settings(runs), "Settings, the seed aside, that differ.")
        for number, arm in enumerate(experiments, start=1):
            mine = [run.name for run in arm]
            doc.heading(f"Experiment {number}: {', '.join(mine)}", 3)
            self._repetitions(f"runs_{number}", [found[names.index(name)] for name in mine], mine)

    def _repetitions(self, name: str, found: list[dict], names: list[str]) -> None:
        """Runs that differ in their seed alone, decoding by decoding."""
        decodings = [way for way in DECODINGS if any(way in m for r in found for m in (r.get("models") or {}).values())]
        for way in decodings:
            if len(found) > 1:
                caption = f"Fine minus every other model, mean and 95 % t-interval over runs, {DECODINGS[way]}."
                self._figure(f"{name}_forest_{way}", lambda way=way: figures.seed_forest(found, names, way), caption)
            caption = f"Every run, the mean and its 95 % t-interval over runs, {DECODINGS[way]}."
            self._figure(f"{name}_{way}", lambda way=way: figures.seed_overview(found, names, way), caption)
            self._table(f"{name}_{way}", lambda way=way: tables.seed_table(found, names, way), caption)
            means = f"Means over runs, {DECODINGS[way]}."
            self._table(f"{name}_means_{way}", lambda way=way: tables.seed_means(found, names, way), means)

    def _timings(self) -> None:
        self.document.heading("Time and memory")
        for run in self.runs:
            name = f"timings_{run.name}" if len(self.runs) > 1 else "timings"
            frame = tables.timings_table(run)
            frame = frame[frame["stage"].isin(sources.STAGES)].reset_index(drop=True)
            total = pd.to_numeric(frame["wall_s"]).sum()
            peak = pd.to_numeric(frame["peak_mb"]).max()
            words = f"Run {run.name}: {total:.0f} s of wall time in the stages that ended"
            words += f", peak memory {peak:.0f} MiB." if pd.notna(peak) else ", peak memory not recorded."
            self._table(name, lambda frame=frame: frame, words)

    def _missing(self) -> None:
        self.document.heading("What is missing")
        self.missing += [f"run {path.name}: no results in {path.name}" for path in self.empty]
        if sources.unchecked(self.results.get("07_evaluation") or {}):
            self.missing.append(
                "accuracy, correct steps and utility: null, because the exact checker knows only the embedded domain; "
                "figures show the reward instead"
            )
        self.document.bullets(self.missing)
        if not self.missing:
            self.document.text("Nothing: every stage has been run and every figure and table could be made.")

    # Files

    def _expected(self) -> int:
        """About how many figures and tables there will be."""
        parts = (contents.figures_of(n, self.stages[n], self.results) + contents.tables_of(n, self.results[n])
                 for n in self.stages)  # fmt: skip
        across = 4 * len(DECODINGS) if len(self.runs) > 1 else 0
        return sum(len(part) + 1 for part in parts) + len(self.runs) + across + 5

    def _count(self) -> None:
        """One more figure or table is begun."""
        self.pieces += 1
        self.progress(min(self.pieces, self.expected) - 1, self.expected)

    def _figure(self, name: str, draw: Callable[[], Figure], caption: str) -> None:
        self._count()
        try:
            figure = draw()
            figures.save_figure(figure, self.out / "figures", name)
        except _DRAWING_ERRORS as error:
            self._failed("figure", name, error)
            return
        self.document.figure(name, caption)
        self.written += [f"figures/{name}.{kind}" for kind in ("pdf", "png", "csv")]

    def _table(self, name: str, make: Callable[[], pd.DataFrame], caption: str) -> None:
        self._count()
        try:
            frame = make()
            if frame.empty:
                return
            if self.dry:  # nothing is best, nothing is better
                frame = frame.drop(columns="verdict", errors="ignore")
                frame.attrs = {}
            frame = tables.save_table(frame, self.out / "tables", name, caption, self._origin(name))
        except _DRAWING_ERRORS as error:
            self._failed("table", name, error)
            return
        self.document.table(name, caption, frame)
        self.written += [f"tables/{name}.{kind}" for kind in tables.kinds(frame)]

    def _origin(self, name: str) -> str:
        """The stage that a table is about, by the number that its name begins with, or all runs shown."""
        found = [path for stage, path in self.stages.items() if name.startswith(f"{stage[:2]}")]
        return origin_of(found[0]) if found else f"runs {', '.join(run.name for run in self.runs)}"

    def _failed(self, kind: str, name: str, error: Exception) -> None:
        """A run that was cut short may hold odd results: the rest of the report is still made, and says so."""
        if isinstance(error, CannotWrite):
            raise error
        ours = "" if isinstance(error, C2FError) else f"not as expected: {type(error).__name__} "
        words = f"{kind} {name}: could not be made ({ours}{error})"
        self.missing.append(words)
        self.document.text(f"Not shown: {words}.")

    def _write(self) -> Path:
        before = sources.read(self.out / "manifest.json").get("files", {})
        write_text(self.out / "report.md", to_markdown(self.document))
        write_text(self.out / "report.html", to_html(self.document, self.out))
        files = sorted([*self.written, "report.md", "report.html"])
        for stale in set(before) - set(files):
            # Only names that an earlier report of ours listed, and only below its own folders.
            if stale.split("/")[0] in ("figures", "tables") and ".." not in stale:
                (self.out / stale).unlink(missing_ok=True)
        manifest = sources.made_from(self.runs, self.stages, files)
        manifest["files"] = {name: sha256(self.out / name) for name in files}
        manifest["missing"] = [self.document.hidden.taken_out(words) for words in self.missing]
        write_json(self.out / "manifest.json", manifest)
        return self.out / "report.html"
