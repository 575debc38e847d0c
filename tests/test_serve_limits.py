"""What the server refuses and survives: full queues, keys, sizes, slow and leaving clients, garbage, signals, bugs."""

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate import Generator
from dsmoe_jax.generate.engine import Engine
from tests.helpers.serving import NEEDS_SERVE, SECONDS, Running, running, wait_until

pytestmark = [NEEDS_SERVE, pytest.mark.heavy]

BODY: dict[str, Any] = {"prompt": "def add(a, b):", "temperature": 0, "max_tokens": 4}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: [::1]:80\r\nContent-Type: application/json\r\n"
LONG = BODY | {"max_tokens": 3000, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(generator: Generator) -> Iterator[Running]:
    limits = {"max_queue": 3, "max_body_bytes": 4000, "idle_timeout": 0.5, "request_timeout": 60}
    with running(generator, **limits) as found:
        yield found


@contextlib.contextmanager
def stream(server: Running, body: dict[str, Any] = LONG) -> Iterator[socket.socket]:
    """Yield a connection whose stream has begun; leaving the context closes it at once."""
    data = json.dumps(body).encode()
    with server.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        assert sock.recv(15) == b"HTTP/1.1 200 OK"
        yield sock


def is_idle(server: Running) -> bool:
    worker = server.server.worker
    return not worker.outstanding and not worker.engine.busy and not worker._jobs


def test_a_full_queue_answers_429(server: Running, generator: Generator):
    with contextlib.ExitStack() as stack:
        for _ in range(generator.max_batch_size + 3):
            stack.enter_context(stream(server))

        reply = server.post("/v1/completions", BODY)

        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        assert (reply.error["type"], reply.error["code"]) == ("rate_limit_error", "queue_full")
    wait_until(lambda: is_idle(server))
    assert server.post("/v1/completions", BODY).status == 200


def test_more_outputs_than_fit_are_refused(server: Running):
    for fields, param in (({"n": 64}, "n"), ({"prompt": [[5, 6]] * 64}, "prompt")):
        reply = server.post("/v1/completions", BODY | fields)

        assert (reply.status, reply.error["param"]) == (400, param)
        assert "64 outputs exceed" in reply.error["message"]


def test_clients_that_vanish_leave_no_rows(server: Running):
    for count in range(40):
        with stream(server, LONG if count % 2 else LONG | {"prompt": [5] * 200}):
            pass

    wait_until(lambda: is_idle(server))
    assert not server.server.worker.engine.kv_cache[0]


def test_a_waiting_client_that_vanishes_is_canceled(server: Running):
    aborted = server.server.metrics.finished.labels("abort")._value
    before, body = aborted.get(), json.dumps(LONG | {"stream": False}).encode()
    with server.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: server.server.worker.outstanding)

    wait_until(lambda: is_idle(server))
    assert aborted.get() == before + 1


def test_a_cancellation_takes_two_steps(generator: Generator, monkeypatch: pytest.MonkeyPatch):
    steps, step = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (steps.append(0), step(engine))[1])
    with running(generator) as server:
        worker, cancel = server.server.worker, Engine.cancel
        called, canceled = [], []
        monkeypatch.setattr(Engine, "cancel", lambda *args: (canceled.append(len(steps)), cancel(*args))[1])
        abort = worker._cancel
        monkeypatch.setattr(worker, "_cancel", lambda one: (called.append(len(steps)), abort(one))[1])
        with stream(server):
            pass
        wait_until(lambda: canceled)

    assert canceled[0] - called[0] <= 2


def test_a_large_body_is_refused(server: Running):
    reply = server.post("/v1/completions", BODY | {"prompt": "a" * 5000})

    assert (reply.status, reply.error["type"]) == (413, "invalid_request_error")
    assert "4000 bytes" in reply.error["message"]
    with server.connect() as sock:  # without a length
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        sock.sendall(b"Transfer-Encoding: chunked\r\n\r\n" + b"3e8\r\n" + b"a" * 1000 + b"\r\n")
        for _ in range(4):
            sock.sendall(b"3e8\r\n" + b"a" * 1000 + b"\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_large_header_is_refused(server: Running):
    assert server.get("/health", X="a" * 17_000).status == 431
    with server.connect() as sock:  # without an end
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000)
        assert sock.recv(100).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: local"], ids=["nothing", "half"])
