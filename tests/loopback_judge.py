"""A server on loopback with OpenAI's chat interface: the embedded model answers, and it fails as it is told."""

import json
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from tiny_models import TOKENIZER, causal

from c2f_utils.domain.samples import Prompt
from c2f_utils.rollout.decoder import KVDecoder


class Loopback:
    """`faults` are taken one per request, in order: drop, hang, 429, 500, 401, 400, html, cut, empty, unreadable."""

    def __init__(self, faults=(), delay: float = 0.0):
        self.model, self.faults, self.delay = causal(), list(faults), delay
        self.asked: Counter[str] = Counter()  # by what the user's message says
        self.keys: list[str] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def reply(self, messages: list[dict]) -> tuple[str, int, int]:
        """Words of the embedded model and a verdict: the answer that it finds likelier; tokens read and written."""
        user = messages[-1]["content"]
        parts = user.split("# Answer 1 of ")
        ids = TOKENIZER(user)["input_ids"]
        words = KVDecoder(self.model, TOKENIZER)([Prompt(tuple(ids[-64:]), user)], 8, temperature=0.0)[0].text
        a, b = (self.likelihood(part[1:].strip()) for part in parts[1:3])
        return f"{words} [[{'A' if a > b else 'B' if b > a else 'C'}]]", len(ids), 10

    def likelihood(self, text: str) -> float:
        ids = torch.tensor([TOKENIZER(text)["input_ids"][:64]])
        with torch.no_grad():
            logps = self.model(ids).logits[0, :-1].log_softmax(-1)
        return float(logps.gather(-1, ids[0, 1:, None]).mean())


@contextmanager
def serving(loopback: Loopback):
    """The base URL of a running server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with loopback.lock:
                loopback.asked[body["messages"][-1]["content"]] += 1
                loopback.keys.append(self.headers.get("Authorization", ""))
                fault = loopback.faults.pop(0) if loopback.faults else None
                loopback.at_once += 1
                loopback.most_at_once = max(loopback.most_at_once, loopback.at_once)
            try:
                time.sleep(loopback.delay)
                self.answer(body, fault)
            finally:
                with loopback.lock:
                    loopback.at_once -= 1

        def answer(self, body: dict, fault: str | None) -> None:
            if fault == "drop":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            elif fault == "hang":
                time.sleep(1.5)
                self.close_connection = True
            elif fault in ("400", "401", "429", "500"):
                said = f"Incorrect key {self.headers.get('Authorization')}" if fault == "401" else "not now"
                self.send(json.dumps({"error": {"message": said}}), int(fault))
            elif fault == "html":
                self.send("<html>a gateway</html>", kind="text/html")
            elif fault == "cut":
                self.send('{"choices": [{"mess')
            elif fault == "empty":
                self.send("{}")
            else:
                text, read, written = loopback.reply(body["messages"])
                text = "I cannot decide." if fault == "unreadable" else text
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
                reply = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
                self.send(json.dumps(reply | {"choices": [choice], "usage": usage}))

        def send(self, text: str, status: int = 200, kind: str = "application/json") -> None:
            content = text.encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "7")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
