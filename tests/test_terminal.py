"""`dsmoe generate`: output, files of prompts, and errors in one line."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax import progress
from dsmoe_jax.cli.terminal import example_command
from dsmoe_jax.generate import Generator
from dsmoe_jax.storage.locks import lock_name
from tests.helpers.command import load_once, run
from tests.helpers.hf_folder import snapshot

pytestmark = pytest.mark.heavy

FEW = ("--max-new-tokens", "4", "--ignore-eos")


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    load_once(monkeypatch, generator)


def stdin(data: bytes, *, terminal: bool = False) -> io.TextIOWrapper:
    file = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    file.isatty = lambda: terminal
    return file


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., Path]:
    """Writes a JSONL file of prompts; an entry is an object or a raw line."""

    def write(*entries: Any) -> Path:
        texts = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
        (tmp_path / "prompts.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
        return tmp_path / "prompts.jsonl"

    return write


def test_stdout_gets_prompt_and_completion_only(capsys: pytest.CaptureFixture, checkpoint: Path, generator: Generator):
    output = generator(["def main("], max_new_tokens=4, ignore_eos=True)[0].text

    code = run("generate", checkpoint, "--prompt", "def main(", *FEW)

    assert (code, *capsys.readouterr()) == (0, f"def main({output}\n", "")


@pytest.mark.parametrize("flags", [(), ("--prompt", "-")], ids=["no prompt", "a dash"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"], ids=["bare", "newline", "CRLF"])
def test_stdin_prompt_drops_the_trailing_newline(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, flags: tuple[str, ...], end: bytes
):
    prompted = []
    monkeypatch.setattr(Generator, "stream", lambda self, prompt, params: prompted.append(prompt) or iter(["!"]))
    monkeypatch.setattr("sys.stdin", stdin("def größe(\n".encode() + end))

    code = run("generate", checkpoint, *flags)

    want = "def größe(\n" if end else "def größe("
    assert prompted == [want]
    assert (code, *capsys.readouterr()) == (0, want + "!\n", "")


def test_flags_set_the_parameters_of_their_names(monkeypatch: pytest.MonkeyPatch, checkpoint: Path):
    seen: dict[str, Any] = {}
    generator = Generator.from_pretrained(checkpoint)
    monkeypatch.setattr(
        Generator, "from_pretrained", lambda path, **options: seen.update(options, path=path) or generator
    )
    monkeypatch.setattr(Generator, "stream", lambda self, prompt, params: seen.update(params=params) or iter([]))
    engine = {"quantize": "int8", "cache_dtype": "bfloat16", "max_batch_size": 3, "context_length": 99}
    engine |= {"dtype": "float32", "adapter": "some/where", "revision": "v1"}
    sampling = {"max_new_tokens": 7, "temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "seed": 3}
    sampling |= {"repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.25}
    flags = [part for name, value in (engine | sampling).items() for part in ("--" + name.replace("_", "-"), value)]
    lists = ("--stop", "a", "--stop", "b c", "--stop-token-id", 5, "--stop-token-id", 6)

    code = run("generate", checkpoint, "--prompt", "x", *flags, *lists, "--logit-bias", "5=-1", "--logit-bias", "7=2.5",
               "--ignore-eos")  # fmt: skip

    got = seen.pop("params")
    assert code == 0
    assert seen == {"path": str(checkpoint)} | engine
    assert {name: getattr(got, name) for name in sampling} == sampling
    assert (got.stop, got.stop_token_ids) == (("a", "b c"), (5, 6))
    assert (got.logit_bias, got.ignore_eos, got.n) == (((5, -1.0), (7, 2.5)), True, 1)


def test_quantized_model_with_int8_cache_generates(capsys: pytest.CaptureFixture, checkpoint: Path):
    code = run("generate", checkpoint, "--prompt", "def", *FEW, "--quantize", "int8", "--cache-dtype", "int8")

    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert len(out) > len("def\n")


def test_file_outputs_keep_the_order_of_the_lines(
    capsys: pytest.CaptureFixture, checkpoint: Path, generator: Generator, prompts: Callable[..., Path]
):
    assert generator.tokenizer is not None
    chat = [{"role": "user", "content": "hi"}]
    ids = generator.tokenizer.encode("import os")
    file = prompts(
        {"id": "first", "prompt": "def main("},
        "  ",
        {"token_ids": ids, "max_tokens": 2, "id": {"any": ["thing", 1]}},
        {"messages": chat, "n": 2, "temperature": 1, "seed": 5, "logprobs": 1},
    )
    options: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True}
    one = generator(["def main("], **options)[0]
    two = generator([ids], max_new_tokens=2, ignore_eos=True)[0]
    several = generator(chat, **options, n=2, temperature=1, seed=5)

    code = run("generate", checkpoint, "--file", file, *FEW)

    out, err = capsys.readouterr()
    got = lines(out)
    logprobs = [output.pop("logprobs") for output in got[2:]]
    length = {"finish_reason": "length", "stop_reason": None}
    assert code == 0
    assert got == [
        {"id": "first", "text": one.text, "token_ids": one.token_ids, **length},
        {"id": {"any": ["thing", 1]}, "text": two.text, "token_ids": two.token_ids, **length},
        *({"text": a.text, "token_ids": a.token_ids, **length, "index": i} for i, a in enumerate(several)),
    ]
    assert all(set(entry) == {"logprob", "top"} and len(entry["top"]) == 1 for one in logprobs for entry in one)
    assert err.count("\n") == 1
    assert err.startswith("4 completions, 14 tokens, ")
    assert err.endswith(" tok/s\n")


def test_null_field_means_absent(capsys: pytest.CaptureFixture, checkpoint: Path, prompts: Callable[..., Path]):
    fields = ("stop", "stop_token_ids", "logit_bias", "logprobs", "seed", "top_k", "top_p", "min_p", "n", "temperature")
    null = dict.fromkeys((*fields, "max_new_tokens", "ignore_eos", "max_tokens", "token_ids", "messages"))
    file = prompts({"prompt": "def main("}, {"prompt": "def main(", **null}, {"prompt": "def main(", "top_k": -1})

    code = run("generate", checkpoint, "--file", file, *FEW, "--temperature", "0.8", "--seed", "3")

    plain, nulls, disabled = lines(capsys.readouterr().out)
    assert code == 0
    assert plain == nulls == disabled


# line | error
REFUSED: dict[str, tuple[Any, str]] = {
    "no JSON": ('{"prompt": ', "is not JSON"),
    "no object": ('["a"]', "must be a JSON object, got list"),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
    "no prompt": ({"seed": 1}, "needs one of prompt, token_ids, messages, got none"),
    "two prompts": ({"prompt": "a", "token_ids": [1]}, "got prompt and token_ids"),
    "prompt misspelt": ({"promt": "a"}, "unknown field 'promt'; did you mean 'prompt'?"),
    "unknown field": ({"prompt": "a", "zzz": 1}, "unknown field 'zzz'; allowed: id, prompt, token_ids"),
    "a field without a name": ({"prompt": "a", "": 1}, "unknown field ''; allowed: id, prompt, token_ids"),
    "a number for a prompt": ({"prompt": 5}, "prompt must be a string"),
    "a text for tokens": ({"token_ids": "abc"}, "token_ids must be a list of token ids"),
    "true for a token": ({"token_ids": [1, True]}, "token_ids must be a list of token ids"),
    "a token of another model": ({"token_ids": [2048]}, "token id 2048 is outside the vocabulary of 2048"),
    "a text for messages": ({"messages": ["hi"]}, "messages must be a list of messages"),
    "an unknown role": ({"messages": [{"role": "usr", "content": "a"}]}, "role 'usr'"),
    "the assistant begins": ({"messages": [{"role": "assistant", "content": "a"}]}, "must have role 'user'"),
    "an empty prompt": ({"prompt": ""}, "the prompt is empty"),
    "half a surrogate pair": ('{"prompt": "\\ud800"}', "surrogate"),
    "a parameter out of range": ({"prompt": "a", "top_p": 2}, "top_p must be in [0, 1], got 2"),
    "a parameter of another kind": ({"prompt": "a", "seed": "x"}, "seed must be an int or None, got 'x'"),
    "no bias": ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias must be an int, got 'x'"),
    "a bias for a token twice": ({"prompt": "a", "logit_bias": {"5": 1, "05": 1}}, "must be an int, got '05'"),
    "too long": ({"prompt": "a", "max_new_tokens": 5000}, "exceed the context_length of 4096"),
}  # fmt: skip


def test_invalid_line_gets_its_error_and_others_complete(
    capsys: pytest.CaptureFixture, checkpoint: Path, prompts: Callable[..., Path]
):
    file = prompts({"prompt": "a"}, *(line for line, _ in REFUSED.values()), {"prompt": "a", "id": "\ud800"})

    code = run("generate", checkpoint, "--file", file, *FEW)

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
    assert rate.startswith("2 completions, 8 tokens, ")
    assert why.startswith(
        f"dsmoe generate: {len(REFUSED)} of {len(REFUSED) + 2} prompts in {file} failed; first error, line 2: "
    )
    assert "is not JSON" in why


def test_invalid_line_keeps_its_id_and_bias_keys_are_strings(
    capsys: pytest.CaptureFixture, checkpoint: Path, prompts: Callable[..., Path]
):
    file = prompts({"id": 7, "prompt": "a", "zzz": 1}, {"prompt": "a", "logit_bias": {"9": 100}})

    code = run("generate", checkpoint, "--file", file, *FEW, "--stop-token-id", 9)

    assert code == 2
    assert [one.get("id") or one["token_ids"] for one in lines(capsys.readouterr().out)] == [7, [9]]


def test_output_file_is_written_atomically(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    prompts: Callable[..., Path],
):
    file, out = prompts({"prompt": "größe"}), tmp_path / "outputs.jsonl"
    assert run("generate", checkpoint, "--file", file, *FEW) == 0
    want = capsys.readouterr().out

    codes = [run("generate", checkpoint, "--file", file, "--out", out, *FEW) for _ in range(2)]
    _, err = capsys.readouterr()
    monkeypatch.setattr(Generator, "__call__", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    interrupted = run("generate", checkpoint, "--file", file, "--out", tmp_path / "other.jsonl")

    assert codes == [0, 2]
    assert out.read_text(encoding="utf-8") == want
    assert err.splitlines()[1] == f"dsmoe generate: {out} exists; nothing is overwritten"
    assert interrupted == 130
    assert set(tmp_path.iterdir()) == {file, out}


def test_output_file_is_locked(
    tmp_path: Path, capsys: pytest.CaptureFixture, checkpoint: Path, prompts: Callable[..., Path]
):
    file, out = prompts({"prompt": "a"}), tmp_path / "outputs.jsonl"

    with lock_name(out):
        code = run("generate", checkpoint, "--file", file, "--out", out, *FEW)

    assert code == 2
    assert f"dsmoe generate: {out} is in use by another process (pid {os.getpid()}); " in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == {file}


def test_file_of_invalid_lines_loads_no_model(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, prompts: Callable[..., Path]
):
    monkeypatch.setattr(Generator, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))

    code = run("generate", checkpoint, "--file", prompts("{", "{"))

    out, err = capsys.readouterr()
    assert code == 2
    assert [one["line"] for one in lines(out)] == [1, 2]
    assert "2 of 2 prompts" in err


def test_progress_counts_completions_on_a_terminal(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, prompts: Callable[..., Path]
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    shown: list[Any] = []
    monkeypatch.setattr("rich.progress.Progress.advance", lambda self, task, step: shown.append(step))

    code = run("generate", checkpoint, "--file", prompts({"prompt": "a", "n": 2}, {"prompt": "b"}), *FEW)

    assert code == 0
    assert sum(shown) == 3
    assert "3 completions, 12 tokens" in capsys.readouterr().err


def test_progress_bars_are_shown_on_terminals_only(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    for person in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda person=person: person)
        for bar in (progress.bar, progress.count):
            with bar("things", 3) as advance:
                advance(2)
        assert ("things" in capsys.readouterr().err) == person


def test_chat_prints_the_reply_only(capsys: pytest.CaptureFixture, checkpoint: Path, generator: Generator):
    want = generator([{"role": "user", "content": "hello"}], max_new_tokens=4, ignore_eos=True).text

    code = run("generate", checkpoint, "--prompt", "hello", "--chat", *FEW)

    assert (code, *capsys.readouterr()) == (0, f"{want}\n", "")


def test_tokens_are_completed_as_text(capsys: pytest.CaptureFixture, checkpoint: Path, generator: Generator):
    want = generator([5, 6, 7], max_new_tokens=4, ignore_eos=True).text

    code = run("generate", checkpoint, "--tokens", "5, 6 7", *FEW)

    assert (code, *capsys.readouterr()) == (0, f"{want}\n", "")


def test_tokens_need_no_tokenizer(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, generator: Generator
):
    want = generator([5, 6], max_new_tokens=4, ignore_eos=True).token_ids
    monkeypatch.setattr(generator, "tokenizer", None)

    codes = [run("generate", checkpoint, *flag, *FEW) for flag in (("--tokens", "5 6"), ("--prompt", "hi"))]

    out, err = capsys.readouterr()
    assert codes == [0, 2]
    assert out == f"{' '.join(map(str, want))}\n"
    assert err == "dsmoe generate: a text prompt needs a tokenizer, and this model has none: pass --tokens\n"


# files | command
EXAMPLES = {
    "a chat template": (lambda folder: (folder / "chat_template.jinja").write_text("x"), "dsmoe chat '{}'"),
    "a tokenizer": (lambda folder: None, "dsmoe generate '{}' --prompt Hello"),
    "neither": (lambda folder: (folder / "tokenizer.json").unlink(), "dsmoe generate '{}' --tokens 0"),
}


@pytest.mark.parametrize(("remove", "command"), EXAMPLES.values(), ids=EXAMPLES)
def test_the_command_after_a_conversion_works(tmp_path: Path, checkpoint: Path, remove: Any, command: str):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "a copy"))
    remove(copy)

    assert example_command(str(copy)) == command.format(copy)


# arguments | stdin, None for a terminal | error
MISTAKES: dict[str, tuple[tuple[str, ...], bytes | None, str]] = {
    "nothing to read": ((), None, "no prompt: pass --prompt, --file or text on stdin"),
    "empty stdin": ((), b"\n", "the prompt is empty"),
    "empty prompt": (("--prompt", ""), None, "the prompt is empty"),
    "stdin is no text": ((), b"ab\xff", "stdin is not UTF-8: byte 2 is 0xff"),
    "file is no text": (("--file", "{tmp}/latin1"), None, "latin1 is not UTF-8: byte 12 is 0xe4"),
    "file is not there": (("--file", "{tmp}/absent"), None, "absent does not exist"),
    "file is empty": (("--file", "{tmp}/blank"), None, "blank has no prompts"),
    "no ids": (("--tokens", "5 six"), None, "--tokens must be token ids, separated by spaces or commas, got 'six'"),
    "empty ids": (("--tokens", " "), None, "the prompt is empty"),
    "ids in a chat": (("--tokens", "5", "--chat"), None, "--chat needs a prompt of text, got --tokens"),
    "two prompts": (("--prompt", "a", "--tokens", "5"), None, "--prompt and --tokens are mutually exclusive"),
    "two sources": (("--prompt", "a", "--file", "{tmp}/good"), None, "--prompt and --file are mutually exclusive"),
    "out without a file": (("--prompt", "a", "--out", "{tmp}/out"), None, "--out needs --file"),
    "out exists": (("--file", "{tmp}/good", "--out", "{tmp}/blank"), None, "exists; nothing is overwritten"),
    "out has no folder": (("--file", "{tmp}/good", "--out", "{tmp}/a/b"), None, "b cannot be written: No such file"),
    "several streams": (("--prompt", "a", "--n", "2"), None, "--n and --logprobs need --file"),
    "logprobs of a stream": (("--prompt", "a", "--logprobs", "2"), None, "--logprobs"),
    "a flag out of range": (("--prompt", "a", "--min-p", "2"), None, "min_p must be in [0, 1], got 2.0"),
    "a flag out of range for a file": (("--file", "{tmp}/good", "--n", "0"), None, "n must be in [1, 1024], got 0"),
    "empty stop": (("--prompt", "a", "--stop", ""), None, "stop must not contain an empty string"),
    "no bias": (("--prompt", "a", "--logit-bias", "5"), None, "'5' is not ID=VALUE"),
    "a biased word": (("--prompt", "a", "--logit-bias", "a=1"), None, "'a=1' is not ID=VALUE"),
    "a bias too large": (("--prompt", "a", "--logit-bias", "5=101"), None, "logit_bias[5] must be in"),
    "a bias elsewhere": (("--prompt", "a", "--logit-bias", "2048=1"), None, "token 2048 is outside the vocabulary"),
    "unknown scheme": (("--prompt", "a", "--quantize", "int3"), None, "--quantize: invalid choice: 'int3'"),
    "unknown cache": (("--prompt", "a", "--cache-dtype", "int4"), None, "--cache-dtype: invalid choice: 'int4'"),
    "no rows": (("--prompt", "a", "--max-batch-size", "0"), None, "max_batch_size must be an int of at least 1, got 0"),
    "no adapter": (("--prompt", "a", "--adapter", "{tmp}/absent"), None, "absent"),
}


@pytest.mark.parametrize(("typed", "piped", "named"), MISTAKES.values(), ids=MISTAKES)
def test_invalid_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    typed: tuple[str, ...],
    piped: bytes | None,
    named: str,
):
    (tmp_path / "good").write_text('{"prompt": "a"}')
    (tmp_path / "latin1").write_bytes('{"prompt": "ä"}'.encode("latin-1"))
    (tmp_path / "blank").write_text("\n \n")
    monkeypatch.setattr("sys.stdin", stdin(piped or b"", terminal=piped is None))
    before = snapshot(tmp_path)

    code = run("generate", checkpoint, *(word.format(tmp=tmp_path) for word in typed))

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("dsmoe generate: ")
    assert err.count("\n") == 1
    assert named in err
    assert snapshot(tmp_path) == before
