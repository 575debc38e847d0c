"""The page at /, in a headless browser: chats, probabilities and experts of tokens, and text that is never markup."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.generate import Generator
from tests.helpers import browser
from tests.helpers.serving import NEEDS_SERVE, Running, running

pytestmark = [NEEDS_SERVE, pytest.mark.heavy]
NEEDS_BROWSER = pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed")
MARKUP = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"


@pytest.fixture(scope="module")
def server(generator: Generator) -> Iterator[Running]:
    with running(generator) as found:
        yield found


def test_the_page_allows_its_own_script_alone(server: Running):
    reply = server.get("/")

    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe" not in policy
    assert b"innerHTML" not in reply.body
    assert b"http" not in reply.body.replace(b"<!doctype html>", b"")  # nothing from elsewhere


@NEEDS_BROWSER
def test_a_chat_shows_probabilities_and_experts(server: Running, generator: Generator, tmp_path: Path):
    async def visit() -> dict[str, Any]:
        found: dict[str, Any] = {}
        async with browser.open_page(str(browser.find()), tmp_path, server.url) as page:
            await page.wait_for("document.querySelectorAll('#layer option').length")
            found["model"] = await page.run("$('model').textContent")
            await page.run(f"$('temperature').value = 0; $('max').value = 8; $('text').value = {MARKUP!r}")
            await page.run("$('form').requestSubmit()")
            await page.wait_for("messages.length === 2 && !running")
            found["user"] = await page.run("document.querySelector('.user').textContent")
            found["text"] = await page.run("[...document.querySelectorAll('.token')].map(s => s.textContent).join('')")
            found["figures"] = await page.run("document.querySelector('.figures').textContent")
            hover = (
                "document.querySelectorAll('.token')[{}].dispatchEvent(new MouseEvent('mouseover', {{bubbles: true}}))"
            )
            await page.run(hover.format(0))
            found["first"] = await page.run("$('details').textContent")
            await page.run(hover.format("document.querySelectorAll('.token').length - 1"))
            found["last"] = await page.run("$('details').textContent")
            found["color"] = await page.run("document.querySelector('.token').style.background")
            await page.run("$('text').value = 'Go on.'; $('form').requestSubmit()")
            await page.wait_for("messages.length === 4 && !running")
            found["turns"] = await page.run("messages.map(one => one.role)")
            await page.run("$('mode').value = 'completion'; $('text').value = 'def f('; $('form').requestSubmit()")
            await page.wait_for("document.querySelectorAll('.figures').length === 3 && !running")
            found["completion"] = await page.run("[...document.querySelectorAll('.message')].at(-2).textContent")
            await page.run("$('max').value = 99999; $('text').value = 'a'; $('form').requestSubmit()")
            found["error"] = await page.wait_for("document.querySelector('.error')?.textContent")
            found["title"], found["bold"] = await page.run(
                "[document.title, document.querySelectorAll('main b, img').length]"
            )
            found["errors"] = [error for error in page.errors if "400" not in error and "favicon" not in error]
        return found

    found = asyncio.run(visit())

    chat = [{"role": "user", "content": MARKUP}]
    expected = generator(generator.encode(chat, split_special_tokens=True), max_tokens=8, logprobs=5)
    assert (found["model"], found["user"], found["text"]) == ("small", MARKUP, expected.text)
    assert found["figures"].startswith(f"{len(expected.token_ids)} tokens")
    assert "tok/s" in found["figures"]
    assert "%" in found["first"]
    assert found["first"].count("expert ") == 2
    assert "Experts in layer 1" in found["first"]
    assert "Not routed yet" in found["last"]
    assert "hsl" in found["color"] or "rgb" in found["color"]
    assert found["turns"] == ["user", "assistant"] * 2
    assert found["completion"] == "def f(" + generator("def f(", max_tokens=8).text
    assert "max_tokens" in found["error"]
    assert (found["title"], found["bold"], found["errors"]) == ("dsmoe serve", 0, [])
