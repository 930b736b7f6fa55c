"""A report as a list of plain blocks, written once as Markdown with relative files and once as one HTML file.

Every text is plain text: both writers escape it, so that neither a prompt, a model's answer nor a label can become
markup. The HTML carries its pictures inside itself and asks for nothing from a network.
"""

import base64
import html
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from c2f_utils.private import Private
from c2f_utils.report import tables
from c2f_utils.report.letters import in_html, in_markdown, visible

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption, .files { color: #666; font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: left; } .number { text-align: right; }
pre { background: #f6f6f6; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
mark { background: #ffd9a0; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; }
""".strip()


@dataclass
class Block:
    """One piece of a report; which fields count depends on `kind`."""

    kind: str  # heading | text | list | code | figure | table | answers
    text: str = ""
    level: int = 2
    items: list = field(default_factory=list)
    name: str = ""
    frame: pd.DataFrame | None = None


@dataclass
class Document:
    """Blocks in order; figures and tables are named and lie in `figures/` and `tables/` beside the report.

    The report's own words tell no folder of this machine, also where an error named one; answers stay as they are.
    """

    title: str
    blocks: list[Block] = field(default_factory=list)
    hidden: Private = field(default_factory=Private, repr=False)

    def heading(self, text: str, level: int = 2) -> None:
        self.blocks.append(Block("heading", self.hidden.taken_out(text), level))

    def text(self, text: str) -> None:
        self.blocks.append(Block("text", self.hidden.taken_out(text)))

    def bullets(self, items: list[str]) -> None:
        if items:
            self.blocks.append(Block("list", items=[self.hidden.taken_out(item) for item in items]))

    def code(self, text: str) -> None:
        self.blocks.append(Block("code", self.hidden.taken_out(text)))

    def figure(self, name: str, caption: str) -> None:
        self.blocks.append(Block("figure", caption, name=name))

    def table(self, name: str, caption: str, frame: pd.DataFrame) -> None:
        self.blocks.append(Block("table", caption, name=name, frame=frame))

    def answers(self, prompt: str, columns: list[tuple[str, list[tuple[str, bool]]]]) -> None:
        """One prompt and the models' answers side by side: (label, [(word, repeated?), ...]) each."""
        self.blocks.append(Block("answers", prompt, items=columns))


def to_markdown(document: Document) -> str:
    """The report as Markdown; pictures are relative links, answers are in fences that they cannot close."""
    parts = [f"# {in_markdown(document.title)}", *(_markdown(block) for block in document.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block.kind:
        case "heading":
            return f"{'#' * block.level} {in_markdown(block.text)}"
        case "text":
            return _line(block.text)
        case "list":
            return "\n".join(f"- {in_markdown(item)}" for item in block.items)
        case "code":
            return _fenced(block.text)
        case "figure":
            files = " · ".join(f"[{kind.upper()}](figures/{block.name}.{kind})" for kind in ("pdf", "png", "csv"))
            return f"![{in_markdown(block.text)}](figures/{block.name}.png)\n\n{in_markdown(block.text)} ({files})"
        case "table":
            files = " · ".join(f"[{kind.upper()}](tables/{block.name}.{kind})" for kind in ("csv", "md", "tex"))
            return f"{in_markdown(block.text)} ({files})\n\n{tables.markdown(block.frame).rstrip()}"
        case "answers":
            shown = [f"Prompt:\n\n{_fenced(block.text)}"]
            for label, words in block.items:
                shown.append(f"{in_markdown(label)}:\n\n{_fenced(' '.join(word for word, _ in words))}")
            return "\n\n".join(shown)
    raise ValueError(f"a block of kind {block.kind!r} is unknown")


def _line(text: str) -> str:
    """A paragraph whose first character cannot start a list or a heading."""
    text = in_markdown(text)
    return "\\" + text if text[:1] in "-+=" else text


def _fenced(text: str) -> str:
    fence, text = "```", visible(text)
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def to_html(document: Document, directory: Path) -> str:
    """The report as one HTML file; pictures are read from `directory`/figures and embedded."""
    body = "\n".join(_html(block, Path(directory)) for block in document.blocks)
    title = in_html(document.title)
    plain = html.escape(visible(document.title))  # no element stands inside <title>
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{plain}</title>\n'
        f"<style>\n{_CSS}\n</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block, directory: Path) -> str:
    text = in_html(block.text)
    match block.kind:
        case "heading":
            return f"<h{block.level}>{text}</h{block.level}>"
        case "text":
            return f"<p>{text}</p>"
        case "list":
            return "<ul>\n" + "\n".join(f"<li>{in_html(item)}</li>" for item in block.items) + "\n</ul>"
        case "code":
            return f"<pre>{text}</pre>"
        case "figure":
            image = base64.b64encode((directory / "figures" / f"{block.name}.png").read_bytes()).decode()
            files = f"figures/{block.name}.pdf, .png, .csv"
            return (
                f'<figure><img alt="{html.escape(visible(block.text))}" src="data:image/png;base64,{image}">'
                f"<figcaption>{text} <span>({in_html(files)})</span></figcaption></figure>"
            )
        case "table":
            files = in_html(f"tables/{block.name}.csv, .md, .tex")
            return f'<p class="files">{text} ({files})</p>\n<div class="scroll">{tables.html(block.frame)}</div>'
        case "answers":
            columns = "\n".join(
                f"<div><strong>{in_html(label)}</strong><pre>{_marked(words)}</pre></div>"
                for label, words in block.items
            )
            return f'<p>Prompt:</p><pre>{text}</pre>\n<div class="answers">\n{columns}\n</div>'
    raise ValueError(f"a block of kind {block.kind!r} is unknown")


def _marked(words: list[tuple[str, bool]]) -> str:
    """Words with runs of repeated ones in <mark>."""
    shown, inside = [], False
    for word, repeated in words:
        if repeated != inside:
            shown.append("<mark>" if repeated else "</mark>")
            inside = repeated
        shown.append(in_html(word) + " ")
    return "".join(shown) + ("</mark>" if inside else "")
