"""How outputs reach the client: as server-sent events, or at once. Start at `EventStream` and `collect`."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dsmoe_jax.serve.api_error import ApiError, internal_error
from dsmoe_jax.serve.generation import Delta, Generation
from dsmoe_jax.serve.responses import ChatFormat, CompletionFormat

_log = logging.getLogger("dsmoe_jax")
_T = TypeVar("_T")


class JSONResponse(Response):
    """A JSON body in ASCII."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode the body."""
        return dumps(content).encode()


def dumps(content: Any) -> str:
    """Encode JSON; infinities and NaN, which JSON lacks, raise."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


class EventStream(StreamingResponse):
    """A stream of chunks; the generation is canceled when the client leaves."""

    def __init__(self, generation: Generation, form: CompletionFormat | ChatFormat, *, timeout: float):
        """Create the response to a generation, which may take `timeout` seconds including its reader."""
        self._generation, self._format, self._timeout = generation, form, timeout
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not collect it
        super().__init__(self._events(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            async with asyncio.timeout(self._timeout + 1):  # a reader that has stopped reading blocks `send`
                await super().__call__(scope, receive, send)
        except TimeoutError:
            _log.info("Closing a stream whose reader is too slow")
        finally:
            self._generation.cancel()

    async def _events(self) -> AsyncIterator[str]:
        try:
            async for chunk in self._chunks():
                yield _event(chunk)
        except ApiError as error:
            yield _event(error.body())
        except Exception:
            _log.exception("A stream failed")
            yield _event(internal_error().body())
        yield "data: [DONE]\n\n"

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        form = self._format
        for chunk in form.first_chunks(self._generation.unfinished):
            yield chunk
        async for deltas in self._generation:
            if choices := [form.choice(delta) for delta in deltas if _is_news(delta)]:
                yield form.chunk(choices)
        if (usage := form.chunk([], form.usage())).get("usage") is not None:
            yield usage


def _is_news(delta: Delta) -> bool:
    return bool(delta.text or delta.logprobs or delta.finish_reason or delta.token_ids)


def _event(body: dict[str, Any]) -> str:
    return f"data: {dumps(body)}\n\n"


async def collect(generation: Generation) -> Sequence[Delta]:
    """Return the outputs of a generation once all are finished."""
    found: list[Delta] = []
    async for deltas in generation:
        found += deltas
    return found


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, _T]) -> _T | None:
    """Return the result of `work`, or None if the client leaves, which cancels it; the body must have been read."""
    tasks = [asyncio.create_task(work), asyncio.create_task(_disconnected(request))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
