"""`dsmoe chat`: turns, commands and Ctrl-C."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.generate import Chat, Generator
from dsmoe_jax.generate.engine import Engine
from dsmoe_jax.generate.request import Output
from tests.helpers.command import load_once, run

pytestmark = pytest.mark.heavy

FEW = ("--max-new-tokens", "4", "--ignore-eos")
GREETING = "/help lists the commands; /quit, Ctrl-D or Ctrl-C ends the chat.\n"


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    load_once(monkeypatch, generator)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Types these lines, then Ctrl-D; raises exceptions among them."""

    def script(*typed: str | BaseException) -> None:
        left = iter(typed)

        def ask(prompt: str) -> str:
            print(prompt, end="")
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", ask)

    return script


def test_history_is_kept_until_reset(
    capsys: pytest.CaptureFixture, checkpoint: Path, generator: Generator, says: Callable[..., None]
):
    talk = Chat(generator, max_new_tokens=4, ignore_eos=True)
    first, second = "".join(talk.send("hello")), "".join(talk.send("and then?"))
    says("hello", "", "and then?", "/reset", " hello ")

    code = run("chat", checkpoint, *FEW)

    turns = [f"User: Assistant: {output}\n" for output in (first, second, first)]
    assert first != second
    assert (code, *capsys.readouterr()) == (0, f"{GREETING}{turns[0]}User: {turns[1]}User: {turns[2]}User: \n", "")


def test_system_message_comes_first_and_survives_reset(
    tmp_path: Path, checkpoint: Path, says: Callable[..., None], capsys: pytest.CaptureFixture
):
    before, after = tmp_path / "before.json", tmp_path / "with a blank.json"
    says("hello", f"/save {before}", "/reset", f"/save {after}", "/quit", "unused")

    code = run("chat", checkpoint, *FEW, "--system", "Sei größer.")

    saved = json.loads(before.read_text(encoding="utf-8"))
    system = {"role": "system", "content": "Sei größer."}
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert f"Saved {before}\n" in out
    assert saved[:2] == [system, {"role": "user", "content": "hello"}]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert json.loads(after.read_text(encoding="utf-8")) == [system]


def test_chat_continues_after_an_error(
    tmp_path: Path, checkpoint: Path, says: Callable[..., None], capsys: pytest.CaptureFixture
):
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    says(f"/save {taken}", "/save", "/sing", "word " * 40, "hi", "/help")

    code = run("chat", checkpoint, *FEW, "--context-length", "48")

    out, err = capsys.readouterr()
    exists, nameless, unknown, long = err.splitlines()
    assert code == 0
    assert exists == f"dsmoe chat: {taken} exists; nothing is overwritten"
    assert nameless == "dsmoe chat: /save needs the name of a new file, got ''"
    assert unknown == "dsmoe chat: unknown command /sing; /help lists the commands"
    assert "exceed the context_length of 48" in long
    assert out.count("Assistant: ") == 1
    assert all(f"  {name} " in out for name in ("/save", "/reset", "/help", "/quit"))
    assert taken.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [taken]


def test_ctrl_c_stops_a_reply_and_keeps_its_text(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    says: Callable[..., None],
):
    answered = Generator.pieces

    def pieces(engine: Engine, output: Output) -> Iterator[str]:
        for number, piece in enumerate(answered(engine, output)):
            if number == 2:
                signal.raise_signal(signal.SIGINT)
            yield piece

    monkeypatch.setattr(Generator, "pieces", pieces)
    handler = signal.getsignal(signal.SIGINT)
    says("hello", f"/save {tmp_path / 'talk.json'}", KeyboardInterrupt())

    code = run("chat", checkpoint, "--max-new-tokens", "40", "--ignore-eos")

    out, err = capsys.readouterr()
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert (code, err) == (130, "\n")
    assert saved[0] == {"role": "user", "content": "hello"}
    file = tmp_path / "talk.json"
    assert out == f"{GREETING}User: Assistant: {saved[1]['content']}\nUser: Saved {file}\nUser: "
    assert saved[1]["content"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_second_ctrl_c_ends_the_chat(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, says: Callable[..., None]
):
    def send(*_: Any) -> Iterator[str]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield "never"

    monkeypatch.setattr(Chat, "send", send)
    says("hello")

    code = run("chat", checkpoint)

    assert code == 130
    assert "never" not in capsys.readouterr().out


def test_rate_is_shown_on_a_terminal(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, says: Callable[..., None]
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    says("hello")

    code = run("chat", checkpoint, *FEW)

    err = capsys.readouterr().err
    assert code == 0
    assert err.startswith("4 tokens, ")
    assert err.endswith(" tok/s\n")


def test_invalid_flags_are_rejected_before_loading(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
):
    monkeypatch.setattr(Generator, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))

    codes = [run("chat", checkpoint, "--temperature", "-1"), run("chat", checkpoint, "--n", "2")]

    below, unknown = capsys.readouterr().err.splitlines()
    assert codes == [2, 2]
    assert "temperature must be in [0, 1000], got -1.0" in below
    assert "--n" in unknown


def test_a_chat_without_a_template_is_refused_at_the_start(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, generator: Generator
):
    monkeypatch.setattr(generator.tokenizer, "chat_templates", {})

    code = run("chat", checkpoint)

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("dsmoe chat: a chat needs a chat template, and this generator has none")
