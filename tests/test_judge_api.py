"""A judge behind a server: failures are tried again, nothing is asked twice, the budget holds, the key is secret."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback_judge import Loopback, serving

from c2f_utils.domain import stories
from c2f_utils.errors import C2FError, Stopped
from c2f_utils.measure import judge_prompts
from c2f_utils.measure.judge_api import KEY, Budget, Ledger, OpenAICompatibleJudge, Server, cost
from c2f_utils.measure.judges import Case, Question, Verdicts

pytest.importorskip("openai")

PROBLEMS = stories.problems("test", 12, 0)
AMPLE = Budget(10_000, 100_000_000)


def cases(count: int = 6) -> list[Case]:
    """One per problem; which of two answers is shown first alternates."""
    shown = [((f"answer : {p.answer} .",), ("this is not easy .",)) for p in PROBLEMS[:count]]
    return [
        Case(Question(n, "embedded", (" ".join(p.words),)), 1, both[:: 1 - n % 2 * 2])
        for n, (p, both) in enumerate(zip(PROBLEMS, shown, strict=False))
    ]


class Judging:
    """A judge with its files in a folder, and how long it slept."""

    def __init__(self, url: str, folder: Path, budget: Budget = AMPLE, **options):
        self.slept: list[float] = []
        server = Server(url, "embedded", max_tokens=32, **({"concurrency": 1, "timeout": 20.0} | options))
        ledger = Ledger(folder / "ledger.jsonl", budget)
        self.judge = OpenAICompatibleJudge(server, judge_prompts.defaults(), ledger, self.slept.append)
        self.verdicts = Verdicts(folder / "verdicts.jsonl")

    def opinions(self, asked: list[Case], **watch):
        return self.verdicts.opinions(asked, self.judge, **watch)


def test_a_server_is_asked_and_its_verdicts_are_read(tmp_path):
    loopback = Loopback()
    with serving(loopback) as url:
        judging = Judging(url, tmp_path)
        found = judging.opinions(cases())
        again = Judging(url, tmp_path).opinions(cases())
    assert all(o.value in (0.0, 0.5, 1.0) and "[[" in o.raw for o in found) and len({o.value for o in found}) > 1
    assert again == found and set(loopback.asked.values()) == {1}, "what is known is not asked again"


@pytest.mark.parametrize("fault", ["drop", "hang", "429", "500", "html", "cut", "empty"])
def test_what_fails_is_tried_again(tmp_path, fault):
    loopback = Loopback([fault])
    with serving(loopback) as url:
        judging = Judging(url, tmp_path, timeout=1.0 if fault == "hang" else 20.0)
        found = judging.opinions(cases(2))
    assert all(o.ok for o in found) and sum(loopback.asked.values()) == 3
    assert len(judging.slept) == 1 and (judging.slept[0] == 7 if fault == "429" else 1 <= judging.slept[0] <= 1.5)
    assert judging.judge.ledger.calls == 3, "an attempt that failed is a call"


def test_pauses_grow(tmp_path):
    with serving(Loopback(["500", "drop", "500"])) as url:
        judging = Judging(url, tmp_path)
        assert judging.opinions(cases(1))[0].ok
    assert [pause // 2**n for n, pause in enumerate(judging.slept)] == [1, 1, 1], judging.slept


def test_a_verdict_that_cannot_be_read_is_kept_as_such_and_not_asked_again(tmp_path):
    loopback = Loopback(["unreadable"])
    with serving(loopback) as url:
        found = Judging(url, tmp_path).opinions(cases(2))
        Judging(url, tmp_path).opinions(cases(2))
    assert [o.ok for o in found] == [False, True] and found[0].raw == "I cannot decide."
    assert set(loopback.asked.values()) == {1}


def test_a_question_that_the_server_will_not_take_fails_alone(tmp_path):
    with serving(Loopback(["400"])) as url:
        found = Judging(url, tmp_path).opinions(cases(2))
    assert [o.ok for o in found] == [False, True] and "status 400" in found[0].raw


def test_a_server_that_is_down_ends_the_work_and_the_next_run_goes_on(tmp_path):
    loopback = Loopback([None, *["500"] * 6])
    with serving(loopback) as url:
        with pytest.raises(C2FError, match="did not reply to 3 questions in succession, 2 attempts each"):
            Judging(url, tmp_path, attempts=2).opinions(cases())
        assert all(o.ok for o in Judging(url, tmp_path).opinions(cases()))
        first = max(
            loopback.asked, key=lambda text: PROBLEMS[0].words[2] in text and " ".join(PROBLEMS[0].words) in text
        )
    assert loopback.asked[first] == 1, "the one that was answered is not asked again"


def test_the_key_comes_from_the_environment_and_is_in_no_file_and_no_message(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv(KEY, "sk-very-secret")
    loopback = Loopback([None, "401"])
    caplog.set_level(logging.DEBUG)
    with serving(loopback) as url:
        judging = Judging(url, tmp_path)
        with pytest.raises(C2FError, match="refuses model 'embedded' .status 401") as error:
            judging.opinions(cases(2))
        assert all(o.ok for o in Judging(url, tmp_path).opinions(cases(2))), "with the right key it goes on"
    assert loopback.keys[0] == "Bearer sk-very-secret" and "[key]" in str(error.value)
    said = (
        "".join(path.read_text() for path in tmp_path.iterdir()) + str(error.value) + caplog.text + repr(judging.judge)
    )
    assert "very-secret" not in said + "".join(capfd.readouterr())


@pytest.mark.parametrize("concurrency", [1, 6])
def test_the_budget_of_calls_is_never_exceeded(tmp_path, concurrency):
    loopback = Loopback(["500", "drop"], delay=0.02)
    with serving(loopback) as url:
        for _ in range(3):  # restarts do not renew it
            judging = Judging(url, tmp_path, Budget(7, 10**9), concurrency=concurrency)
            found = judging.opinions(cases(12))
    assert sum(loopback.asked.values()) == 7 and sum(o.ok for o in found) == 5
    assert {o.raw.split(";")[0] for o in found if not o.ok} == {
        "the budget of 7 calls and 1000000000 tokens does not allow another request"
    }


@pytest.mark.parametrize("concurrency", [1, 6])
def test_the_budget_of_tokens_is_never_exceeded(tmp_path, concurrency):
    loopback = Loopback(delay=0.02)
    (tmp_path / "free").mkdir()
    with serving(Loopback()) as url:
        free = Judging(url, tmp_path / "free")
        free.opinions(cases(12))
    # Half of what all cost, and room for the bound of one question: enough for some, not for all.
    limit = free.judge.ledger.tokens // 2 + max(map(free.judge.most_tokens, cases(12)))
    with serving(loopback) as url:
        judging = Judging(url, tmp_path, Budget(1000, limit), concurrency=concurrency)
        found = judging.opinions(cases(12))
        entries = map(json.loads, (tmp_path / "ledger.jsonl").read_text().splitlines())
        spent = sum(entry["tokens"] for entry in entries if "replied" in entry)
    assert 0 < sum(o.ok for o in found) < 12 and spent == judging.judge.ledger.tokens <= limit
    assert sum(loopback.asked.values()) == sum(o.ok for o in found)


def test_requests_are_made_side_by_side_but_no_more_than_allowed(tmp_path):
    loopback = Loopback(delay=0.2)
    with serving(loopback) as url:
        Judging(url, tmp_path, concurrency=3).opinions(cases(9))
    assert 2 <= loopback.most_at_once <= 3


def test_a_stop_ends_the_asking_and_keeps_what_was_said(tmp_path):
    loopback = Loopback(delay=0.05)
    with serving(loopback) as url:
        with pytest.raises(Stopped):
            Judging(url, tmp_path, concurrency=2).opinions(cases(12), stop=lambda: True)
        assert sum(loopback.asked.values()) < 12
        assert all(o.ok for o in Judging(url, tmp_path).opinions(cases(12)))
    assert set(loopback.asked.values()) == {1}, "requests that were under way were kept in the ledger"


CHILD = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from test_judge_api import Judging, cases
Judging({url!r}, Path({folder!r}), concurrency=3).opinions(cases(12))
"""


