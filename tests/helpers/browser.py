"""A headless Chromium, driven over its DevTools protocol: `open_page`."""

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

SECONDS: Final = 60
NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """Return the path of an installed browser."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page of the browser."""

    def __init__(self, socket: Any):
        self._socket, self._numbers = socket, itertools.count(1)
        self.errors: list[str] = []  # of scripts, and of what the content security policy blocks

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async for message in self._socket:
            found = json.loads(message.data)
            params = found.get("params", {})
            if "exceptionDetails" in params or params.get("entry", {}).get("level") == "error":
                self.errors.append(json.dumps(params))
            if found.get("id") == number:
                assert "error" not in found, found
                return found["result"]
        raise AssertionError("the browser has ended")

    async def run(self, script: str) -> Any:
        """Return the value of an expression, after awaiting it."""
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def wait_for(self, script: str) -> Any:
        """Wait until an expression is true, and return its value."""
        async with asyncio.timeout(SECONDS):
            while not (value := await self.run(script)):
                await asyncio.sleep(0.05)
        return value

    async def screenshot(self) -> bytes:
        """Return a PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])


@contextlib.asynccontextmanager
async def open_page(browser: str, home: Path, url: str, *, width: int = 1000, height: int = 600) -> AsyncIterator[Page]:
    """Open a URL in a new browser whose profile is in the folder `home`."""
    import aiohttp

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += [
        "--remote-debugging-port=0",
        f"--user-data-dir={home}",
        f"--window-size={width},{height}",
        "--disable-extensions",
    ]
    process = subprocess.Popen([browser, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        async with asyncio.timeout(SECONDS), aiohttp.ClientSession() as session:
            while not (home / "DevToolsActivePort").exists():
                await asyncio.sleep(0.05)
            port = (home / "DevToolsActivePort").read_text().splitlines()[0]
            async with session.get(f"http://127.0.0.1:{port}/json") as reply:
                target = next(one for one in await reply.json() if one["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Runtime", "Log", "Page"):
                    await page.call(f"{domain}.enable")
                await page.call("Page.navigate", url=url)
                yield page
    finally:
        process.terminate()
        process.wait(SECONDS)