def test_idle_connections_are_closed(server: Running, sent: bytes):
    start = time.monotonic()
    with server.connect() as sock:
        sock.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""
    assert 0.3 < time.monotonic() - start < 20


def test_a_slow_body_is_refused(server: Running):
    with server.connect() as sock:
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        sock.sendall(b'Content-Length: 100\r\n\r\n{"prompt"')
        assert sock.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_request_has_a_deadline(generator: Generator):
    with running(generator, request_timeout=0.3) as server:
        reply = server.post("/v1/completions", LONG | {"stream": False})
        events = server.post("/v1/completions", LONG).body

        assert (reply.status, reply.error["code"]) == (504, "timeout")
        assert b'"code":"timeout"' in events
        assert events.endswith(b"data: [DONE]\n\n")
        wait_until(lambda: is_idle(server))


def test_a_reader_that_stops_is_closed(generator: Generator):
    with running(generator, request_timeout=0.5) as server:
        body = LONG | {"logprobs": 20, "n": 8}
        with stream(server, body):
            wait_until(lambda: is_idle(server))


def test_garbage_is_refused(server: Running):
    for sent in (b"\x16\x03\x01garbage\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nA\r\n\r\n"):
        with server.connect() as sock:
            sock.sendall(sent)
            assert sock.recv(100).startswith(b"HTTP/1.1 400 ")
    assert server.get("/health").status == 200


# body | what the message has
MALFORMED = {
    b"": "not valid JSON",
    b"{": "not valid JSON",
    b"[]": "should be an object",
    b'{"prompt": "\xff"}': "not valid JSON",
    rb'{"prompt": "\ud800"}': "lone surrogate",
    rb'{"prompt": "\udc00a"}': "lone surrogate",
    rb'{"prompt": "\u12"}': "not valid JSON",
    b"[" * 3000: "not valid JSON",
    b'{"prompt": "a", "temperature": NaN}': "temperature",
    b'{"prompt": "a", "seed": 1e999}': "seed",
    b'{"prompt": [' + b"9" * 30 + b"]}": "prompt",
    b'{"prompt": [1, -1]}': "prompt",
}


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:20]))
def test_malformed_bodies_are_refused(server: Running, body: bytes):
    reply = server.request("POST", "/v1/completions", body)

    assert reply.status == 400
    assert MALFORMED[body] in reply.error["message"]
    assert set(reply.error) == {"message", "type", "param", "code"}


@pytest.mark.slow
def test_many_faults_take_no_longer_than_one(generator: Generator):
    bodies = (
        {f"field {i}": i for i in range(120_000)},
        {"prompt": ["a", 1] * 200_000},
        {"prompt": "a", "logit_bias": {f"x{i}": 1 for i in range(150_000)}},
        {"x" * 3_000_000: 1},
    )
    with running(generator) as server:
        for body in bodies:
            start = time.monotonic()
            reply = server.post("/v1/completions", body)

            assert (reply.status, len(reply.body) < 1000) == (400, True)
            assert time.monotonic() - start < 5


def test_prompts_to_score_count_as_outputs(server: Running, generator: Generator):
    body = BODY | {"echo": True, "logprobs": 1, "max_tokens": 0, "prompt": [[5, 6]] * (generator.max_batch_size + 4)}

    error = server.post("/v1/completions", body).error
    assert error["param"] == "prompt"
    assert "prompts exceed" in error["message"]
    assert server.post("/v1/completions", body | {"prompt": [[5, 6]] * 3}).status == 200
    assert not server.server.worker.outstanding


def test_unknown_paths_and_methods_are_errors(server: Running):
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/", 405)):
        reply = server.request(method, path)

        assert (reply.status, reply.error["type"]) == (status, "invalid_request_error")
    assert server.get("/v1/models/").status == 404


def test_other_content_types_are_refused(server: Running):
    # A page of another site can send them without asking.
    assert server.request("POST", "/v1/completions", b"{}", Content_Type="text/plain").status == 415


