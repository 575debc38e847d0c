"""Bodies with random faults, and load: every request gets an answer or an error, and the server stays as it was."""

import asyncio
import copy
import gc
import json
import random
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.generate import Generator, SamplingParams
from tests.helpers.serving import NEEDS_SERVE, Reply, Running, running, wait_until

pytestmark = [NEEDS_SERVE, pytest.mark.heavy]

COMPLETION: dict[str, Any] = {"prompt": "def f(", "max_tokens": 2, "temperature": 0, "n": 1, "stop": ["x"], "seed": 1}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    "max_completion_tokens": 2,
    "temperature": 0,
    "logit_bias": {"5": 1},
    "stream_options": {"include_usage": True},
    "stream": True,
}
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/tokenize": {"prompt": "Hello", "add_special_tokens": False},
    "/detokenize": {"tokens": [1, 2, 3]},
}
FIELDS = [
    *COMPLETION,
    *CHAT,
    "model",
    "suffix",
    "best_of",
    "echo",
    "stream",
    "tools",
    "tokens",
    "top_p",
    "",
    "a\ufffdb",
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**64, 1e300, -0.5, float("nan"), float("inf"), "", "x", "\x00", "x" * 3000),
    *(
        [],
        [[]],
        [None],
        [1, "a"],
        {},
        {"a": {"b": []}},
        "\U0001f469",
        "<script>",
        [0] * 500,
        [["a"]] * 3,
        {"type": "text"},
    ),
]


def mutate(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """Change one thing somewhere in a JSON value."""
    if isinstance(value, dict) and (not value or rng.random() < 0.8):
        changed = dict(value)
        name = rng.choice([*changed, *FIELDS[: 3 + 3 * depth], rng.choice(FIELDS)])
        if rng.random() < 0.15:
            changed.pop(name, None)
        else:
            changed[name] = mutate(rng, changed.get(name), depth + 1)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        changed = copy.copy(value)
        at = rng.randrange(len(changed))
        changed[at] = mutate(rng, changed[at], depth + 1)
        return changed
    return rng.choice(VALUES)


def damage(rng: random.Random, data: bytes) -> bytes:
    """Cut the bytes, or change some."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data) + 1)]
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def fuzz(server: Running, count: int, seed: int) -> Counter[int]:
    """Send bodies, and return how many got each status."""
    rng, found = random.Random(seed), Counter()
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    for _ in range(count):
        path = rng.choice([*VALID])
        body = VALID[path]
        for _ in range(rng.randrange(1, 4)):
            body = mutate(rng, body)
        data = json.dumps(body).encode()
        if rng.random() < 0.2:
            data = damage(rng, data)
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        content = reply.read()
        check(Reply(reply.status, {}, content))
        found[reply.status] += 1
    connection.close()
    return found


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Running]:
    short = Generator.from_pretrained(checkpoint, context_length=48, max_batch_size=2, verify=False)
    with running(short, max_body_bytes=20_000) as found:
        yield found


def test_faulty_bodies_get_errors(server: Running):
    found = fuzz(server, 400, seed=0)

    assert found[400] > 200
    assert found[200] > 20
    wait_until(lambda: not server.server.worker.engine.busy)
    assert not server.server.worker.outstanding
    assert server.get("/health").status == 200


def test_lengths_default_to_the_rest_of_the_context(server: Running):
    def post(length: int, **fields: Any) -> Reply:
        return server.post("/v1/completions", {"prompt": [5] * length, "ignore_eos": True, "temperature": 0} | fields)

    assert post(45).json["usage"]["completion_tokens"] == 3
    assert post(48, max_tokens=0, echo=True).status == 200
    refused = (
        (
            post(45, max_tokens=4),
            "max_tokens",
            "a prompt of 45 tokens and max_tokens 4 exceed the context length of 48",
        ),
        (post(48), "prompt", "a prompt of 48 tokens fills the context length of 48"),
        (post(49, max_tokens=0, echo=True), "prompt", "a prompt of 49 tokens exceeds the context length of 48"),
        (
            server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a b c " * 30}]}),
            "messages",
            "exceeds the context length of 48",
        ),
    )
    for reply, param, message in refused:
        assert (reply.status, reply.error["param"], reply.error["code"]) == (400, param, "context_length_exceeded")
        assert message in reply.error["message"]


@pytest.mark.slow
def test_five_thousand_faulty_bodies_leave_nothing(server: Running):
    fuzz(server, 500, seed=1)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    fuzz(server, 4500, seed=2)

    assert not server.server.worker._jobs
    assert not server.server.worker._generations
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000  # KB; programs are compiled on the way


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("schemathesis") is None, reason="schemathesis is not installed")
def test_bodies_of_the_schema_are_handled(server: Running):
    words = [
        "schemathesis",
        "run",
        f"{server.url}/openapi.json",
        "--phases",
        "examples,coverage,fuzzing",
        "--seed",
        "1",
    ]
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    options = ["--checks", checks, "--max-examples", "100", "--request-timeout", "60"]

    subprocess.run([*words, *options], check=True, timeout=280)


def check(reply: Reply) -> None:
    """Fail unless a response is a success or an error in OpenAI's form."""
    assert reply.status < 500, reply
    assert reply.status == 200 or set(reply.error) == {"message", "type", "param", "code"}


@pytest.mark.slow
def test_a_thousand_requests_of_sixty_four_clients_are_right(generator: Generator):
    from tests.benchmarks import serving

    rng = random.Random(0)
    requests = [
        serving.Request([rng.randrange(2, 2048) for _ in range(rng.randrange(4, 60))], rng.randrange(1, 24))
        for _ in range(1000)
    ]
    params = [SamplingParams(max_tokens=one.max_tokens, ignore_eos=True) for one in requests]
    expected = [one.token_ids for one in generator([one.prompt for one in requests], params)]

    with running(generator) as server:
        for stream in (False, True):
            answers = asyncio.run(serving.load(server.port, requests, 64, stream=stream))
            assert [answer.token_ids for answer in answers] == expected
        wait_until(lambda: not server.server.worker.outstanding)


@pytest.mark.slow
def test_two_hundred_clients_that_vanish_leave_no_rows(generator: Generator):
    body = json.dumps(COMPLETION | {"max_tokens": 2000, "ignore_eos": True, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(generator) as server:
        for wait in (False, True):
            for _ in range(100):
                with server.connect() as sock:
                    sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                    if wait:
                        sock.recv(15)
        worker = server.server.worker
        wait_until(lambda: not worker.outstanding and not worker.engine.busy and not worker._jobs)
        assert server.post("/v1/completions", COMPLETION).status == 200