def test_killed_at_any_point_nothing_is_asked_twice(tmp_path):
    loopback = Loopback(delay=0.1)
    tests = Path(__file__).parent
    with serving(loopback) as url:
        code = CHILD.format(tests=str(tests), root=str(tests.parent), url=url, folder=str(tmp_path))
        for kill_at in (2, 4, 7):
            child = subprocess.Popen([sys.executable, "-c", code], env=os.environ, stderr=subprocess.PIPE)
            until = time.monotonic() + 60
            while sum(loopback.asked.values()) < kill_at and child.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            child.send_signal(signal.SIGKILL)
            child.wait()
        judging = Judging(url, tmp_path)
        found = judging.opinions(cases(12))
    assert set(loopback.asked.values()) == {1}, loopback.asked.values()
    lost = [o for o in found if not o.ok]
    assert len(lost) <= 9 and all(o.raw.startswith("interrupted") for o in lost), "three at a time, three kills"
    assert judging.judge.ledger.calls == sum(o.ok for o in found) + len(lost), "what may have been paid for is counted"


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_ledger_cut_by_a_kill_is_read_and_a_foreign_one_refused(tmp_path, cut):
    with serving(Loopback()) as url:
        Judging(url, tmp_path).opinions(cases(2))
        path = tmp_path / "ledger.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
        ledger = Ledger(path, AMPLE)
        assert ledger.calls == 2 and len(ledger.replies) == 1
        path.write_text('{"replied": "x"}\n')
        with pytest.raises(C2FError, match="line 1: no entry of a judge's ledger"):
            Ledger(path, AMPLE)


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(C2FError, match=r"pip install 'c2f-utils\[judge\]'"):
        Judging("http://127.0.0.1:9/v1", tmp_path)


def test_the_cost_is_said_before_anything_is_sent():
    server = Server("http://127.0.0.1:9/v1", "m", max_tokens=100, price_input=2.0, price_output=10.0)
    said = cost(server, 50, 200_000, Budget(60, 300_000))
    assert "50 calls to m" in said and "about 200000 tokens read and at most 5000 written, about 0.45 at" in said
    assert "budget is 60 calls and 300000 tokens" in said
