"""The pages in a real browser: nothing loaded, nothing reported, every figure there, legible everywhere."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.report.compare import compare
from distill.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-default-browser-check"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--disable-extensions", "--hide-scrollbars", "--remote-debugging-port=0"),
)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
PATIENCE = 60.0
"""Seconds that a browser may take to answer on a busy machine."""


class Tab:
    """A page in the browser, driven over the DevTools protocol."""

    def __init__(self, socket: Any, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._socket, self._run = socket, run
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come meanwhile are kept."""
        return self._run(asyncio.wait_for(self._call(method, parameters), PATIENCE))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, page: Path, size: str = "desktop", scheme: str = "light", media: str = "screen") -> None:
        """Load a file anew, at a size and in a colour scheme, and wait until it is drawn."""
        width, height = SIZES[size]
        self.events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"},
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + PATIENCE
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, "the page did not load"
            self.evaluate("1")
            time.sleep(0.02)
        self.evaluate("document.fonts.ready.then(() => 1)")

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """Keep a picture of the whole page, from its top to its bottom."""
        height = self.evaluate("document.documentElement.scrollHeight")
        width = self.evaluate("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(picture["data"]))
        return path

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """Console messages, exceptions and entries of the log since the page was opened."""
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event["method"] in methods]

    @property
    def requests(self) -> list[str]:
        """Return the requests to the network or the disk, except `data:`, which is in the page itself."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent if not each["request"]["url"].startswith("data:")]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A browser of its own, for all the tests of this file."""
    aiohttp = pytest.importorskip("aiohttp", reason="aiohttp, which fsspec brings, speaks to the browser")
    profile = tmp_path_factory.mktemp("profile")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    loop = asyncio.new_event_loop()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port = _port(profile / "DevToolsActivePort", process)
            session = loop.run_until_complete(_session(aiohttp))
            try:
                socket = loop.run_until_complete(_first_page(session, port))
                yield Tab(socket, loop.run_until_complete)
                with contextlib.suppress(Exception):
                    loop.run_until_complete(socket.send_json({"id": 0, "method": "Browser.close"}))
            finally:
                loop.run_until_complete(session.close())
        finally:
            _end(process)
            loop.close()


async def _session(aiohttp: Any) -> Any:
    return aiohttp.ClientSession()