def test_a_rebound_name_is_refused(server: Running):
    assert server.get("/health", Host="evil.example:8000").status == 403
    assert server.get("/health", Host="localhost:1").status == 200


def test_a_key_is_required(generator: Generator):
    with running(generator, api_key="sk-right") as server:
        for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": "sk-right"}):
            for reply in (server.post("/v1/completions", BODY, **headers), server.get("/metrics", **headers)):
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
                assert "sk-" not in reply.error["message"]
        assert server.post("/v1/completions", BODY, Authorization="Bearer sk-right").status == 200
        assert [server.get(path).status for path in ("/", "/health", "/ready")] == [200, 200, 200]


def test_other_origins_are_allowed_on_request(server: Running, generator: Generator):
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}

    assert "access-control-allow-origin" not in server.get("/health", Origin="https://a.example").headers
    assert server.request("OPTIONS", "/v1/completions", **ask).status == 405
    with running(generator, allow_origins=("https://a.example",), api_key="k") as other:
        reply = other.request("OPTIONS", "/v1/completions", **ask)
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://a.example")
        assert other.get("/v1/models", **ask).headers["access-control-allow-origin"] == "https://a.example"  # a 401
        ask["Origin"] = "https://b.example"
        assert "access-control-allow-origin" not in other.request("OPTIONS", "/v1/completions", **ask).headers


def test_a_signal_drains(generator: Generator):
    with running(generator, drain_timeout=60) as server:
        with stream(server, LONG | {"max_tokens": 200}) as sock:
            server.uvicorn.handle_exit(signal.SIGTERM, None)

            assert server.get("/ready").json == {"status": "draining"}
            reply = server.post("/v1/completions", BODY)
            assert (reply.status, reply.error["code"]) == (503, "shutting_down")
            rest = b"".join(iter(lambda: sock.recv(1 << 16), b""))
            assert b"data: [DONE]" in rest
        wait_until(lambda: not server.server.worker._thread.is_alive())


def test_a_drain_has_a_deadline(generator: Generator, caplog: pytest.LogCaptureFixture):
    with running(generator, drain_timeout=0.3) as server, stream(server) as sock:
        server.uvicorn.handle_exit(signal.SIGTERM, None)

        rest = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        assert b'"code":"shutting_down"' in rest
        assert b"data: [DONE]" in rest
    assert "Exception" not in caplog.text


