"""The judge against the library's own server, `transformers serve`, with the embedded model."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from test_judge_api import cases
from tiny_models import TOKENIZER, causal

from c2f_utils.measure import judge_prompts
from c2f_utils.measure.judge_api import Budget, Ledger, OpenAICompatibleJudge, Server
from c2f_utils.measure.judges import Verdicts

pytestmark = pytest.mark.slow
for name in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(name)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Base URL and model of a running server; its replies are words of the embedded domain."""
    folder = tmp_path_factory.mktemp("served") / "model"
    model = causal()
    model.config.max_position_embeddings = 2048
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1"]
    log = open(folder.parent / "log", "w")
    server = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu"], env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=log,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    until = time.monotonic() + 180
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            break
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    else:
        pytest.fail((folder.parent / "log").read_text()[-2000:])
    yield f"http://127.0.0.1:{port}/v1", str(folder)
    server.terminate()
    server.wait(30)
    log.close()


def test_a_real_server_is_asked_once_per_question_and_its_words_are_kept(served, tmp_path):
    url, model = served
    server = Server(url, model, max_tokens=8, concurrency=2)

    def opinions():
        ledger = Ledger(tmp_path / "ledger.jsonl", Budget(100, 10**6))
        judge = OpenAICompatibleJudge(server, judge_prompts.defaults(), ledger)
        return Verdicts(tmp_path / "verdicts.jsonl").opinions(cases(3), judge), ledger

    found, ledger = opinions()
    assert [o.ok for o in found] == [False] * 3, "the embedded model has no word for a verdict"
    assert all(o.final and o.raw.split()[0] in TOKENIZER.get_vocab() for o in found), [o.raw for o in found]
    assert ledger.calls == 3 and 0 < ledger.tokens < 3 * 1000
    again, ledger = opinions()
    assert again == found and ledger.calls == 3
