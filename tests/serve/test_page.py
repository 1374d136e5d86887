"""The page of `tqgguf serve`, in a browser without a window: a conversation, the cache, a key, a phone and a desk."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tqgguf.demo import model as demo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.model, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]

PATIENCE = 60.0


class Browser:
    """A page in headless Chromium, over the pipe of its DevTools protocol."""

    def __init__(self, profile: Path) -> None:
        to_browser, ours_out = os.pipe()
        ours_in, from_browser = os.pipe()

        def set_pipes() -> None:
            os.dup2(os.dup(to_browser), 3)
            os.dup2(from_browser, 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [str(CHROMIUM), *flags, f"--user-data-dir={profile}", "about:blank"],
            close_fds=False,
            preexec_fn=set_pipes,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.out, self.into = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb", 0)
        self.numbers, self.rest, self.session = itertools.count(1), b"", ""
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = self.into.read(65536)
            assert part, "the browser has gone"
            self.rest += part
        text, _, self.rest = self.rest.partition(b"\0")
        message = dict(json.loads(text))
        entry = message.get("params", {}).get("entry", {})
        if message.get("method") == "Runtime.exceptionThrown" or entry.get("level") == "error":
            self.problems.append(json.dumps(message["params"]))
        return message

    def open(self, url: str, width: int = 1280, height: int = 800) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=url)
        self.until("!!document.querySelector('#state')")

    def run(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> Any:
        """Waits until an expression is true; returns its value."""
        end = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.05)
        return value

    def send(self, text: str) -> None:
        """Types a message and presses Enter."""
        self.run("document.querySelector('#text').focus()")
        self.call("Input.insertText", text=text)
        for kind in ("rawKeyDown", "char", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


def pictures(name: str) -> Path | None:
    """Where a developer wants to look at them: TQGGUF_PICTURES."""
    folder = os.environ.get("TQGGUF_PICTURES")
    return Path(folder) / name if folder else None


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)], ids=["desk", "phone"])
def test_a_conversation(server: Any, browser: Browser, width: int, height: int) -> None:
    browser.open(server.url, width, height)
    browser.until("document.querySelector('#state').textContent === 'ready'")
    assert browser.run("document.querySelector('#model').textContent") == "demo"
    for country, capital in (("France", "Paris"), ("Peru", "Lima")):
        browser.send(f"What is the capital of {country}?")
        browser.until(f"[...document.querySelectorAll('.assistant')].some(e => e.textContent.includes('{capital}'))")
        browser.until("document.querySelector('#send').textContent === 'Send'")
    assert browser.run("document.querySelectorAll('.user').length") == 2
    assert "tokens/s" in browser.run("[...document.querySelectorAll('.facts')].at(-1).textContent")
    assert browser.run("document.querySelector('#figures').open") == (width > 600)
    browser.run("document.querySelector('#figures').open = true")
    cache = browser.run("document.querySelector('#cache').innerText")
    assert "pqo3" in cache and "128 tokens" in cache and "35.0 %" in cache
    browser.until("[...document.querySelectorAll('.slot')].some(e => !/^\\d+\\s*0 \\//.test(e.innerText))")
    assert browser.run("document.querySelectorAll('.slot').length") == 4
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not browser.run(wide)  # nothing sticks out
    assert browser.run("document.querySelector('#send').getBoundingClientRect().bottom <= innerHeight")
    browser.run(f"document.querySelector('#figures').open = {str(width > 600).lower()}")
    if path := pictures(f"page-{width}.png"):
        browser.picture(path)
    browser.run("document.querySelector('#clear').click()")
    assert browser.run("document.querySelectorAll('.user, .assistant').length") == 0
    assert not browser.problems


def test_an_error_is_shown_and_a_long_answer_stops(server: Any, browser: Browser) -> None:
    browser.open(server.url)
    browser.until("document.querySelector('#state').textContent === 'ready'")
    browser.send("word " * 3000)
    assert "exceeds the available context size" in browser.until(
        "document.querySelector('.error') && document.querySelector('.error').textContent"
    )
    browser.send("What is the capital of Spain?")  # which does not hang behind it
    browser.until("[...document.querySelectorAll('.assistant')].some(e => e.textContent.includes('Madrid'))")


def test_what_a_model_says_is_text(server: Any, browser: Browser) -> None:
    """No element comes of what was said."""
    browser.open(server.url)
    browser.until("document.querySelector('#state').textContent === 'ready'")
    browser.send("<img src=x onerror='window.broken = 1'>")
    browser.until("document.querySelectorAll('.user').length === 1")
    time.sleep(0.3)
    assert browser.run("document.querySelectorAll('img').length") == 0 and not browser.run("window.broken")


def test_a_key_is_asked_for(serve: Callable[..., Any], browser: Browser) -> None:
    server = serve(str(demo.MODEL_PATH), "--threads", "1", "--ctx", "256", "--api-key", "secret")
    try:
        browser.open(server.url)
        browser.until("!document.querySelector('#locked').hidden")
        browser.run("document.querySelector('#secret').value = 'secret'")
        browser.run("document.querySelector('#key').requestSubmit()")
        browser.until("document.querySelector('#state').textContent === 'ready'")
        assert browser.run("document.querySelector('#locked').hidden")
        browser.send("What is the capital of France?")
        browser.until("[...document.querySelectorAll('.assistant')].some(e => e.textContent.includes('Paris'))")
    finally:
        server.end()


def test_the_page_is_one_file_that_reaches_for_nothing() -> None:
    page = (Path(demo.__file__).parents[1] / "serve" / "page" / "index.html").read_text()
    assert "http://" not in page and "https://" not in page and "import " not in page
