"""What every request must satisfy before it is read: `Guard` (host, key, size) and `LimitedProtocol` (idle time)."""

import asyncio
import hmac
import logging
import re
import time
from http import HTTPStatus
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsmoe_jax.serve.api_error import ApiError, internal_error
from dsmoe_jax.serve.config import ServeConfig, is_loopback
from dsmoe_jax.serve.metrics import Metrics
from dsmoe_jax.serve.streaming import JSONResponse

MAX_HEADER_BYTES: Final = 16 << 10
# Without a key: whether the server runs, and the page, which asks for the key itself.
_PUBLIC: Final = ("/", "/health", "/ready")
_log = logging.getLogger("dsmoe_jax")


class Guard:
    """Middleware that refuses requests with errors in OpenAI's form, and counts responses."""

    def __init__(self, app: ASGIApp, *, config: ServeConfig, metrics: Metrics, paths: frozenset[str]):
        """Wrap an app; responses of other paths than `paths` are counted together."""
        self._app, self._config, self._metrics, self._paths = app, config, metrics, paths
        self._key = None if config.api_key is None else f"Bearer {config.api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._limited(scope, receive), counted)
        except ClientDisconnect:  # while its body was read
            return None
        except ApiError as error:
            response = JSONResponse(error.body(), error.status, error.headers)
            await response(scope, receive, counted)
        except Exception:
            _log.exception("A request failed: %s %r", scope["method"], scope["path"])
            if started:
                raise
            await JSONResponse(internal_error().body(), 500)(scope, receive, counted)

    def _check(self, scope: Scope) -> None:
        """Raise `ApiError` unless header, host, key and length of the body are allowed."""
        headers = Headers(scope=scope)
        size = len(scope["query_string"]) + sum(len(name) + len(value) for name, value in headers.raw)
        if size > MAX_HEADER_BYTES:  # h11 limits incomplete ones
            message = f"the header exceeds {MAX_HEADER_BYTES} bytes"
            raise ApiError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message, headers={"Connection": "close"})
        host = re.sub(r":\d*$", "", headers.get("host", ""))
        # A page of another site whose name resolves to this machine (DNS rebinding) is of the same origin.
        if self._config.is_local and self._key is None and host and not is_loopback(host):
            raise ApiError(HTTPStatus.FORBIDDEN, "the header Host must be localhost or a loopback address")
        preflight = scope["method"] == "OPTIONS" and self._config.allow_origins
        if self._key is not None and scope["path"] not in _PUBLIC and not preflight:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._key):
                raise ApiError(
                    HTTPStatus.UNAUTHORIZED,
                    "incorrect API key" if given else "an API key is required: Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
                )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._config.max_body_bytes:
            raise self._too_large()

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Bound the bytes of a body and the time it takes to arrive."""
        size, complete = 0, False
        end = time.monotonic() + self._config.idle_timeout

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(max(end - time.monotonic(), 0)):
                    message = await receive()
            except TimeoutError:
                text = f"the body took more than {self._config.idle_timeout:g} s"
                raise ApiError(HTTPStatus.REQUEST_TIMEOUT, text, headers={"Connection": "close"}) from None
            size += len(message.get("body", b""))
            if size > self._config.max_body_bytes:
                raise self._too_large()
            complete = not message.get("more_body", False)
            return message

        return limited

    def _too_large(self) -> ApiError:
        message = f"the body exceeds {self._config.max_body_bytes} bytes"
        return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, headers={"Connection": "close"})


class LimitedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose next request does not begin in time; uvicorn does so after one alone."""

    _idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer."""
        super().connection_made(transport)
        self._idle = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def on_response_complete(self) -> None:
        """Restart the timer, which bytes of an incomplete header do not stop."""
        super().on_response_complete()
        self._stop_timer()
        self._idle = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _close_if_idle(self) -> None:
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.abort()