async def _first_page(session: Any, port: int) -> Any:
    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
        pages = [target for target in await answer.json() if target["type"] == "page"]
    return await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(file.read_text().split("\n")[0])
        time.sleep(0.05)
    process.kill()
    pytest.skip("Chromium is installed and does not start here")


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return the folder of the screenshots."""
    folder = Path(os.environ.get("REPORT_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def pages(fake_run: Callable[..., Path]) -> dict[str, Path]:
    """The page of a run, and that of three."""

    def other(content: dict[str, Any]) -> None:
        content["experiment"]["cache"] |= {"scheme": "top_k", "entries": 16}
        content["experiment"]["loss"]["alpha"] = 0.3

    runs = [fake_run("demo"), fake_run("top-k-16", other, 0.35), fake_run("<b>third", None, 0.1)]
    comparison = runs[0].parent / "compare.html"
    comparison.write_text(compare(runs), encoding="utf-8")
    return {"report": write_report(runs[0])[0], "compare": comparison}


def figures(value: Any) -> Iterator[float]:
    """Every number in a piece of JSON."""
    if isinstance(value, dict):
        for each in value.values():
            yield from figures(each)
    elif isinstance(value, list):
        for each in value:
            yield from figures(each)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


CONTRAST = """(() => {
  const part = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * part(r / 255) + .7152 * part(g / 255) + .0722 * part(b / 255);
  const colour = text => text.match(/[\\d.]+/g).map(Number);
  const behind = element => {
    for (let each = element; each; each = each.parentElement) {
      const found = colour(getComputedStyle(each).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest('title')) continue;
    const style = getComputedStyle(element);
    const ink = colour(element.closest('svg') ? style.fill : style.color);
    const [more, less] = [light(ink), light(behind(element))].sort((x, y) => y - x);
    found.push([(more + .05) / (less + .05), element.tagName + ': ' + element.textContent.slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]).slice(0, 3);
})()"""

OUTSIDE = """[...document.querySelectorAll('svg.chart')].flatMap(svg => {
  const box = svg.viewBox.baseVal;
  return [...svg.querySelectorAll('text, path, circle, rect')].filter(e => { const b = e.getBBox();
    return b.x < -1 || b.y < -1 || b.x + b.width > box.width + 1 || b.y + b.height > box.height + 1; })
    .map(e => svg.getAttribute('aria-label').slice(0, 40) + ': ' + (e.textContent || e.tagName));
})"""

OVERLAPS = """[...document.querySelectorAll('svg.chart')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBBox()]);
  return texts.flatMap(([one, a], i) => texts.slice(i + 1).filter(([, b]) =>
    a.x < b.x + b.width - 1 && b.x < a.x + a.width - 1 && a.y < b.y + b.height - 3 && b.y < a.y + a.height - 3)
    .map(([other]) => one + ' / ' + other));
})"""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["report", "compare"])
def test_a_page_is_legible_and_alone(
    tab: Tab, pages: dict[str, Path], pictures: Path, which: str, scheme: str, size: str
) -> None:
    tab.open(pages[which], size, scheme)
    tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert tab.complaints == []
    assert tab.requests == [pages[which].resolve().as_uri()]
    assert tab.evaluate("document.scrollingElement.scrollWidth") <= tab.evaluate("innerWidth") == SIZES[size][0]
    least, where = tab.evaluate(CONTRAST)[0]
    assert least >= 4.5, where
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)"
    )
    assert tab.evaluate(OUTSIDE) == []
    assert tab.evaluate(OVERLAPS) == []
    assert tab.evaluate("document.querySelectorAll('script').length") == 0
    tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = false)")
    picture = tab.screenshot(pictures / f"{which}-{size}-{scheme}.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_figure_of_the_evaluation_is_on_the_page(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["report"])
    tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    content = json.loads((pages["report"].parent / "evaluation.json").read_text())
    content.pop("experiment")  # shown as the file it is
    script = "[...document.querySelectorAll('[data-value]')].flatMap(each => each.dataset.value.split(' ').map(Number))"
    shown = set(tab.evaluate(script))
    assert set(figures(content)) - shown == set()
    text = tab.evaluate("document.body.innerText")
    for said in ("3.174", "3.463", "12.940", "134.5", "1.2 %", "2 samples", "4 tokens", "18.3", "learning_rate: 0.001"):
        assert said in text.replace("\xa0", " "), said


@pytest.mark.skipif("REPORT_RUN" not in os.environ, reason="REPORT_RUN names no run whose page is to be opened")
def test_the_page_of_a_real_run(tab: Tab, pictures: Path) -> None:
    """As it was written by the run itself: alone, without complaints, with every figure of its evaluation."""
    run = Path(os.environ["REPORT_RUN"])
    content = json.loads((run / "evaluation.json").read_text())
    content.pop("experiment")
    script = "[...document.querySelectorAll('[data-value]')].flatMap(each => each.dataset.value.split(' ').map(Number))"
    for size in SIZES:
        tab.open(run / "report.html", size)
        assert tab.complaints == [] and tab.requests == [(run / "report.html").resolve().as_uri()]
        assert tab.evaluate("document.scrollingElement.scrollWidth") <= SIZES[size][0]
        assert set(figures(content)) - set(tab.evaluate(script)) == set()
        tab.screenshot(pictures / f"real-{size}.png")


def test_what_a_model_wrote_is_text(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["report"])
    assert "<script>alert('it ran')</script> & more" in tab.evaluate("document.body.innerText")
    tab.open(pages["compare"])
    assert "<b>third" in tab.evaluate("document.body.innerText")
    assert tab.evaluate("document.querySelectorAll('main b').length") == 0


def test_print_is_light_and_shows_what_is_folded(tab: Tab, pages: dict[str, Path], pictures: Path) -> None:
    tab.open(pages["report"], "desktop", "dark", media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert "learning_rate: 0.001" in tab.evaluate("document.body.innerText")
    paper = base64.b64decode(tab.call("Page.printToPDF", preferCSSPageSize=True)["data"])
    (pictures / "report.pdf").write_bytes(paper)
    assert paper.startswith(b"%PDF")
