"""`dsmoe serve`: flags, signals, kills under load, and the line without the extra."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.cli import serve as command
from dsmoe_jax.generate import Generator
from tests.helpers.command import load_once, run
from tests.helpers.serving import NEEDS_SERVE, SECONDS, wait_until

pytestmark = [NEEDS_SERVE, pytest.mark.heavy]


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def serve_until(act: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """Run the command in the main thread, and `act` on its URL in another, which then ends it by SIGTERM."""
    lines: list[str] = []
    errors: list[BaseException] = []
    monkeypatch.setattr(command, "print_status", lines.append)

    def client() -> None:
        try:
            wait_until(lambda: lines)
            act(lines[0].split(" on ")[1].split()[0])
        except BaseException as error:
            errors.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=client)
    thread.start()
    code = run("serve", *arguments, "--port", "0")
    thread.join(SECONDS)
    if errors:
        raise errors[0]
    return code


def test_a_model_is_served_until_sigterm(checkpoint: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch):
    load_once(monkeypatch, generator)
    found: dict[str, Any] = {}

    def act(url: str) -> None:
        wait_until(lambda: status(f"{url}/ready") == 200)
        with urllib.request.urlopen(f"{url}/v1/models", timeout=SECONDS) as reply:
            found.update(json.load(reply))

    assert serve_until(act, monkeypatch, checkpoint, "--served-model-name", "mine") == 0
    assert [model["id"] for model in found["data"]] == ["mine"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_during_loading_is_a_normal_exit(
    checkpoint: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def load(path: str, **options: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(SECONDS)

    monkeypatch.setattr(Generator, "from_pretrained", load)

    assert run("serve", checkpoint, "--port", "0") == 0
    assert "\n\n" not in f"\n{capsys.readouterr().err}"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Run the command without a server; return its config, and the options that the model is loaded with."""
    monkeypatch.delenv("DSMOE_API_KEY", raising=False)

    def parse(*arguments: Any) -> tuple[Any, dict[str, Any]]:
        found: list[Any] = []
        monkeypatch.setattr(
            Generator, "from_pretrained", lambda path, **options: found.append({"path": path} | options)
        )
        monkeypatch.setattr("dsmoe_jax.serve.run.serve", lambda load, config, **_: (found.append(config), load()))
        assert run("serve", *arguments) == 0
        return found[0], found[1]

    return parse


def test_flags_set_the_config(parsed: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    flags = (
        "--host 0.0.0.0 --port 0 --allow-origin https://a --allow-origin https://b --max-queue 2 --request-timeout 9.5"
    )
    config, options = parsed(checkpoint, *flags.split(), "--parse-special-tokens", "--quantize", "int8")

    assert (config.host, config.port, config.max_queue, config.request_timeout) == ("0.0.0.0", 0, 2, 9.5)
    assert (config.allow_origins, config.parse_special_tokens) == (("https://a", "https://b"), True)
    assert (config.model_name, config.api_key, config.is_local) == ("native", None, False)
    assert options == {"path": str(checkpoint), "quantize": "int8"}
    monkeypatch.setenv("DSMOE_API_KEY", "of the environment")
    assert parsed("owner/name")[0].api_key == "of the environment"
    assert parsed("owner/name", "--api-key", "k")[0].api_key == "k"
    assert parsed("owner/name")[0].model_name == "owner/name"


def test_an_adapter_names_the_model(parsed: Any, tmp_path: Path):
    config, options = parsed("owner/base", "--adapter", f"poems={tmp_path}")
    assert (config.model_name, config.base_name, options["adapter"]) == ("poems", "owner/base", str(tmp_path))
    config, options = parsed("owner/base", "--adapter", tmp_path)
    assert (config.model_name, options["adapter"]) == (tmp_path.name, str(tmp_path))


def test_models_and_adapters_of_a_run_have_its_name(parsed: Any, tmp_path: Path):
    for name in ("mine/model", "mine/adapter"):
        (tmp_path / name).mkdir(parents=True)
    assert parsed(tmp_path / "mine/model")[0].model_name == "model"
    (tmp_path / "mine/run.json").touch()

    assert parsed(tmp_path / "mine/model")[0].model_name == "mine"
    assert parsed(tmp_path / "mine/model/../model/")[0].model_name == "mine"
    config = parsed("owner/base", "--adapter", tmp_path / "mine/adapter")[0]
    assert (config.model_name, config.base_name) == ("mine", "owner/base")


def test_mistakes_are_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    lines = {
        ("--port", "70000"): "port must be in [0, 65535], got 70000",
        ("--api-key", ""): "--api-key must not be empty",
        ("--allow-origin", "example.com"): "allow_origins must be * or an origin as browsers send it",
        ("--adapter", "=x"): "--adapter must be NAME=DIR or DIR, got '=x'",
        ("--adapter", "a=x", "--adapter", "b=y"): "one adapter a server",
    }
    for flags, line in lines.items():
        assert run("serve", checkpoint, *flags) == 2
        error = capsys.readouterr().err
        assert error.startswith("dsmoe serve: ")
        assert line in error
        assert error.count("\n") == 1
    for key in ("", "secret\n"):
        monkeypatch.setenv("DSMOE_API_KEY", key)
        assert run("serve", checkpoint) == 2
        error = capsys.readouterr().err
        assert "api_key must be non-empty" in error
        assert "secret" not in error
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "dsmoe_jax.serve.run", raising=False)
    assert run("serve", checkpoint) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsmoe serve: a server needs the extra serve (")
    assert error.endswith("): pip install 'dsmoe_jax[serve]'\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_every_request_ends_when_a_server_is_killed(checkpoint: Path, number: signal.Signals):
    words = [sys.executable, "-m", "dsmoe_jax", "serve", str(checkpoint), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split("http://127.0.0.1:")[1].split()[0])
        wait_until(lambda: status(f"http://127.0.0.1:{port}/ready") == 200, 300)
        body = json.dumps({"prompt": "def f(", "max_tokens": 300, "stream": True, "ignore_eos": True})

        def ask(_: int) -> str:
            connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
            try:
                connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                reply = connection.getresponse()
                return "complete" if reply.status == 200 and b"[DONE]" in reply.read() else str(reply.status)
            except (OSError, HTTPException) as error:
                return type(error).__name__
            finally:
                connection.close()

        with ThreadPoolExecutor(16) as pool:
            first = pool.map(ask, range(16))
            wait_until(
                lambda: b"requests_running 8.0" in urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read()
            )
            process.send_signal(number)
            found = [*first, *pool.map(ask, range(16))]
        code = process.wait(SECONDS)
    assert code == (0 if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        assert found[:16] == ["complete"] * 16
        assert set(found[16:]) <= {"503", "ConnectionRefusedError", "ConnectionResetError", "RemoteDisconnected"}
    else:
        assert "complete" not in found[16:]