def test_a_second_signal_does_not_wait(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    compiled, start = threading.Event(), time.monotonic()
    with running(generator) as server, stream(server) as sock:
        monkeypatch.setattr(Engine, "step", lambda engine: compiled.wait(SECONDS))
        for _ in range(2):
            server.uvicorn.handle_exit(signal.SIGTERM, None)

        rest = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        assert b'"code":"shutting_down"' in rest
    assert time.monotonic() - start < SECONDS / 2
    assert server.server.worker.running
    compiled.set()
    wait_until(lambda: not server.server.worker.running)
    assert "Exception" not in caplog.text


def test_a_stopped_warm_up_has_compiled_nothing(generator: Generator, caplog: pytest.LogCaptureFixture):
    from dsmoe_jax.serve.metrics import Metrics
    from dsmoe_jax.serve.worker import Worker

    worker = Worker(generator, max_queue=1, timeout=1, metrics=Metrics())
    worker._stopping.set()
    with caplog.at_level("INFO", "dsmoe_jax"):
        worker._warm_up()

    assert "Compiled" not in caplog.text


def test_requests_end_when_the_engine_fails(generator: Generator, monkeypatch: pytest.MonkeyPatch):
    with running(generator) as server:
        step, calls = Engine.step, []

        def fail(engine: Engine) -> None:
            calls.append(0)
            if len(calls) > 5:
                raise RuntimeError("/a/path of the machine")
            step(engine)

        monkeypatch.setattr(Engine, "step", fail)
        reply = server.post("/v1/completions", LONG | {"stream": False})

        assert (reply.status, reply.error["type"]) == (500, "server_error")
        assert "path" not in reply.body.decode()
        assert [server.get(path).status for path in ("/health", "/ready")] == [503, 503]
        assert server.post("/v1/completions", BODY).status == 503
        assert not server.server.worker.outstanding


def test_a_bug_has_no_details(server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def fail(body: Any) -> list[int]:
        raise RuntimeError("/a/path of the machine")

    monkeypatch.setattr(server.server, "_tokenize", fail)
    reply = server.post("/tokenize", {"prompt": "a"})

    assert (reply.status, reply.error["message"]) == (500, "internal error; the log of the server has the details")
    assert "/a/path of the machine" in caplog.text


def test_metrics_count_tokens_and_times(server: Running):
    def value(name: str) -> float:
        lines = server.get("/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"dsmoe_{name} "))

    before = value("generation_tokens_total"), value("time_to_first_token_seconds_count")
    assert server.post("/v1/completions", BODY | {"n": 2, "ignore_eos": True}).status == 200

    assert value("generation_tokens_total") == before[0] + 8
    assert value("time_to_first_token_seconds_count") == before[1] + 2
    assert value("generation_tokens_per_second") > 0
    assert value("inter_token_latency_seconds_count") > 0
    assert (value("num_requests_running"), value("num_requests_waiting")) == (0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("port", 99999), ("max_queue", -1), ("max_body_bytes", 0), ("request_timeout", 0)),
        *(("api_key", key) for key in ("", " ", " k", "k\n", "a\tb", "\x7f", "\u00fc")),
        *(("allow_origins", ("*", origin)) for origin in ("a.example", "null", "ftp:/x y", "ftp://a", "https://a/")),
        *(("allow_origins", (origin,)) for origin in ("https://A", "https://a:443", "http://a:80", "http://a:b", "")),
    ],
)
def test_limits_are_checked(field: str, value: Any):
    from dsmoe_jax.serve.config import ServeConfig

    with pytest.raises(DSMoEError, match=field):
        ServeConfig(**{field: value})


def test_origins_and_keys_are_those_of_clients():
    from dsmoe_jax.serve.config import ServeConfig

    for origin in ("*", "https://a.example", "http://localhost:3000", "http://[::1]:8080", "http://a:443"):
        assert ServeConfig(allow_origins=(origin,), api_key="a b~").allow_origins == (origin,)


def test_a_port_in_use_is_named(server: Running):
    from dsmoe_jax.serve.config import ServeConfig
    from dsmoe_jax.serve.run import bound_socket, serve

    def check_refused(**config: Any) -> None:
        with pytest.raises(DSMoEError, match=message):
            serve(lambda: pytest.fail("the model was loaded"), ServeConfig(**config))

    message = f"cannot bind to 127.0.0.1, port {server.port}: Address already in use"
    check_refused(port=server.port)
    with bound_socket(ServeConfig(port=0)) as loading:  # another server, whose model is being loaded
        port = loading.getsockname()[1]
        message = f"port {port}: Address already in use"
        check_refused(port=port)
    message = "host 'no such host' is not an address"
    check_refused(host="no such host")


def test_a_server_restarts_on_its_port(generator: Generator):
    from dsmoe_jax.serve.config import ServeConfig
    from dsmoe_jax.serve.run import bound_socket

    port = 0
    for _ in range(2):
        with running(generator, port=port) as server:
            port, client = server.port, server.connect()
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(15) == b"HTTP/1.1 200 OK"
        with client:  # the server closed it first, and its port is in TIME_WAIT
            wait_until(lambda client=client: client.recv(1 << 16) == b"")
        config = ServeConfig(port=port)
        with bound_socket(config), pytest.raises(DSMoEError, match="already in use"), bound_socket(config):
            pass


def test_a_server_that_cannot_start_has_no_traceback(generator: Generator, caplog: pytest.LogCaptureFixture):
    from dsmoe_jax.serve.config import ServeConfig
    from dsmoe_jax.serve.run import serve

    def full(line: str) -> None:
        raise OSError(28, "No space left on device", "stdout")

    with pytest.raises(OSError, match="No space left"):
        serve(lambda: generator, ServeConfig(port=0), started=full)
    assert not caplog.text
