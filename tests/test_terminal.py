"""`dsmoe generate` and `dsmoe chat`, typed as a user types them: what is printed, written, and refused in one line."""

import dataclasses
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax import progress
from dsmoe_jax.checkpoint.native import save
from dsmoe_jax.cli import main
from dsmoe_jax.generate import Chat, Generator
from dsmoe_jax.generate.generator import Stream
from dsmoe_jax.model import DeepSeekMoE
from dsmoe_jax.storage.locks import lock_name
from tests import test_generate
from tests.helpers.hf_folder import make_tokenizer, snapshot

pytestmark = pytest.mark.heavy

CONFIG = dataclasses.replace(test_generate.SMALL, vocab_size=512)
FEW = ("--max-new-tokens", "4", "--ignore-eos")
GREETING = "/help lists the commands; /quit, Ctrl-D or Ctrl-C ends the conversation.\n"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint with a tokenizer."""
    home = tmp_path_factory.mktemp("terminal")
    make_tokenizer(home / "tokenizer", 512)
    save(DeepSeekMoE.init(CONFIG), home / "native", extra_files=sorted((home / "tokenizer").iterdir()))
    return home / "native"


@pytest.fixture(scope="session")
def generator(model: Path) -> Generator:
    return Generator.from_pretrained(model)


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Programs belong to a model's graph: with the same one each is compiled once. Other options load it really."""
    load = Generator.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type[Generator], path: Any, **options: Any) -> Generator:
        if options or not Path(path).is_dir():
            return load(cls, path, **options)
        ready = request.getfixturevalue("generator")
        ready._requests = 0
        return ready

    request.getfixturevalue("generator")  # before it is replaced
    monkeypatch.setattr(Generator, "from_pretrained", classmethod(from_pretrained))


