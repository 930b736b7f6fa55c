"""Which further tasks 07 asks of every model, and how."""

from typing import Literal

from pydantic import Field

from c2f_utils.settings.kinds import Count, Positive, Section


class Tasks(Section):
    """Tasks that lm-eval asks of every model of 07: suites of ours, files of the user's, or lm-eval's own."""

    suites: list[str] | None = Field(
        None,
        description="embedded, local, general_11, or names of lm-eval's tasks (the last two need the hub); null: "
        "embedded on the embedded domain, else none; [] none",
    )
    folder: str = Field("data/tasks", description="local: the folder of .jsonl and .json files, one task each")
    problems: Positive = Field(64, description="embedded: problems asked, at most data.test_prompts")
    shots: Count = Field(0, description="local: worked examples before each question, the first rows of its file")
    limit: Count = Field(0, description="local and lm-eval's: questions per task, the first ones; 0 = all")
    template: Literal["both", "raw", "template"] = Field(
        "both", description="prompts as they are, in the chat template, or both where 07 measures a model in both forms"
    )
    batch: Positive = Field(64, description="questions answered at a time; fewer if memory is short")


def wanted(tasks: Tasks, embedded: bool) -> list[str]:
    """The suites and tasks that the settings ask for, each once; `embedded` is whether answers can be checked."""
    usual = ["embedded"] if embedded else []
    return list(dict.fromkeys(usual if tasks.suites is None else tasks.suites))
