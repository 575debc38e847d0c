"""Run a server until SIGTERM or Ctrl-C: `serve`."""

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate import Generator
from dsmoe_jax.serve.app import Server, make_app
from dsmoe_jax.serve.config import ServeConfig
from dsmoe_jax.serve.limits import MAX_HEADER_BYTES, LimitedProtocol

_log = logging.getLogger("dsmoe_jax")


def serve(load: Callable[[], Generator], config: ServeConfig, *, started: Callable[[str], Any] = _log.info) -> None:
    """Serve a model until SIGTERM or Ctrl-C; requests in flight complete, a second signal ends them.

    While the model is loaded, connections are refused, and signals are those of the caller.

    Args:
        load: Loads the model, once the port is bound.
        config: Configuration of the server.
        started: Called with a line that has the address, once the server listens.

    Raises:
        DSMoEError: The address cannot be bound, or as `load`.
        OSError: The server cannot listen, or `started` failed.
        KeyboardInterrupt: A second signal ended the server.
    """
    with bound_socket(config) as sock:
        host = f"[{config.host}]" if ":" in config.host else config.host
        line = f"Serving {config.model_name} on http://{host}:{sock.getsockname()[1]} (Ctrl-C stops)"
        server = DrainingServer(Server(load(), config), lambda: started(line))
        server.run(sockets=[sock])
        if server.force_exit:
            raise KeyboardInterrupt  # the engine may be running


@contextlib.contextmanager
def bound_socket(config: ServeConfig) -> Iterator[socket.socket]:
    """Yield a socket bound to the address; it refuses connections until the server listens."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise DSMoEError(f"host {config.host!r} is not an address: {error.strerror or error}") from None
    with sock:
        try:
            _bind(sock, address)
        except OSError as error:
            raise DSMoEError(f"cannot bind to {config.host}, port {config.port}: {error.strerror or error}") from None
        yield sock


def _bind(sock: socket.socket, address: Any) -> None:
    """Bind to a port that no other server has; connections of an earlier server (TIME_WAIT) do not matter.

    On Linux, sockets with SO_REUSEADDR that do not listen yet can all be bound to one port.
    """
    try:
        sock.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)


class DrainingServer(uvicorn.Server):
    """Uvicorn that answers 503 to new requests after a signal, and stops when the others are complete."""

    def __init__(self, server: Server, on_start: Callable[[], Any] = lambda: None):
        """Create the server of an app; `on_start` is called once it listens."""
        config = server.config
        super().__init__(
            uvicorn.Config(
                make_app(server),
                http=LimitedProtocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=config.idle_timeout,  # type: ignore[arg-type]
                timeout_graceful_shutdown=5,
            )
        )
        self._server, self._on_start = server, on_start
        self._drain_until: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and start the engine."""
        for sock in sockets or ():  # so that the next server can bind while its connections are in TIME_WAIT
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await super().startup(sockets)
        self._on_start()
        self._server.worker.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the connections, and end the engine unless a second signal comes first."""
        await super().shutdown(sockets)
        worker = self._server.worker
        worker.stop()
        while worker.running and not self.force_exit:
            await asyncio.sleep(0.01)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain after the first signal, exit after the second."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self._server.config.drain_timeout
            self._server.worker.draining = True
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Exit once drained; at the deadline, or at a second signal, the remaining requests end with an error."""
        if self._drain_until is not None:
            if late := self.force_exit or time.monotonic() > self._drain_until:
                self._server.worker.fail_all()
            self.should_exit = self.should_exit or late or not self._server.worker.outstanding
        return await super().on_tick(counter)
