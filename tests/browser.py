"""A headless Chromium, spoken to by its DevTools protocol, and a JupyterLab for it to open: what a person would see."""

import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import websocket  # comes with jupyterlab

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One tab; `evaluate` gives the value of a JavaScript expression in it, of a promise when it is kept."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self._numbers = itertools.count()

    def ask(self, method: str, **parameters: object) -> dict:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := json.loads(self._socket.recv())).get("id") != number:
            pass  # an event
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, expression: str) -> object:
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")


def wait(what: Callable[[], object], seconds: float = 90) -> object:
    """The first value of `what()` that is true."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, f"waited {seconds} s"
        time.sleep(0.2)
    return found


@contextlib.contextmanager
def chromium(folder: Path, width: int = 1400, height: int = 3000) -> Iterator[Page]:
    """An empty tab of a browser whose profile lies in `folder`."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               f"--window-size={width},{height}", "--remote-debugging-port=0", f"--user-data-dir={folder}"]  # fmt: skip
    with _started(command, os.environ):
        wrote = folder / "DevToolsActivePort"
        port = wait(lambda: wrote.is_file() and wrote.read_text().partition("\n")[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(tab for tab in json.load(answer) if tab["type"] == "page")
        yield Page(tab["webSocketDebuggerUrl"])


@contextlib.contextmanager
def lab(
    folder: Path, own: Path, environment: dict[str, str] | None = None, *options: str
) -> Iterator[Callable[[str], str]]:
    """A JupyterLab on the files in `folder`, its own files in `own`; gives the address of a file by its name."""
    token = secrets.token_hex(16)
    kinds = {"JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"}
    kinds |= {"JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", *options]  # fmt: skip
    with _started(command, (environment or os.environ) | {kind: str(own / kind) for kind in kinds}):
        runtime = own / "JUPYTER_RUNTIME_DIR"
        place = wait(lambda: next(runtime.glob("jpserver-*-open.html"), None))
        url = json.loads(place.with_name(place.name.replace("-open.html", ".json")).read_text())["url"]
        yield lambda name: f"{url}lab/tree/{name}?token={token}"


@contextlib.contextmanager
def _started(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, start_new_session=True, **quiet) as process:
        try:
            yield
        finally:  # a polite end may never come; a kernel whose server is gone ends by itself
            os.killpg(process.pid, signal.SIGKILL)
