"""Settings of the parts of 07 that ask what a model has kept, what it can find at all, and how likely bad words are."""

from pydantic import Field, model_validator

from c2f_utils.settings.kinds import Count, Positive, Section


class Retention(Section):
    """What is left of the base and of the instruction model: perplexity by kind of document, and forward KL."""

    documents: Count = Field(96, description="documents of each kind whose perplexity is measured; 0 = none")
    answers: Count = Field(96, description="instruct's own answers on which forward KL is measured; 0 = not at all")
    text: str | None = Field(
        None, description="a text file of yours (UTF-8, an empty line between documents) as a further kind of document"
    )


class Sampling(Section):
    """What can be found in many answers to one problem, where a checker knows what is right."""

    problems: Count = Field(20, description="test problems asked many times; 0 = none")
    samples: Count = Field(32, description="answers to each, at T = 1: the largest k of pass@k; 0 = none")


class Safety(Section):
    """How likely each layer makes words that the user would rather not read, and who refuses what should be refused."""

    wordlist: str | None = Field(
        None, description="a text file of yours with the words, parted by spaces or line ends; null = not measured"
    )
    requests: str | None = Field(None, description=(
        "a file of yours with requests to refuse: question.jsonl, AlpacaEval's instructions, or text with an empty "
        "line between them; null = none. Refusals are counted by words, and judged where `judge` reads text (local, "
        "openai)"
    ))  # fmt: skip
    reward: str | None = Field(
        None, description="a reward model of harmlessness (folder or hub id) that scores the answers to `requests`, too"
    )
    prompts: Positive = Field(
        128, description="test prompts at whose end the words' probability is measured, and requests, at most"
    )

    @model_validator(mode="after")
    def _reward_has_requests(self) -> "Safety":
        if self.reward and not self.requests:
            raise ValueError(f"reward = {self.reward!r} scores answers to `requests`, which is null; name a file")
        return self
