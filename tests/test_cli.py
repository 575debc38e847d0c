"""The command `dsmoe`: verbs, errors, environment, import time and compile time."""

import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import dsmoe_jax
from dsmoe_jax.checkpoint.manifest import is_native
from dsmoe_jax.cli.commands import VERBS
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import import_hf
from dsmoe_jax.generate import Chat, Generator
from dsmoe_jax.info import describe
from dsmoe_jax.model import _forward, abstract, split
from tests.helpers.command import run
from tests.helpers.hf_folder import make_tokenizer, random_params, snapshot, tiny, write_hf

HELP_SECONDS = 0.5  # best of three
COMPILE_SECONDS = 60  # of CPU time; the 16B's forward takes about 20
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with a tokenizer, in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("cli") / "hf"
    make_tokenizer(folder, 300)
    config = tiny(vocab_size=300)
    return write_hf(folder, config, random_params(config))


@pytest.fixture(scope="session")
def native(hf: Path) -> Path:
    """The same checkpoint, converted."""
    import_hf(hf, hf.parent / "native")
    return hf.parent / "native"


def test_info_describes_presets_and_folders(capsys: pytest.CaptureFixture, hf: Path, native: Path):
    codes = [run("info", "deepseek_moe_16b"), run("info", hf), run("info", native), run("info", hf / "config.json")]

    out, err = capsys.readouterr()
    assert codes == [0, 0, 0, 0]
    assert out == describe("deepseek_moe_16b") + 3 * describe(str(hf))
    assert "16,375,728,128" in out
    assert err == ""