def run(*arguments: Any) -> int:
    """The exit code, argparse's own exit included."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def stdin(data: bytes, *, terminal: bool = False) -> io.TextIOWrapper:
    file = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    file.isatty = lambda: terminal
    return file


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of prompts; a line is an object, or text as it is."""

    def write(*entries: Any) -> Path:
        texts = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
        (tmp_path / "prompts.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
        return tmp_path / "prompts.jsonl"

    return write


# --- one prompt ---


def test_the_prompt_and_its_answer_are_all_that_stdout_gets(
    capsys: pytest.CaptureFixture, model: Path, generator: Generator
):
    answer = generator(["def main("], max_new_tokens=4, ignore_eos=True)[0].text

    code = run("generate", model, "--prompt", "def main(", *FEW)

    assert (code, *capsys.readouterr()) == (0, f"def main({answer}\n", "")


@pytest.mark.parametrize("flags", [(), ("--prompt", "-")], ids=["no prompt", "a dash"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"], ids=["bare", "newline", "CRLF"])
def test_a_prompt_is_read_from_stdin_without_the_newline_at_its_end(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, model: Path, flags: tuple[str, ...], end: bytes
):
    asked = []
    monkeypatch.setattr(Generator, "stream", lambda self, prompt, params: asked.append(prompt) or iter(["!"]))
    monkeypatch.setattr("sys.stdin", stdin("def größe(\n".encode() + end))

    code = run("generate", model, *flags)

    want = "def größe(\n" if end else "def größe("
    assert asked == [want]
    assert (code, *capsys.readouterr()) == (0, want + "!\n", "")


def test_every_flag_arrives_as_the_parameter_of_its_name(monkeypatch: pytest.MonkeyPatch, model: Path):
    seen: dict[str, Any] = {}
    generator = Generator.from_pretrained(model)
    monkeypatch.setattr(Generator, "from_pretrained", lambda **options: seen.update(options) or generator)
    monkeypatch.setattr(Generator, "stream", lambda self, prompt, params: seen.update(params=params) or iter([]))
    engine = {"quantize": "int8", "cache_dtype": "bfloat16", "max_batch_size": 3, "context_length": 99}
    engine |= {"dtype": "float32", "adapter": "some/where"}
    sampling = {"max_new_tokens": 7, "temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "seed": 3}
    sampling |= {"repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.25}
    flags = [part for name, value in (engine | sampling).items() for part in ("--" + name.replace("_", "-"), value)]
    lists = ("--stop", "a", "--stop", "b c", "--stop-token-id", 5, "--stop-token-id", 6)

    code = run("generate", model, "--prompt", "x", *flags, *lists, "--logit-bias", "5=-1", "--logit-bias", "7=2.5",
               "--ignore-eos")  # fmt: skip

    got = seen.pop("params")
    assert code == 0
    assert seen == {"path": str(model)} | engine
    assert {name: getattr(got, name) for name in sampling} == sampling
    assert (got.stop, got.stop_token_ids) == (("a", "b c"), (5, 6))
    assert (got.logit_bias, got.ignore_eos, got.n) == (((5, -1.0), (7, 2.5)), True, 1)


def test_a_quantised_model_with_a_small_cache_answers(capsys: pytest.CaptureFixture, model: Path):
    code = run("generate", model, "--prompt", "def", *FEW, "--quantize", "int8", "--cache-dtype", "int8")

    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert len(out) > len("def\n")


# --- a file of prompts ---


def test_a_file_is_answered_in_its_order(
    capsys: pytest.CaptureFixture, model: Path, generator: Generator, prompts: Callable[..., Path]
):
    assert generator.tokenizer is not None
    chat = [{"role": "user", "content": "hi"}]
    ids = generator.tokenizer.encode("import os")
    file = prompts(
        {"id": "first", "prompt": "def main("},
        "  ",
        {"tokens": ids, "max_new_tokens": 2, "id": {"any": ["thing", 1]}},
        {"messages": chat, "n": 2, "temperature": 1, "seed": 5, "logprobs": 1},
    )
    options: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True}
    one = generator(["def main("], **options)[0]
    two = generator([ids], max_new_tokens=2, ignore_eos=True)[0]
    several = generator([chat], **options, n=2, temperature=1, seed=5)

    code = run("generate", model, "--file", file, *FEW)

    out, err = capsys.readouterr()
    got = lines(out)
    logprobs = [answer.pop("logprobs") for answer in got[2:]]
    assert code == 0
    assert got == [
        {"id": "first", "text": one.text, "tokens": one.tokens, "finish_reason": "length"},
        {"id": {"any": ["thing", 1]}, "text": two.text, "tokens": two.tokens, "finish_reason": "length"},
        *({"text": a.text, "tokens": a.tokens, "finish_reason": "length", "index": i} for i, a in enumerate(several)),
    ]
    assert all(set(entry) == {"logprob", "top"} and len(entry["top"]) == 1 for one in logprobs for entry in one)
    assert err.count("\n") == 1
    assert err.startswith("4 answers, 14 tokens, ")
    assert err.endswith(" tok/s\n")


def test_a_null_field_of_a_line_is_an_absent_one(
    capsys: pytest.CaptureFixture, model: Path, prompts: Callable[..., Path]
):
    fields = ("stop", "stop_token_ids", "logit_bias", "logprobs", "seed", "top_k", "top_p", "min_p", "n", "temperature")
    null = dict.fromkeys((*fields, "max_new_tokens", "ignore_eos", "tokens", "messages"))
    file = prompts({"prompt": "def main("}, {"prompt": "def main(", **null}, {"prompt": "def main(", "top_k": -1})

    code = run("generate", model, "--file", file, *FEW, "--temperature", "0.8", "--seed", "3")

    plain, nulls, disabled = lines(capsys.readouterr().out)
    assert code == 0
    assert plain == nulls == disabled


# a line | what its error says
REFUSED: dict[str, tuple[Any, str]] = {
    "no JSON": ('{"prompt": ', "is not JSON"),
    "no object": ('["a"]', "holds a list where a JSON object must be"),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
    "no prompt": ({"seed": 1}, "needs one of prompt, tokens, messages, and has none"),
    "two prompts": ({"prompt": "a", "tokens": [1]}, "and has prompt and tokens"),
    "prompt misspelt": ({"promt": "a"}, "unknown field 'promt'; did you mean 'prompt'?"),
    "unknown field": ({"prompt": "a", "zzz": 1}, "unknown field 'zzz'; there are id, prompt, tokens"),
    "a field without a name": ({"prompt": "a", "": 1}, "unknown field ''; there are id, prompt, tokens"),
    "a number for a prompt": ({"prompt": 5}, "prompt must be a text"),
    "a text for tokens": ({"tokens": "abc"}, "tokens must be a list of token ids"),
    "true for a token": ({"tokens": [1, True]}, "tokens must be a list of token ids"),
    "a token of another model": ({"tokens": [512]}, "token id 512 is outside the vocabulary of 512"),
    "a text for messages": ({"messages": ["hi"]}, "messages must be a list of messages"),
    "an unknown role": ({"messages": [{"role": "usr", "content": "a"}]}, "role 'usr'"),
    "the assistant begins": ({"messages": [{"role": "assistant", "content": "a"}]}, "the other's turn"),
    "an empty prompt": ({"prompt": ""}, "a prompt is empty"),
    "half a surrogate pair": ('{"prompt": "\\ud800"}', "surrogate"),
    "a parameter out of range": ({"prompt": "a", "top_p": 2}, "top_p must be in [0, 1], not 2"),
    "a parameter of another kind": ({"prompt": "a", "seed": "x"}, "seed must be an int or None, not 'x'"),
    "no bias": ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias must be an int, not 'x'"),
    "a bias for a token twice": ({"prompt": "a", "logit_bias": {"5": 1, "05": 1}}, "must be an int, not '05'"),
    "too long": ({"prompt": "a", "max_new_tokens": 5000}, "exceed the context_length of 4096"),
}  # fmt: skip


def test_a_refused_line_says_why_in_its_place_and_the_others_go_on(
    capsys: pytest.CaptureFixture, model: Path, prompts: Callable[..., Path]
):
    file = prompts({"prompt": "a"}, *(line for line, _ in REFUSED.values()), {"prompt": "a", "id": "\ud800"})

    code = run("generate", model, "--file", file, *FEW)

    out, err = capsys.readouterr()
    first, *refused, last = lines(out)
    assert code == 2
    assert {**first, "id": "\ud800"} == last
    assert [one["line"] for one in refused] == list(range(2, 2 + len(REFUSED)))
    assert all(set(one) == {"line", "error"} for one in refused)
    assert {
        name: one["error"] for name, one in zip(REFUSED, refused, strict=True) if REFUSED[name][1] not in one["error"]
    } == {}
    rate, why = err.splitlines()
    assert rate.startswith("2 answers, 8 tokens, ")
    assert why.startswith(
        f"dsmoe generate: {len(REFUSED)} of the {len(REFUSED) + 2} prompts in {file} failed; the first, line 2: "
    )
    assert "is not JSON" in why


def test_a_refused_line_keeps_its_id_and_biases_have_texts_for_keys(
    capsys: pytest.CaptureFixture, model: Path, prompts: Callable[..., Path]
):
    file = prompts({"id": 7, "prompt": "a", "zzz": 1}, {"prompt": "a", "logit_bias": {"9": 100}})

    code = run("generate", model, "--file", file, *FEW, "--stop-token-id", 9)

    assert code == 2
    assert [one.get("id") or one["tokens"] for one in lines(capsys.readouterr().out)] == [7, [9]]


def test_answers_go_to_a_new_file_that_is_never_there_in_part(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    prompts: Callable[..., Path],
):
    file, out = prompts({"prompt": "größe"}), tmp_path / "answers.jsonl"
    assert run("generate", model, "--file", file, *FEW) == 0
    want = capsys.readouterr().out

    codes = [run("generate", model, "--file", file, "--out", out, *FEW) for _ in range(2)]
    _, err = capsys.readouterr()
    monkeypatch.setattr(Generator, "__call__", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    interrupted = run("generate", model, "--file", file, "--out", tmp_path / "other.jsonl")

    assert codes == [0, 2]
    assert out.read_text(encoding="utf-8") == want
    assert err.splitlines()[1] == f"dsmoe generate: {out} exists; nothing is overwritten"
    assert interrupted == 130
    assert set(tmp_path.iterdir()) == {file, out}


def test_answers_into_one_file_are_written_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture, model: Path, prompts: Callable[..., Path]
):
    file, out = prompts({"prompt": "a"}), tmp_path / "answers.jsonl"

    with lock_name(out):
        code = run("generate", model, "--file", file, "--out", out, *FEW)

    assert code == 2
    assert f"dsmoe generate: {out} is in use by another process (pid {os.getpid()}); " in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == {file}


def test_a_file_whose_lines_are_all_refused_loads_no_model(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, model: Path, prompts: Callable[..., Path]
):
    monkeypatch.setattr(Generator, "from_pretrained", lambda **_: pytest.fail("it was loaded"))

    code = run("generate", model, "--file", prompts("{", "{"))

    out, err = capsys.readouterr()
    assert code == 2
    assert [one["line"] for one in lines(out)] == [1, 2]
    assert "2 of the 2 prompts" in err


def test_a_person_sees_how_many_answers_are_done(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, model: Path, prompts: Callable[..., Path]
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    shown: list[Any] = []
    monkeypatch.setattr("rich.progress.Progress.advance", lambda self, task, step: shown.append(step))

    code = run("generate", model, "--file", prompts({"prompt": "a", "n": 2}, {"prompt": "b"}), *FEW)

    assert code == 0
    assert sum(shown) == 3
    assert "3 answers, 12 tokens" in capsys.readouterr().err


def test_a_bar_counts_only_for_a_person(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    for person in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda person=person: person)
        for bar in (progress.bar, progress.count):
            with bar("things", 3) as advance:
                advance(2)
        assert ("things" in capsys.readouterr().err) == person


# --- mistakes of `generate` ---

# what is typed after the model | stdin, None for a terminal | what the one line says
MISTAKES: dict[str, tuple[tuple[str, ...], bytes | None, str]] = {
    "nothing to read": ((), None, "give a --prompt, a --file, or the prompt on stdin"),
    "empty stdin": ((), b"\n", "the prompt is empty"),
    "empty prompt": (("--prompt", ""), None, "the prompt is empty"),
    "stdin is no text": ((), b"ab\xff", "stdin is not UTF-8: byte 2 is 0xff"),
    "file is no text": (("--file", "{tmp}/latin1"), None, "latin1 is not UTF-8: byte 12 is 0xe4"),
    "file is not there": (("--file", "{tmp}/absent"), None, "absent"),
    "file is empty": (("--file", "{tmp}/blank"), None, "blank has no prompts"),
    "two sources": (("--prompt", "a", "--file", "{tmp}/good"), None, "--prompt and --file exclude each other"),
    "out without a file": (("--prompt", "a", "--out", "{tmp}/out"), None, "--out is for the answers to a --file"),
    "out exists": (("--file", "{tmp}/good", "--out", "{tmp}/blank"), None, "exists; nothing is overwritten"),
    "out has no folder": (("--file", "{tmp}/good", "--out", "{tmp}/a/b"), None, "b cannot be written: No such file"),
    "several streams": (("--prompt", "a", "--n", "2"), None, "--n and --logprobs are for the answers to a --file"),
    "logprobs of a stream": (("--prompt", "a", "--logprobs", "2"), None, "--logprobs"),
    "a flag out of range": (("--prompt", "a", "--min-p", "2"), None, "min_p must be in [0, 1], not 2.0"),
    "a flag out of range for a file": (("--file", "{tmp}/good", "--n", "0"), None, "n must be in [1, 1024], not 0"),
    "empty stop": (("--prompt", "a", "--stop", ""), None, "stop must not hold an empty string"),
    "no bias": (("--prompt", "a", "--logit-bias", "5"), None, "'5' is not ID=VALUE"),
    "a biased word": (("--prompt", "a", "--logit-bias", "a=1"), None, "'a=1' is not ID=VALUE"),
    "a bias too large": (("--prompt", "a", "--logit-bias", "5=101"), None, "logit_bias of token 5 must be in"),
    "a bias elsewhere": (("--prompt", "a", "--logit-bias", "512=1"), None, "token 512 is outside the vocabulary"),
    "unknown scheme": (("--prompt", "a", "--quantize", "int3"), None, "'int3' is not one of int8, int4, nf4"),
    "unknown cache": (("--prompt", "a", "--cache-dtype", "int4"), None, "--cache-dtype: invalid choice: 'int4'"),
    "no rows": (("--prompt", "a", "--max-batch-size", "0"), None, "max_batch_size must be at least 1, not 0"),
    "no adapter": (("--prompt", "a", "--adapter", "{tmp}/absent"), None, "absent"),
}


@pytest.mark.parametrize(("typed", "given", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    typed: tuple[str, ...],
    given: bytes | None,
    named: str,
):
    (tmp_path / "good").write_text('{"prompt": "a"}')
    (tmp_path / "latin1").write_bytes('{"prompt": "ä"}'.encode("latin-1"))
    (tmp_path / "blank").write_text("\n \n")
    monkeypatch.setattr("sys.stdin", stdin(given or b"", terminal=given is None))
    before = snapshot(tmp_path)

    code = run("generate", model, *(word.format(tmp=tmp_path) for word in typed))

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("dsmoe generate: ")
    assert err.count("\n") == 1
    assert named in err
    assert snapshot(tmp_path) == before


# --- a conversation ---


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Types these lines, then Ctrl-D; an exception is raised."""

    def script(*said: str | BaseException) -> None:
        left = iter(said)

        def ask(prompt: str) -> str:
            print(prompt, end="")
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", ask)

    return script


def test_a_chat_keeps_its_history_until_it_is_reset(
    capsys: pytest.CaptureFixture, model: Path, generator: Generator, says: Callable[..., None]
):
    talk = Chat(generator, max_new_tokens=4, ignore_eos=True)
    first, second = "".join(talk.send("hello")), "".join(talk.send("and then?"))
    says("hello", "", "and then?", "/reset", " hello ")

    code = run("chat", model, *FEW)

    turns = [f"User: Assistant: {answer}\n" for answer in (first, second, first)]
    assert first != second
    assert (code, *capsys.readouterr()) == (0, f"{GREETING}{turns[0]}User: {turns[1]}User: {turns[2]}User: \n", "")


def test_the_systems_message_comes_first_also_after_a_reset(
    tmp_path: Path, model: Path, says: Callable[..., None], capsys: pytest.CaptureFixture
):
    before, after = tmp_path / "before.json", tmp_path / "with a blank.json"
    says("hello", f"/save {before}", "/reset", f"/save {after}", "/quit", "never said")

    code = run("chat", model, *FEW, "--system", "Sei größer.")

    saved = json.loads(before.read_text(encoding="utf-8"))
    system = {"role": "system", "content": "Sei größer."}
    assert (code, capsys.readouterr().err) == (0, "")
    assert saved[:2] == [system, {"role": "user", "content": "hello"}]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert json.loads(after.read_text(encoding="utf-8")) == [system]


def test_what_a_chat_refuses_gets_one_line_and_it_goes_on(
    tmp_path: Path, model: Path, says: Callable[..., None], capsys: pytest.CaptureFixture
):
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    says(f"/save {taken}", "/save", "/sing", "word " * 40, "hi", "/help")

    code = run("chat", model, *FEW, "--context-length", "48")

    out, err = capsys.readouterr()
    exists, nameless, unknown, long = err.splitlines()
    assert code == 0
    assert exists == f"dsmoe chat: {taken} exists; nothing is overwritten"
    assert nameless == "dsmoe chat: /save needs the name of a new file"
    assert unknown == "dsmoe chat: there is no /sing; /help lists the commands"
    assert "exceed the context_length of 48" in long
    assert out.count("Assistant: ") == 1
    assert all(f"  {name} " in out for name in ("/save", "/reset", "/help", "/quit"))
    assert taken.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [taken]


def test_ctrl_c_stops_an_answer_and_keeps_what_came(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    says: Callable[..., None],
):
    answered = Generator.pieces

    def pieces(stream: Stream) -> Iterator[str]:
        for number, piece in enumerate(answered(stream)):
            if number == 2:
                signal.raise_signal(signal.SIGINT)
            yield piece

    monkeypatch.setattr(Generator, "pieces", pieces)
    handler = signal.getsignal(signal.SIGINT)
    says("hello", f"/save {tmp_path / 'talk.json'}", KeyboardInterrupt())

    code = run("chat", model, "--max-new-tokens", "40", "--ignore-eos")

    out, err = capsys.readouterr()
    said = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert (code, err) == (130, "\n")
    assert said[0] == {"role": "user", "content": "hello"}
    assert out == f"{GREETING}User: Assistant: {said[1]['content']}\nUser: User: "
    assert said[1]["content"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_ends_the_chat(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, model: Path, says: Callable[..., None]
):
    def send(*_: Any) -> Iterator[str]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield "never"

    monkeypatch.setattr(Chat, "send", send)
    says("hello")

    code = run("chat", model)

    assert code == 130
    assert "never" not in capsys.readouterr().out


def test_a_person_is_told_the_rate(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, model: Path, says: Callable[..., None]
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    says("hello")

    code = run("chat", model, *FEW)

    err = capsys.readouterr().err
    assert code == 0
    assert err.startswith("4 tokens, ")
    assert err.endswith(" tok/s\n")


def test_a_chats_flags_are_refused_before_its_model_is_loaded(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, model: Path
):
    monkeypatch.setattr(Generator, "from_pretrained", lambda **_: pytest.fail("it was loaded"))

    codes = [run("chat", model, "--temperature", "-1"), run("chat", model, "--n", "2")]

    below, unknown = capsys.readouterr().err.splitlines()
    assert codes == [2, 2]
    assert "temperature must be in [0, 1000], not -1.0" in below
    assert "--n" in unknown
