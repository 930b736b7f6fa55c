"""Settings of the judge: what is asked in dialogues of 07, who judges the answers, and what that may cost."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from c2f_utils.settings.kinds import NonNegative, Positive, Section


class Judge(Section):
    """Dialogues of 07: what is asked, and who says which of two answers is better."""

    name: Literal["reward", "local", "openai", "heuristic", "none"] = Field(
        "reward",
        description="reward = a held-out reward model, local = a language model here, openai = a server with that "
        "interface (extra 'judge', key in OPENAI_API_KEY), heuristic = for dry runs, none = no dialogues",
    )
    questions: Positive = Field(24, description="questions at most, of one or two turns")
    prompts: str | None = Field(
        None, description="question.jsonl of FastChat, or AlpacaEval's instructions; null: test problems or prompts"
    )
    categories: list[str] = Field([], description="categories of `prompts` beside those of MT-Bench")
    references: str | None = Field(None, description="FastChat's file of reference answers to `prompts`")
    templates: str | None = Field(None, description="FastChat's judge_prompts.jsonl; null: a rubric of our own")
    grading: list[Literal["pairwise", "single"]] = Field(["pairwise"], min_length=1)
    portia: bool = Field(False, description=(
        "local, openai: show pairs on which the judge contradicts itself again, in aligned parts; four more verdicts "
        "each at most"
    ))  # fmt: skip
    against: list[str] = Field([], description="models that fine is compared with, as 07 names them; [] = all")
    max_tokens: Positive | None = Field(None, description="answer limit per turn, tokens; null: evaluation.max_tokens")
    pairs: Positive = Field(600, description="reward: preference pairs that the held-out model is trained on")
    model: str | None = Field(None, description="local: folder or hub id; openai: the model's name on the server")
    base_url: str | None = Field(None, description="openai: e.g. http://127.0.0.1:8000/v1")
    calls: Positive = Field(2000, description="openai: requests at most, retries and restarts included")
    tokens: Positive = Field(5_000_000, description="openai: tokens at most, read and written")
    reply_tokens: Positive = Field(1024, description="openai: longest reply, tokens")
    length_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="openai: what the server calls the longest reply"
    )
    temperature: NonNegative = Field(0.0, description="openai: of the judge's replies")
    concurrency: Positive = Field(4, description="openai: requests at a time")
    attempts: Positive = Field(5, description="openai: attempts per question, with growing pauses")
    timeout: Annotated[float, Field(gt=0)] = Field(120.0, description="openai: seconds per request")
    price_input: NonNegative = Field(0.0, description="openai: price of a million tokens read; 0 = not known")
    price_output: NonNegative = Field(0.0, description="openai: price of a million tokens written; 0 = not known")

    @model_validator(mode="after")
    def _judge_is_named(self) -> "Judge":
        found = []
        if self.name in ("local", "openai") and not self.model:
            found.append(f"model is null, and name = {self.name!r} needs one")
        if self.name == "openai" and not (self.base_url or "").startswith(("http://", "https://")):
            found.append(f"base_url = {self.base_url!r}: name = 'openai' needs one such as 'http://127.0.0.1:8000/v1'")
        if "@" in (self.base_url or ""):
            found.append("base_url holds a name or a password; the key belongs into the environment, as OPENAI_API_KEY")
        if self.references and not self.prompts:
            found.append("references need prompts: name the question.jsonl that they answer")
        if found:
            raise ValueError("\n".join(found))
        return self
