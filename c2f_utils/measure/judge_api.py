"""A judge behind an OpenAI-compatible server: any base URL, within a budget that a kill cannot make it exceed.

Every request is written to a ledger before it is sent, and its reply as soon as it is there. So what a question may
cost at most is counted before it costs it, also under concurrency, and what was in the air when the process was killed
is known: it may have been paid for, is not asked again, and is counted as without a verdict. The key comes from the
environment (OPENAI_API_KEY) and is taken out of every text that is kept or shown.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from c2f_utils.errors import C2FError
from c2f_utils.files import append_jsonl, read_jsonl
from c2f_utils.measure import judge_prompts
from c2f_utils.measure.judges import Case, Opinion, mend

KEY = "OPENAI_API_KEY"
OVERHEAD = 64  # tokens that a server's chat template may put around two messages
LONGEST_WAIT = 60.0  # seconds between two attempts
SILENT = 3  # questions in succession without any reply, after which the server counts as down


@dataclass(frozen=True)
class Server:
    """Where the judge is and how it is asked; prices are per million tokens, 0 = not known."""

    base_url: str
    model: str
    max_tokens: int = 1024
    temperature: float = 0.0
    length_field: str = "max_tokens"
    timeout: float = 120.0
    attempts: int = 5
    concurrency: int = 4
    price_input: float = 0.0
    price_output: float = 0.0


class Budget(NamedTuple):
    """The most that a judge may spend, over all restarts."""

    calls: int
    tokens: int


class Ledger:
    """What was asked and what came back, on disk: {"asked", "tokens"} before a request is sent, with the most that it
    may cost, then {"replied", "tokens", "value", "raw", "final"} with what it did cost."""

    def __init__(self, path: Path, budget: Budget):
        self.path, self.budget = Path(path), budget
        self.calls = self.tokens = 0
        self.replies: dict[str, Opinion] = {}
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        mend(self.path)
        for number, row in enumerate(read_jsonl(self.path), start=1):
            try:
                self._read(row)
            except (KeyError, TypeError, AttributeError):
                raise C2FError(
                    f"{self.path}, line {number}: no entry of a judge's ledger; move the file away"
                ) from None

    def _read(self, row: dict) -> None:
        if "asked" in row:
            self._opened(row["asked"], row["tokens"])
        else:
            self._closed(row["replied"], row["tokens"], Opinion(row["value"], row["raw"], row["final"]))

    def _opened(self, key: str, tokens: int) -> None:
        self.calls, self.tokens, self._open[key] = self.calls + 1, self.tokens + tokens, tokens

    def _closed(self, key: str, tokens: int, opinion: Opinion) -> None:
        self.tokens += tokens - self._open.pop(key)
        self.replies[key] = opinion

    def known(self, key: str) -> Opinion | None:
        """What is known of a question that must not be asked again."""
        if key in self._open:
            return Opinion(None, "interrupted: it was asked, and no reply was kept; it is not asked again")
        found = self.replies.get(key)
        return found if found and found.final else None

    def reserve(self, key: str, tokens: int) -> bool:
        """Write down that a question is asked; False, and nothing is written, where the budget does not allow it."""
        with self._lock:
            if self.calls + 1 > self.budget.calls or self.tokens + tokens > self.budget.tokens:
                return False
            append_jsonl(self.path, {"asked": key, "tokens": tokens})
            self._opened(key, tokens)
            return True

    def settle(self, key: str, tokens: int, opinion: Opinion) -> None:
        """Write down what came back and what it cost."""
        row = {"replied": key, "tokens": tokens, "value": opinion.value, "raw": opinion.raw, "final": opinion.final}
        with self._lock:
            append_jsonl(self.path, row)
            self._closed(key, tokens, opinion)


class OpenAICompatibleJudge:
    """Asks a chat model on a server and reads the verdict in its reply.

    Dropped connections, time-outs, 408, 409, 429, 5xx and replies that are no chat completion are tried again with
    growing pauses, each attempt within the budget. Raises C2FError without the `openai` package, where the server
    refuses the key or the model, and where it does not reply at all.
    """

    name = "openai"

    def __init__(
        self, server: Server, templates: dict[str, judge_prompts.Template], ledger: Ledger,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        openai = client()
        self._library, self.server, self.templates, self.ledger, self._sleep = openai, server, templates, ledger, sleep
        self._key = os.environ.get(KEY, "")
        self._client = openai.OpenAI(
            base_url=server.base_url, api_key=self._key or "none", max_retries=0, timeout=server.timeout
        )
        decoding = f"T={server.temperature:g}:{server.max_tokens}"
        self.id = f"openai:{server.model}@{server.base_url}:{decoding}:{judge_prompts.digest(templates)}"
        self._silent = 0

    def opinions(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Opinion]]:
        with ThreadPoolExecutor(self.server.concurrency) as pool:
            asked = {pool.submit(self._opinion, case): case for case in cases}
            try:
                for future in as_completed(asked):
                    yield asked[future], future.result()
            finally:  # stopped or failed: what has not begun is not asked, what has is in the ledger when it ends
                for future in asked:
                    future.cancel()

    def most_tokens(self, case: Case) -> int:
        """An upper bound of what a question costs: no tokenizer makes more tokens than bytes."""
        text = "".join(message["content"] for message in judge_prompts.messages(case, self.templates))
        return len(text.encode()) + OVERHEAD + self.server.max_tokens

    def _opinion(self, case: Case) -> Opinion:
        key, most = case.key(self.id), self.most_tokens(case)
        if known := self.ledger.known(key):
            return known
        opinion = Opinion(None, "", final=False)
        for attempt in range(self.server.attempts):
            if not self.ledger.reserve(key, most):
                calls, tokens = self.ledger.budget
                spent = f"the budget of {calls} calls and {tokens} tokens does not allow another request"
                return Opinion(None, f"{spent}; {opinion.raw}".rstrip("; "), final=False)
            try:
                opinion, tokens, wait = self._attempt(case, most)
            except C2FError as error:
                self.ledger.settle(key, 0, Opinion(None, str(error), final=False))
                raise
            self.ledger.settle(key, tokens, opinion)
            if opinion.final:
                self._silent = 0
                return opinion
            if attempt + 1 < self.server.attempts:
                self._sleep(min(LONGEST_WAIT, wait or 2.0**attempt * random.uniform(1, 1.5)))
        self._silent += 1
        if self._silent >= SILENT:
            raise C2FError(
                f"judge.base_url = {self.server.base_url!r} did not reply to {self._silent} questions in succession, "
                f"{self.server.attempts} attempts each ({opinion.raw}); what was said is kept: start the server, and "
                "run this again"
            )
        return opinion

    def _attempt(self, case: Case, most: int) -> tuple[Opinion, int, float | None]:
        """An opinion, the tokens that it cost, and for how many seconds the server asks to be left alone."""
        server, openai = self.server, self._library
        try:
            reply = self._client.chat.completions.create(
                model=server.model, messages=judge_prompts.messages(case, self.templates),
                temperature=server.temperature, **{server.length_field: server.max_tokens},
            )  # fmt: skip
            text = reply.choices[0].message.content
            used = reply.usage.total_tokens if reply.usage else most
        except openai.APIStatusError as error:
            return self._refused(error)
        except openai.APIConnectionError as error:  # time-outs are among them: they may have cost all that they could
            return Opinion(None, self._clean(f"no reply: {error}"), final=False), most, None
        except (openai.OpenAIError, ValueError, AttributeError, TypeError, IndexError) as error:
            why = f"no chat completion: {type(error).__name__}: {error}"
            return Opinion(None, self._clean(why), final=False), most, None
        if not isinstance(text, str):
            return Opinion(None, "a reply without text"), used, None
        return judge_prompts.opinion(case, self._clean(text)), used, None

    def _refused(self, error) -> tuple[Opinion, int, float | None]:
        status, said = error.status_code, self._clean(str(error))[:300]
        if status in (401, 403, 404):
            raise C2FError(
                f"judge.base_url = {self.server.base_url!r} refuses model {self.server.model!r} (status {status}: "
                f"{said}); check judge.base_url and judge.model, and set the key in the environment as {KEY}"
            )
        if status in (408, 409, 429) or status >= 500:
            return Opinion(None, f"status {status}: {said}", final=False), 0, _seconds(error.response.headers)
        return Opinion(None, f"status {status}: {said}"), 0, None

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def client():
    """The package that speaks to the server; C2FError that says how to install it where it is missing."""
    try:
        import openai
    except ImportError:
        raise C2FError(
            "judge.name = 'openai' needs the package openai: pip install 'c2f-utils[judge]', or choose another judge"
        ) from None
    return openai


def _seconds(headers) -> float | None:
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return None


def cost(server: Server, calls: int, tokens_in: int, budget: Budget) -> str:
    """What a judge will cost, in words, before it is asked: nothing is sent."""
    written = calls * server.max_tokens
    text = f"{calls} calls to {server.model} at {server.base_url}, about {tokens_in} tokens read and at most {written} "
    text += "written"
    if server.price_input or server.price_output:
        text += (
            f", about {(tokens_in * server.price_input + written * server.price_output) / 1e6:.2f} at the prices given"
        )
    return f"{text}; the budget is {budget.calls} calls and {budget.tokens} tokens, retries included"