def test_convert_writes_a_native_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture, hf: Path):
    out = tmp_path / "new" / "out"

    code = run("convert", hf, out, "--dtype", "bfloat16")

    assert code == 0
    assert is_native(out)
    assert {array.dtype for array in split(dsmoe_jax.load(out))[1].values()} == {jnp.dtype("bfloat16")}
    assert (out / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    assert f"dsmoe generate {out}" in capsys.readouterr().out


def test_generate_prints_prompt_and_completion(capsys: pytest.CaptureFixture, hf: Path, native: Path):
    options = ("--prompt", "def main(", "--max-new-tokens", "8")
    answer = Generator.from_pretrained(native)(["def main("], max_new_tokens=8)[0].text

    codes = [run("generate", native, *options), run("generate", hf, *options)]

    assert codes == [0, 0]
    assert answer
    assert capsys.readouterr().out == 2 * f"def main({answer}\n"


def test_seed_determines_the_output(capsys: pytest.CaptureFixture, native: Path):
    def text(seed: int) -> str:
        options = ("--temperature", "1", "--top-k", "200", "--top-p", "0.99", "--max-new-tokens", "8")
        assert run("generate", native, "--prompt", "def main(", *options, "--seed", seed) == 0
        return capsys.readouterr().out

    first, again, other = text(1), text(1), text(2)

    assert first == again
    assert first != other


@pytest.mark.parametrize(("stop", "code"), [(iter(["/quit"]), 0), (KeyboardInterrupt(), 130)], ids=["quit", "Ctrl-C"])
def test_chat_ends_on_quit_and_ctrl_c(monkeypatch: pytest.MonkeyPatch, native: Path, stop: Any, code: int):
    def ask(prompt: str) -> str:
        if isinstance(stop, BaseException):
            raise stop
        return next(stop)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(Chat, "send", lambda *_: pytest.fail("unexpected message"))

    got = run("chat", native)

    assert got == code


def test_a_model_that_cannot_fit_is_refused(
    native: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("dsmoe_jax.generate.loading.available_bytes", lambda mesh: 1000)

    codes = [run("generate", native, "--prompt", "x"), run("chat", native)]

    assert codes == [2, 2]
    assert capsys.readouterr().err.count("1 kB are available: quantize it") == 2


def test_every_verb_has_help(capsys: pytest.CaptureFixture):
    codes = [run("--help"), run("--version"), *(run(verb, "--help") for verb in VERBS)]

    out, err = capsys.readouterr()
    assert set(codes) == {0}
    assert err == ""
    assert all(f"usage: dsmoe {verb}" in out for verb in VERBS)
    assert f"dsmoe {dsmoe_jax.__version__}" in out


def broken_config(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": "wide"}')
    return folder


def damaged(folder: Path) -> Path:
    """A native checkpoint whose largest file is truncated."""
    import_hf(write_hf(folder / "hf", tiny(), random_params(tiny())), folder / "native")
    weights = max((f for f in (folder / "native").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(weights, weights.stat().st_size // 2)
    return folder / "native"


GENERATE = ("generate", "{native}", "--prompt", "def")

# arguments | error
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no verb": ((), "VERB"),
    "unknown verb": (("explain",), "explain"),
    "missing argument": (("convert", "{hf}"), "OUT"),
    "unknown flag": ((*GENERATE, "--beams", "4"), "--beams"),
    "not a number": ((*GENERATE, "--max-new-tokens", "many"), "many"),
    "missing path": (("generate", "{tmp}/absent", "--prompt", "def"), "absent"),
    "missing path for chat": (("chat", "{tmp}/absent"), "absent"),
    "missing path for convert": (("convert", "{tmp}/absent", "{tmp}/out"), "absent"),
    "empty folder": (("generate", "{tmp}", "--prompt", "def"), "config.json"),
    "prompt too long": ((*GENERATE, "--context-length", "8"), "context_length"),
    "context of 1": ((*GENERATE, "--context-length", "1"), "context_length must be an int of at least 2, got 1"),
    "empty prompt": (("generate", "{native}", "--prompt", ""), "prompt is empty"),
    "negative temperature": ((*GENERATE, "--temperature", "-1"), "temperature must be in [0, 1000], got -1.0"),
    "NaN temperature": ((*GENERATE, "--temperature", "nan"), "temperature"),
    "top-p 1.5": ((*GENERATE, "--top-p", "1.5"), "top_p"),
    "top-k -2": ((*GENERATE, "--top-k", "-2"), "top_k"),
    "0 new tokens": ((*GENERATE, "--max-new-tokens", "0"), "max_new_tokens"),
    "negative seed": ((*GENERATE, "--seed", "-2"), "seed"),
    "unknown dtype": ((*GENERATE, "--dtype", "int4"), "int4"),
    "OUT exists": (("convert", "{hf}", "{native}"), "exists"),
    "already converted": (("convert", "{native}", "{tmp}/out"), "is already a native checkpoint"),
    "the demo's DIR exists": (("demo", "--out", "{native}"), "exists"),
    "unknown preset": (("info", "deepseek_moe_17b"), "deepseek_moe_16b"),
    "broken config": (("info", "{broken}"), "hidden_size must be int, got 'wide'"),
    "broken config to convert": (("convert", "{broken}", "{tmp}/out"), "hidden_size"),
    "damaged checkpoint": (("generate", "{damaged}", "--prompt", "def"), ": damaged: "),
}
MAKE: dict[str, Callable[[Path], Path]] = {"{broken}": broken_config, "{damaged}": damaged}


@pytest.mark.parametrize(("typed", "named"), MISTAKES.values(), ids=MISTAKES)
def test_invalid_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, hf: Path, native: Path, typed: tuple[str, ...], named: str
):
    made = {word: str(MAKE[word](tmp_path / word.strip("{}"))) for word in typed if word in MAKE}
    capsys.readouterr()
    before = snapshot(tmp_path)

    code = run(*(made.get(word) or word.format(hf=hf, native=native, tmp=tmp_path) for word in typed))

    out, err = capsys.readouterr()
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("dsmoe")
    assert err.endswith("\n")
    assert named in err
    assert out.strip() in ("", "def")
    assert snapshot(tmp_path) == before


# fmt: off
EMPTY_PATHS: dict[str, tuple[str, ...]] = {
    "path":         ("generate", "{}", "--prompt", "a"),
    "--adapter":    ("generate", "x", "--adapter", "{}", "--prompt", "a"),
    "--file":       ("generate", "x", "--file", "{}"),
    "--out":        ("generate", "x", "--file", "a.jsonl", "--out", "{}"),
    "source":       ("convert", "{}", "out"),
    "out":          ("convert", "x", "{}"),
    "export source": ("export", "{}", "out"),
    "other":        ("verify", "x", "{}"),
    "--report":     ("verify", "x", "--report", "{}"),
    "sources":      ("tokenize", "a.txt", "{}", "--tokenizer", "x", "--out", "out"),
    "--tokenizer":  ("tokenize", "a.txt", "--tokenizer", "{}", "--out", "out"),
    "CKPT|HUB_ID":  ("finetune", "{}", "--data", "a.jsonl"),
    "adapter":      ("merge", "x", "{}", "out"),
    "model":        ("info", "{}"),
    "RECIPE":       ("pretrain", "{}"),
    "--output-dir": ("pretrain", "tiny", "--output-dir", "{}"),
    "--init-from":  ("pretrain", "tiny", "--init-from", "{}"),
    "config":       ("pretrain", "tiny", "--model", "{}"),
    "data.sources": ("pretrain", "tiny", "--data.sources", "{}"),
    "data.tokenizer": ("pretrain", "tiny", "--data.tokenizer", "{}"),
    "data.files":   ("finetune", "x", "--data", "{}"),
    "data.template": ("finetune", "x", "--data", "a.jsonl", "--data.template", "{}"),
}
# fmt: on


@pytest.mark.parametrize(("named", "typed"), EMPTY_PATHS.items(), ids=EMPTY_PATHS)
def test_empty_path_is_rejected_by_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, named: str, typed: tuple[str, ...]
):
    monkeypatch.chdir(tmp_path)

    codes = [run(*(word.format(empty) for word in typed)) for empty in ("", " ")]

    err = capsys.readouterr().err
    assert codes == [2, 2]
    assert err.count("\n") == 2
    assert err.count(f"{named.removeprefix('export ').removeprefix('config.')} must") == 2
    assert not list(tmp_path.iterdir())


def test_functions_reject_an_empty_path(tmp_path: Path):
    from dsmoe_jax.convert import export_hf, merge_to, verify
    from dsmoe_jax.train.sft import Examples

    calls: list[Callable[[str], Any]] = [
        dsmoe_jax.load,
        dsmoe_jax.Tokenizer.from_pretrained,
        Generator.from_pretrained,
        ModelConfig.from_file,
        describe,
        verify,
        Examples.open,
        is_native,
        lambda path: import_hf(path, tmp_path / "out"),
        lambda path: import_hf(tmp_path, path),
        lambda path: export_hf(path, tmp_path / "out"),
        lambda path: merge_to(path, tmp_path, tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="must be a path, got an empty string"):
            call("")


@pytest.mark.slow
def test_invalid_input_shows_no_traceback(tmp_path: Path):
    command = [sys.executable, "-m", "dsmoe_jax", "generate", str(damaged(tmp_path)), "--prompt", "def"]

    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert ": damaged: " in done.stderr


@pytest.mark.slow
def test_closed_pipe_is_no_error():
    command = f"'{sys.executable}' -m dsmoe_jax info tiny | true; exit ${{PIPESTATUS[0]}}"

    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=REPOSITORY, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_help_is_fast():
    command = [sys.executable, "-m", "dsmoe_jax", "--help"]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
        seconds.append(time.perf_counter() - started)

    assert min(seconds) < HELP_SECONDS
    assert all(verb in done.stdout for verb in VERBS)


LIGHTWEIGHT = [
    "import dsmoe_jax",
    "import dsmoe_jax; dsmoe_jax.ModelConfig.preset('deepseek_moe_16b')",
    "import dsmoe_jax; dsmoe_jax.Tokenizer",
    "import dsmoe_jax.cli",
    "import dsmoe_jax; dir(dsmoe_jax)",
    "import dsmoe_jax; dir(dsmoe_jax.train)",
]


@pytest.mark.parametrize("code", LIGHTWEIGHT)
def test_lightweight_imports_do_not_import_jax(code: str):
    code = f"import sys; {code}; assert not {{'jax', 'flax', 'orbax'}} & set(sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)

    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize("module", [dsmoe_jax, dsmoe_jax.train], ids=["dsmoe_jax", "train"])
def test_public_names_resolve_and_are_listed(module: Any):
    values = [getattr(module, name) for name in module.__all__]

    assert all(callable(value) or inspect.ismodule(value) for value in values)
    assert set(dir(module)) - {"__version__"} == set(module.__all__)
    assert module.__all__ == sorted(module.__all__)


def test_training_is_an_attribute_of_the_package():
    code = "import dsmoe_jax; dsmoe_jax.train.run; dsmoe_jax.train.recipes.FINETUNING; dsmoe_jax.train.step.StepConfig"

    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)

    with pytest.raises(AttributeError, match="has no attribute 'runn'"):
        dsmoe_jax.train.runn  # noqa: B018


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'DeepSeekMoe'"):
        dsmoe_jax.DeepSeekMoe  # noqa: B018


@pytest.mark.slow
def test_forward_of_the_16b_compiles_in_a_minute():
    graph, specs = abstract(ModelConfig.preset("deepseek_moe_16b"))
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16) for name, spec in specs.items()}
    ids = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    started = time.process_time()

    compiled = _forward.lower(graph, params, ids, None, None, False).compile()

    assert time.process_time() - started < COMPILE_SECONDS
    memory: Any = compiled.memory_analysis()
    assert memory.argument_size_in_bytes >= 32_751_456_256


def shell(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `dsmoe` is the command."""
    command = f'dsmoe() {{ "{sys.executable}" -m dsmoe_jax "$@"; }}; {script}'
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("dsmoe info tiny <&- >&- 2>&-", 0),
        pytest.param("dsmoe info nothing >&- 2>&-", 2, marks=pytest.mark.slow),
        ("dsmoe --help | head -c0; exit ${PIPESTATUS[0]}", 0),
        pytest.param("dsmoe info nothing 2>&1 >/dev/null | head -c0; exit ${PIPESTATUS[0]}", 2, marks=pytest.mark.slow),
        ("dsmoe info tiny >/dev/full", 2),
        pytest.param("mkdir gone && cd gone && rmdir ../gone && dsmoe info tiny", 0, marks=pytest.mark.slow),
        ("dsmoe info $'\\xff'", 2),
    ],
)
def test_no_environment_causes_a_traceback(tmp_path: Path, script: str, code: int):
    done = shell(script, tmp_path)

    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1


def test_new_file_does_not_reuse_a_closed_stream(tmp_path: Path):
    script = (
        f'"{sys.executable}" -c "import sys; from dsmoe_jax.cli.streams import *; open_standard_streams(); '
        "file = open('data', 'w'); print('lost'); print('lost', file=sys.stderr); file.write('kept'); "
        'sys.exit(file.fileno() < 3)" <&- >&- 2>&-'
    )

    done = shell(script, tmp_path)

    assert done.returncode == 0
    assert (tmp_path / "data").read_text() == "kept"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_unencodable_characters_are_escaped(tmp_path: Path, encoding: str):
    script = f'"{sys.executable}" -c "from dsmoe_jax.cli.streams import *; open_standard_streams(); print(chr(0x6f22))"'

    done = shell(script, tmp_path, PYTHONIOENCODING=encoding)

    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u6f22\n", "")


def test_status_lines_survive_a_closed_pipe(tmp_path: Path):
    script = (
        f'"{sys.executable}" -c "from dsmoe_jax.cli.streams import print_status as say; '
        "[say('line') for _ in range(20000)]; open('done', 'w')\" | head -n1"
    )

    done = shell(script, tmp_path)

    assert (done.stdout, done.stderr) == ("line\n", "")
    assert (tmp_path / "done").exists()


def interrupt(then: Callable[[], None]) -> Callable[[Any], None]:
    """Return a verb that is interrupted in `then` and would otherwise run for ten seconds."""

    def verb(_: Any) -> None:
        then()
        time.sleep(10)

    return verb


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def import_slowly() -> None:
    """Import a module during whose execution Ctrl-C arrives."""
    exec("import slowly_imported")


class Pressed:
    def __del__(self) -> None:
        press()


@pytest.mark.parametrize("where", [press, import_slowly, Pressed], ids=["a call", "an import", "a finalizer"])
def test_interrupt_ends_a_verb_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, where: Callable[[], None]
):
    source = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\nDONE = True\n"
    (tmp_path / "slowly_imported.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(VERBS, "info", (interrupt(where), VERBS["info"][1]))
    monkeypatch.setattr(signal, "default_int_handler", signal.getsignal(signal.SIGINT))

    assert run("info", "tiny") == 130
    assert capsys.readouterr().err == "\n"
    assert where is not import_slowly or sys.modules.pop("slowly_imported").DONE


def test_broken_pipe_other_than_stdout_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def broken(_: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(VERBS, "info", (broken, VERBS["info"][1]))

    assert run("info", "tiny") == 2
    assert capsys.readouterr().err == "dsmoe info: Broken pipe\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), AssertionError("a bug")], ids=repr)
def test_internal_error_shows_a_traceback_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: Exception
):
    def fail(_: Any) -> None:
        raise error

    monkeypatch.setitem(VERBS, "info", (fail, VERBS["info"][1]))

    assert run("info", "tiny") == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("dsmoe info: internal error, please report it with the traceback above\n")


@pytest.mark.parametrize("typed", [("--debug", "info", "nothing"), ("info", "nothing", "--debug")], ids=" ".join)
def test_debug_shows_the_traceback_of_invalid_input(capsys: pytest.CaptureFixture, typed: tuple[str, ...]):
    assert run(*typed) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.splitlines()[-1].startswith("dsmoe info: ")


@pytest.mark.slow
def test_platform_without_a_device_is_rejected(tmp_path: Path, native: Path):
    done = shell(f"dsmoe generate {native} --prompt a", tmp_path, JAX_PLATFORMS="no_such_platform")

    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("dsmoe generate: JAX has no device: ")


def test_argument_that_is_not_utf8_is_rejected(capsys: pytest.CaptureFixture):
    assert run("convert", "a\udcff", "b") == 2
    assert capsys.readouterr().err == "dsmoe: argument 'a\\udcff' is not UTF-8\n"
