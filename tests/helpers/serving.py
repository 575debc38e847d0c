"""A server in a thread of the test process: `running`; requests to it without a client library: `Http`."""

import asyncio
import contextlib
import importlib.util
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from dsmoe_jax.generate import Generator

if TYPE_CHECKING:
    from dsmoe_jax.serve.app import Server
    from dsmoe_jax.serve.run import DrainingServer

NEEDS_SERVE = pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="the extra serve is not installed")
SECONDS = 60  # until a test fails


class Running(NamedTuple):
    """A running server."""

    server: "Server"
    uvicorn: "DrainingServer"
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: Any, **headers: str) -> "Reply":
        return self.request("POST", path, body, **headers)

    def get(self, path: str, **headers: str) -> "Reply":
        return self.request("GET", path, **headers)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> "Reply":
        """Send a request; a body that is not bytes is encoded as JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        names = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        with contextlib.closing(connection):
            connection.request(method, path, data, names)
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)


class Reply(NamedTuple):
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


@contextlib.contextmanager
def running(generator: Generator, **config: Any) -> Iterator[Running]:
    """Yield a server on a free port of loopback; programs are compiled when they are needed."""
    from dsmoe_jax.serve.app import Server
    from dsmoe_jax.serve.config import ServeConfig
    from dsmoe_jax.serve.run import DrainingServer, bound_socket

    settings = ServeConfig(**{"port": 0, "model_name": "small"} | config)
    with bound_socket(settings) as sock:
        server = Server(generator, settings, warm_up=False)
        uvicorn = DrainingServer(server)
        port = sock.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(uvicorn.serve(sockets=[sock])))
        thread.start()
        try:
            wait_until(lambda: uvicorn.started and server.worker.ready)
            yield Running(server, uvicorn, port)
        finally:
            uvicorn.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()


def wait_until(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Wait for a condition, or fail."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition does not become true"
        time.sleep(0.01)
