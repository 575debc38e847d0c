"""Every block and command of the README pages runs here at small size; an unknown one fails.

The blocks are read from the pages and run unchanged in a folder (`world`) where the names they use are tiny models and
texts; `SMALL` has the arguments that make a command small. Start at `test_python_blocks_run`.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dsmoe_jax import train
from dsmoe_jax.cli.commands import VERBS, _parse, main
from dsmoe_jax.cli.flags import ARGUMENTS, GENERATION_PLAN, PLAN
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import import_hf, write_adapter
from dsmoe_jax.convert.peft_matching import make_plan
from dsmoe_jax.generate import Generator
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.train import loop
from dsmoe_jax.train.flags import parse_finetuning, parse_pretraining
from dsmoe_jax.train.recipes import FINETUNING, RECIPES
from tests.helpers.adapters import random_adapter
from tests.helpers.hf_folder import make_tokenizer, random_params, tiny, write_hf
from tests.helpers.page_modules import MODULES
from tests.helpers.serving import running

pytestmark = pytest.mark.heavy

ROOT: Final = Path(__file__).resolve().parent.parent
ROOMS: Final = (
    *("", "convert", "train", "train/data"),
    *(f"dsmoe_jax/{room}" for room in ("generate", "kernels", "evaluate", "experiments", "plan", "serve")),
)
PAGES: Final = [ROOT / folder / "README.md" for folder in (*ROOMS, "tests/benchmarks")]
LAUNCH: Final = [ROOT / "train/launch/slurm.sh", ROOT / "train/launch/jobset.yaml"]  # the others: test_tokenize_tasks
# The others compile for many devices, train, or repeat tests/test_cli.py: they are slow tests.
FAST: Final = {
    *(("Quick start", "python"), ("Your own loop", "python"), ("Conversion", "python"), ("Conversion", "bash")),
}

_RUN: Final = [
    *("--steps", "1", "--trackers", "jsonl", "--step.gradient-accumulation-steps", "1"),
    *("--data.sequence-length", "32", "--data.batch-size", "8"),
]
_OWN_TEXT: Final = ["--data.sources", "book.txt", "--data.tokenizer", "moe16b"]
_OWN_MODEL: Final = ["--model", "path/to/hf_folder/config.json"]
# What a command is given besides, by how it begins: the longest beginning counts.
SMALL: Final[dict[str, list[str]]] = {
    "dsmoe demo": ["--steps", "2"],
    "dsmoe convert": [],
    "dsmoe export": [],
    "dsmoe verify": [],
    "dsmoe merge": [],
    "dsmoe info": [],
    "dsmoe plan": [],
    "dsmoe plot": [],
    "dsmoe push": [],
    "dsmoe generate": ["--max-new-tokens", "4"],
    "dsmoe chat": ["--max-new-tokens", "4"],
    "dsmoe evaluate": [],
    "dsmoe ablate": [],
    "dsmoe routes": [],
    "dsmoe reproduce": [],
    "dsmoe serve": [],
    "dsmoe tokenize": [],
    "dsmoe pretrain": [*_RUN, *_OWN_MODEL],
    "dsmoe pretrain tiny": [*_RUN, *_OWN_MODEL, *_OWN_TEXT],
    "dsmoe finetune": _RUN,
    "dsmoe finetune chat16b --data train.jsonl --show": [],
}
# Not run here, but parsed: they need the hub (tests/test_hub.py, test_push.py, test_hub_datasets.py), a store, gguf, 32
# devices, data (test_evaluate, test_foreign_data) or training (test_experiments).
ONLY_PARSED: Final = (
    *("dsmoe convert deepseek-ai/", "dsmoe push", "dsmoe export moe16b moe16b.gguf", "dsmoe export native model.gguf"),
    *("dsmoe pretrain deepseek_moe_16b", "dsmoe evaluate", "dsmoe tokenize hf://", "dsmoe tokenize gs://"),
    *("dsmoe finetune chat16b --data hf://", "dsmoe pretrain deepseek_moe_2b --data.sources megatron/", "dsmoe serve"),
    *("dsmoe ablate", "dsmoe routes", "dsmoe reproduce"),
)
TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Block(NamedTuple):
    """A fenced block."""

    section: str
    language: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    section, language, lines = "", None, []
    for line in page.splitlines():
        if line.startswith("```"):
            if language is None:
                language, lines = line[3:], []
            else:
                yield Block(section, language, "\n".join(lines))
                language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("#"):
            section = line.lstrip("# ")


BLOCKS: Final = [block for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))]


def commands(text: str, optional: str = r" \1") -> list[list[str]]:
    """The commands of shell lines, as words: without comments and variables before them.

    `optional` is what becomes of [--flags in brackets]; as it is they are taken, "" leaves them out.
    """
    found = []
    for line in text.splitlines():
        for command in re.split(r"&&|\|", re.sub(r" \[(--[^\]]*)\]", optional, line)):
            words = shlex.split(command, comments=True)
            while words and (words[0] == "srun" or re.fullmatch(r"[A-Z_]+=\S*", words[0])):
                words = words[1:]
            if words and words[0] != "cat":
                found.append(words)
    return found


def inline_commands(page: str) -> list[list[str]]:
    """Those within sentences, tables and the map of files."""
    prose = re.sub(r"^```(?!\n).*?^```$", "", page, flags=re.M | re.S)
    spans = re.findall(r"`((?:[A-Z_]+=\S+ )?(?:dsmoe|pip|python) [^`\n]+)`", prose)
    return [words for span in spans for words in commands(span)]


def launch_command(path: Path) -> str:
    """The training command of a launch template, on one line."""
    text = path.read_text(encoding="utf-8").replace("$JOB_COMPLETION_INDEX", "3")
    return " ".join(text[text.index("dsmoe pretrain") :].split())


ALL_COMMANDS: Final = [
    *(words for block in BLOCKS if block.language == "bash" for words in commands(block.text)),
    *(words for page in PAGES for words in inline_commands(page.read_text(encoding="utf-8"))),
    *(words for path in LAUNCH for words in commands(launch_command(path))),
]
CALLS: Final = sorted({shlex.join(words) for words in ALL_COMMANDS if words[:2] == ["python", "-m"]})


def indexed(language: str) -> list[Any]:
    """The blocks of a language as parameters, the slow ones marked."""
    found = [block for block in BLOCKS if block.language == language]
    return [
        pytest.param(
            block, id=f"{i} {block.section}", marks=[pytest.mark.slow] * ((block.section, language) not in FAST)
        )
        for i, block in enumerate(found)
    ]


# --- a world in which the page is true ---


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the page's blocks name."""
    folder = tmp_path_factory.mktemp("readme")
    hf = folder / "path" / "to" / "hf_folder"
    make_tokenizer(hf, 300)
    settings = json.loads((hf / "tokenizer_config.json").read_text())
    (hf / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    config = tiny(vocab_size=300, max_position_embeddings=512)
    write_hf(hf, config, random_params(config))
    for name in ("deepseek-moe-16b-base", "deepseek-moe-16b-chat"):
        shutil.copytree(hf, hf.parent / name)
    for name in ("moe16b", "chat16b", "runs/tiny/model"):
        import_hf(hf, folder / name)
    book = "\n\n".join(f"Line {i}: the sky is blue, and the sea is {i} miles wide." for i in range(60))
    (folder / "book.txt").write_text(book)
    (folder / "prompt.txt").write_text("def main(\n")
    (folder / "prompts.jsonl").write_text('{"id": 7, "prompt": "import os", "stop": ["\\n\\n"]}\n')
    turns = [{"instruction": f"Add {i} and 1.", "output": f"It is {i + 1}."} for i in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, and where everything runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = jax.config.values["jax_compilation_cache_dir"]
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)  # a run sets it to a folder of its own
    compilation_cache.reset_cache()


# --- blocks ---


def run_small(config: train.RunConfig) -> train.Result:
    """Train one step of the block's config on a tiny model."""
    data = dataclasses.replace(config.data, sequence_length=32, batch_size=8, tokenizer="moe16b")
    if config.init_from is None:
        config = dataclasses.replace(config, model="path/to/hf_folder/config.json")
    step = dataclasses.replace(config.step, gradient_accumulation_steps=1, remat="none")
    return loop.run(dataclasses.replace(config, data=data, step=step, steps=1, trackers=("jsonl",)))


@pytest.mark.parametrize("block", indexed("python"))
def test_python_blocks_run(block: Block, world: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "run", run_small)
    Path("corpus").mkdir()
    shutil.copy("book.txt", "corpus")
    source = block.text.replace("[100000, 1558, 317]", "[0, 15, 31]")  # of a larger vocabulary
    if "import_hf(" in source:
        shutil.rmtree("moe16b")
    names: dict[str, Any] = {"token_ids": jnp.ones((8, 16), jnp.int32), "batches": [jnp.ones((8, 16), jnp.int32)] * 2}
    if block.section == "Quick start":
        exec("from dsmoe_jax import Generator", names)  # of the block before
    with contextlib.ExitStack() as stack:
        if (address := "127.0.0.1:8000") in source:
            server = stack.enter_context(running(Generator.from_pretrained("chat16b"), model_name="chat16b"))
            source = source.replace(address, f"127.0.0.1:{server.port}")

        exec(compile(source, f"README.md, {block.section}", "exec"), names)


@pytest.mark.parametrize("block", indexed("bash"))
def test_shell_blocks_run(block: Block, world: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("builtins.input", functools.partial(next, iter(["Hello!", "/quit"] * 9)))
    Path("corpus").mkdir()
    if "jsonl.zst" in block.text:
        import zstandard

        lines = "".join(json.dumps({"text": f"The {i}th text of the corpus."}) + "\n" for i in range(200))
        Path("corpus/a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))

    if block.section == "Adapters":  # of a run on another page
        lora, config = LoraConfig(r=2), ModelConfig.from_file("chat16b")
        write_adapter("runs/lora/adapter", lora, config, random_adapter(make_plan(lora, config), config))

    for words in commands(block.text, optional=""):
        command = shlex.join(words)
        if words[0] == "dsmoe" and not command.startswith(ONLY_PARSED):
            run(words, command, monkeypatch)


def run(words: list[str], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begins = max((start for start in SMALL if command.startswith(start)), key=len)
    if words[1] in ("convert", "export", "merge"):  # a page shows other ways to the same name
        at = 2 if words[1] == "merge" else 1
        shutil.rmtree([word for word in words[2:] if not word.startswith("-")][at], ignore_errors=True)
    arguments = [str(next(Path().glob(word), word)) if "*" in word else word for word in words[1:]]
    with open("prompt.txt") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        try:
            code = main([*arguments, *SMALL[begins]])
        except SystemExit as end:  # --help
            code = end.code
    assert not code, command


def test_links_point_to_files():
    for page in PAGES:
        links = re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8"))
        assert not [link for link in links if not (page.parent / link).exists()], page


def test_every_block_is_of_a_kind_that_is_tested():
    known = {"python", "bash", ""}

    assert {block.language for block in BLOCKS} <= known
    assert [block.section for block in BLOCKS if not block.language] == ["Repository"]


# --- commands ---


@pytest.mark.parametrize("command", sorted({shlex.join(words) for words in ALL_COMMANDS}))
def test_every_command_is_known_and_parses(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)

    check(shlex.split(command))


def check(words: list[str]) -> None:
    """Fail for a command that is not known here, or that its own parser refuses."""
    command = shlex.join(words)
    match words:
        case ["pip", "install", "-e", target]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            names = re.fullmatch(r"\.\[([\w,-]+)\]", target)
            assert names is not None, command
            assert set(names[1].split(",")) <= set(extras), command
        case ["python", "-m", "pytest", *arguments]:
            assert all(Path(argument).exists() for argument in arguments if "/" in argument), command
        case ["python", "-m", module, *_]:
            assert module in MODULES, command
        case ["dsmoe", verb]:  # in a sentence
            assert verb in VERBS
        case ["dsmoe", *arguments]:
            assert command.startswith(tuple(SMALL)), command
            asked = _parse(arguments)
            flags = [flag for flag in getattr(asked, "flags", []) if flag != "--help"]
            if asked.verb == "pretrain":
                parse_pretraining(flags)
            elif asked.verb == "finetune":
                parse_finetuning(flags)
        case _:
            pytest.fail(f"a README has a command that no test runs: {command}")


def field_flags(config: Any, prefix: str = "--") -> Iterator[str]:
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name.replace('_', '-')}", getattr(config, field.name)
        yield from field_flags(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]


def test_flags_in_the_text_exist():
    config = dataclasses.replace(FINETUNING["lora_1x80gb"](), quantize="nf4")
    known = {*field_flags(RECIPES["tiny"]()), *field_flags(config)} | {"--debug", "--force", "--mesh"}
    known |= {
        flag for arguments in (*ARGUMENTS.values(), PLAN, GENERATION_PLAN) for flags, _ in arguments for flag in flags
    }
    for page in PAGES[: len(ROOMS)]:
        spans = re.findall(r"`(--[^`\n]+)`", page.read_text(encoding="utf-8"))
        assert not [flag for span in spans for flag in re.findall(r"--[\w.-]+", span) if flag not in known], page


def test_a_command_of_no_test_fails():
    for command in ("dsmoe frobnicate x", "python -m tests.nothing", "pip install -e '.[nothing]'", "make"):
        with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception)):
            check(shlex.split(command))


# --- modules ---


@pytest.mark.slow
@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize("command", [call for call in CALLS if "pytest" not in call])
def test_modules_run(command: str, world: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # of a reader's machine; conftest simulates eight
    _, _, module, *arguments = shlex.split(command)

    with jax.default_matmul_precision("default"):
        MODULES[module](arguments, monkeypatch)


def test_docstrings_name_modules_that_are_tested():
    found = {
        name
        for path in [*(ROOT / "tests").glob("*.py"), *(ROOT / "tests" / "benchmarks").rglob("*.py")]
        if path != Path(__file__).resolve()
        for name in re.findall(r"python -m (tests[\w.]*\w)", path.read_text(encoding="utf-8"))
    }

    # A child is started by its parent, and kills have a test of their own.
    assert found - {"tests.benchmarks.gpu.child", "tests.kills"} == set(MODULES)
