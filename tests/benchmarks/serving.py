"""`python -m tests.benchmarks.serving`: a server under load, against the engine alone on the same requests.

The preset `tiny` with random weights; clients are coroutines of this process, the server is `dsmoe serve`. Its outputs
must be those of the engine. Rounds of engine and server alternate, after one that compiles. Prints JSON lines.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dsmoe_jax.checkpoint.native import save
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.generate import Generator, SamplingParams
from dsmoe_jax.model import DeepSeekMoE
from tests.helpers.corpus import byte_tokenizer

PROMPTS, OUTPUTS = (16, 128), (8, 128)  # tokens, both ends included
SECONDS: Final = 600  # for one round


class Request(NamedTuple):
    """A request, and how long its output is."""

    prompt: list[int]
    max_tokens: int


class Answer(NamedTuple):
    """The output of a request, and the times of its events."""

    token_ids: list[int]
    start: float
    events: list[tuple[float, int]]  # time, tokens


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.serving", description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = make_checkpoint(Path(home))
        requests = make_requests(args.requests)
        generator = Generator.from_pretrained(folder, max_batch_size=args.batch_size)
        with serving(folder, "--max-batch-size", str(args.batch_size)) as (port, process):
            rounds: dict[str, list[float]] = {"engine": [], "whole": [], "stream": []}
            answers: list[Answer] = []
            for number in range(args.rounds + 1):
                start, cpu = time.perf_counter(), time.process_time()
                expected = run_engine(generator, requests)
                taken, cpus = {"engine": time.perf_counter() - start}, {"engine": time.process_time() - cpu}
                for name in ("whole", "stream"):
                    start, cpu = time.perf_counter(), cpu_seconds(process)
                    answers = asyncio.run(load(port, requests, args.clients, stream=name == "stream"))
                    taken[name], cpus[name] = time.perf_counter() - start, cpu_seconds(process) - cpu
                    wrong = sum(a.token_ids != e for a, e in zip(answers, expected, strict=True))
                    assert not wrong, f"{wrong} of {len(answers)} outputs differ"
                if number:
                    figures = {"seconds": rounded(taken), "cpu_seconds": rounded(cpus)}
                    print(json.dumps({"round": number} | figures | latencies(answers)), flush=True)
                    for name, value in taken.items():
                        rounds[name].append(value)
    tokens = sum(request.max_tokens for request in requests)
    medians = {name: statistics.median(seconds) for name, seconds in rounds.items()}
    rates = {name: round(tokens / seconds, 1) for name, seconds in medians.items()}
    ratios = {name: round(rates[name] / rates["engine"], 3) for name in ("whole", "stream")}
    print(json.dumps({"tokens": tokens, "tokens_per_second": rates, "over_engine": ratios}))


def make_checkpoint(home: Path) -> Path:
    """Write the model with a tokenizer of bytes."""
    tokenizer = byte_tokenizer(home / "tokenizer")
    save(DeepSeekMoE.init(ModelConfig.preset("tiny")), home / "tiny", extra_files=sorted(tokenizer.iterdir()))
    return home / "tiny"


def make_requests(count: int) -> list[Request]:
    """Draw prompts and lengths."""
    rng = np.random.default_rng(0)
    lengths = zip(
        rng.integers(*PROMPTS, count, endpoint=True), rng.integers(*OUTPUTS, count, endpoint=True), strict=True
    )
    return [Request(rng.integers(2, 2048, prompt).tolist(), int(output)) for prompt, output in lengths]


def run_engine(generator: Generator, requests: Sequence[Request]) -> list[list[int]]:
    """Return the outputs of one call of the generator."""
    params = [SamplingParams(max_tokens=one.max_tokens, ignore_eos=True) for one in requests]
    return [one.token_ids for one in generator([request.prompt for request in requests], params)]


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[tuple[int, int]]:
    """Yield port and process id of a server."""
    command = [sys.executable, "-m", "dsmoe_jax", "serve", str(folder), "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline().split("http://127.0.0.1:")[1].split()[0]), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 0


async def load(port: int, requests: Sequence[Request], clients: int, *, stream: bool) -> list[Answer]:
    """Send requests from so many clients, each with a connection of its own; return the answers in order."""
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(requests))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for index, request in waiting:
            body = {"prompt": request.prompt, "max_tokens": request.max_tokens, "temperature": 0, "ignore_eos": True}
            data = json.dumps(body | {"stream": stream, "return_token_ids": True}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            start = time.perf_counter()
            writer.write(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
            answers[index] = await (read_stream if stream else read_whole)(reader, start)
        writer.close()

    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return [answers[index] for index in range(len(requests))]


async def read_head(reader: asyncio.StreamReader) -> dict[bytes, bytes]:
    """Return the header of a successful response."""
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).splitlines()
    assert b" 200 " in status, status
    return dict(line.lower().split(b": ", 1) for line in lines if line)


async def read_whole(reader: asyncio.StreamReader, start: float) -> Answer:
    """Read a response."""
    head = await read_head(reader)
    body = json.loads(await reader.readexactly(int(head[b"content-length"])))
    token_ids = body["choices"][0]["token_ids"]
    return Answer(token_ids, start, [(time.perf_counter(), len(token_ids))])


async def read_stream(reader: asyncio.StreamReader, start: float) -> Answer:
    """Read the chunks of a stream, one event each."""
    await read_head(reader)
    token_ids, events = [], []
    while size := int(await reader.readline(), 16):
        chunk = await reader.readexactly(size + 2)
        if not chunk.startswith(b"data: [DONE]"):
            new = json.loads(chunk[6:])["choices"][0]["token_ids"]
            token_ids += new
            events.append((time.perf_counter(), len(new)))
    await reader.readexactly(2)
    return Answer(token_ids, start, events)


def cpu_seconds(process: int) -> float:
    """Return the CPU time of a process, from Linux."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Round to two digits."""
    return {name: round(value, 2) for name, value in values.items()}


def latencies(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return percentiles of the times to the first token and between tokens, in ms."""
    first = [answer.events[0][0] - answer.start for answer in answers]
    between: list[float] = []
    for answer in answers:
        for (before, _), (after, count) in zip(answer.events, answer.events[1:], strict=False):
            between += [(after - before) / count] * count
    found = {"first_token_ms": first, "inter_token_ms": between}
    return {
        name: {f"p{p}": round(float(np.percentile(values, p)) * 1000, 2) for p in (50, 99)}
        for name, values in found.items()
    }


if __name__ == "__main__":
    main()
