"""The help of every verb: all flags have a text, choices and defaults are real values, groups have a sentence."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from dsmoe_jax.cli.commands import VERBS, make_parser
from dsmoe_jax.cli.flags import ARGUMENTS
from dsmoe_jax.errors import unknown_flag
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.train.finetune import FinetuneConfig
from dsmoe_jax.train.flags import METAVARS
from dsmoe_jax.train.recipes import FINETUNING, RECIPES
from dsmoe_jax.train.sft import FORMATS
from tests.helpers.command import run

CONFIG_VERBS = {"pretrain": ("pretrain", RECIPES), "finetune": ("finetune", FINETUNING)}
MODEL_VERBS = ("export", "verify", "generate", "chat", "serve", "merge", "info")
LEAKS = ("type: ignore", "None}", "(default: None)", "(default: )", "_jax.train", "STR", "Any")


class Group(NamedTuple):
    """A group of flags in tyro's help."""

    title: str
    text: list[str]  # the lines before the first flag
    flags: dict[str, str]  # the help text of each flag, by the line that names it


def groups(text: str) -> list[Group]:
    found, name = [], ""
    for line in (re.sub("[│╭╮╰╯─]|-{3,}", " ", line).rstrip() for line in text.partition("Recipes:\n")[0].splitlines()):
        if line.strip().endswith("options"):
            found.append(Group(line.strip(), [], {}))
        elif found and re.match(" {1,3}-", line):
            name = line.strip()
            found[-1].flags[name] = ""
        elif found and line.strip():
            flags = found[-1].flags
            found[-1].text.extend([] if flags else [line.strip()])
            flags |= {name: f"{flags[name]} {line.strip()}".strip()} if flags else {}
    return found


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """The help of the verbs with a config."""
    return {}


@pytest.fixture
def help_of(helps: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "100")

    def get(*typed: str) -> str:
        if (key := " ".join(typed)) not in helps:
            assert run(*typed, "--help") == 0
            helps[key] = capsys.readouterr().out
        return helps[key]

    return get


@pytest.mark.parametrize("typed", [("pretrain",), ("finetune",)], ids=" ".join)
def test_every_flag_of_a_config_has_a_text(help_of: Any, typed: tuple[str, ...]):
    flags = {name: text for group in groups(help_of(*typed)) for name, text in group.flags.items()}

    assert len(flags) > 50
    assert not [name for name, text in flags.items() if len(text.partition("(default")[0]) < 12]
    assert not [name for name, text in flags.items() if "(default: " not in text and name != "-h, --help"]
    assert not [(name, leak) for name, text in flags.items() for leak in LEAKS if leak in f"{name} {text}"]


@pytest.mark.parametrize("verb", CONFIG_VERBS)
def test_every_group_of_flags_has_a_sentence(help_of: Any, verb: str):
    first, *others = groups(help_of(verb))

    assert first.title == "options"  # its sentence is that of the program
    assert len(others) > 5
    assert not [group.title for group in others if not re.search(r"\w{4}.*\.$", " ".join(group.text))]


@pytest.mark.parametrize("verb", CONFIG_VERBS)
def test_recipes_are_listed_with_a_line_each(help_of: Any, verb: str):
    listed = help_of(verb).partition("Recipes:\n")[2]

    for name, recipe in CONFIG_VERBS[verb][1].items():
        assert re.search(rf"^  {name} +\S.+\.$", listed, re.MULTILINE), name
        assert recipe.__doc__.splitlines()[0] in listed


@pytest.mark.parametrize("typed", [("finetune",), ("finetune", "CKPT")], ids=" ".join)
def test_fine_tuning_shows_the_flags_of_adapters(help_of: Any, typed: tuple[str, ...]):
    text = help_of(*typed)

    assert all(flag in text for flag in ("--recipe {full,", "--show INT", "--lora ", "--lora.r INT", "--data FILE ..."))
    assert "--init-from" not in text


def fields_of(config: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield from fields_of(value) if dataclasses.is_dataclass(value) else [(field.name, field.type)]


def test_fine_tuning_does_not_speak_of_pretraining(help_of: Any):
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", help_of("finetune")).split())

    assert "init_from" not in text
    assert "trained on the sources" not in text
    assert "CKPT|HUB_ID is a native checkpoint, a Hugging Face folder or a hub id" in text


def test_the_help_names_the_recipe_of_its_defaults(help_of: Any):
    for typed, recipe in ((("pretrain",), "tiny"), (("pretrain", "bench"), "bench")):
        assert f"here those of `{recipe}`" in " ".join(help_of(*typed).split())


def test_every_metavar_is_of_a_field():
    names = {name for config in (RECIPES["tiny"](), FinetuneConfig(lora=LoraConfig())) for name, _ in fields_of(config)}

    assert not METAVARS.keys() - names


def test_formats_of_the_help_are_those_of_the_reader(help_of: Any):
    assert f"--data.format {{auto,{','.join(FORMATS)}}}" in help_of("finetune")


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_every_argument_has_a_text_and_a_value(verb: str):
    for action in make_parser()[1][verb]._actions:
        assert len(action.help or "") > 5, action
        takes_value = action.nargs != 0
        assert action.metavar or action.choices or not takes_value, action
        if takes_value and action.option_strings and not action.required:
            assert re.search("default|repeatable|with --file|LoRA|prompts", str(action.help)), action.option_strings


def test_verbs_have_arguments_or_a_config():
    assert VERBS.keys() == ARGUMENTS.keys() | CONFIG_VERBS.keys() | {"plan"}  # a config, and flags of its own
    assert not ARGUMENTS.keys() & CONFIG_VERBS.keys()


def test_groups_of_arguments_have_a_sentence():
    for verb in make_parser()[1].values():
        for group in verb._action_groups[2:]:
            assert group.description, group.title
            assert group.description.endswith("."), group.title


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_options_of_generation_are_only_in_its_help(verb: str):
    text = make_parser()[1][verb].format_help()

    assert ("model options" in text) == (verb in ("generate", "chat", "serve"))
    assert ("sampling options" in text) == (verb in ("generate", "chat"))


def test_a_model_has_the_same_metavar_everywhere(help_of: Any):
    verbs = make_parser()[1]
    models = {verb: next(a.metavar for a in verbs[verb]._actions if "hub id" in str(a.help)) for verb in MODEL_VERBS}

    assert models == dict.fromkeys(MODEL_VERBS, "CKPT|HUB_ID") | {"info": "PRESET|CONFIG.json|CKPT|HUB_ID"}
    assert "dsmoe finetune CKPT|HUB_ID" in help_of("finetune")


# typed | the line
MISTAKES: dict[str, tuple[str, str]] = {
    "pretrain tiny --step 4": ("pretrain", "unknown flag --step: did you mean --steps?"),
    "pretrain tiny --optimizer.learning_rat=1": ("pretrain", "unknown flag --optimizer.learning_rat: did you mean"),
    "pretrain tiny --lr 3": ("pretrain", "unknown flag --lr: did you mean --optimizer.learning-rate?"),
    "pretrain tiny --batch_size 3": ("pretrain", "unknown flag --batch_size: did you mean --data.batch-size?"),
    "pretrain tiny --wd=0": ("pretrain", "unknown flag --wd: did you mean --optimizer.weight-decay?"),
    "pretrain tiny --optimizer.learning-rate -1": ("pretrain", ": --optimizer.learning-rate must be "),
    "pretrain tiny --data.batch-size 0": ("pretrain", ": --data.batch-size must be at least 1, got 0"),
    "pretrain tiny --checkpoint.interval 0": ("pretrain", ": --checkpoint.interval must be at least 1, got 0"),
    "pretrain tiny word": ("pretrain", "unexpected argument 'word'"),
    "pretrain tiny --steps many": ("pretrain", "--steps must be an integer, got 'many'"),
    "pretrain tiny --optimizer.eps x": ("pretrain", "--optimizer.eps must be a number, got 'x'"),
    "pretrain tiny --step.remat some": ("pretrain", "--step.remat must be one of none, dots, full, got 'some'"),
    "pretrain cfg/my8.json": ("pretrain", "pass a model with it, `tiny --model cfg/my8.json`"),
    "pretrain deepseek_moe_16": ("pretrain", "got 'deepseek_moe_16': did you mean deepseek_moe_16b?"),
    "pretrain --steps 3 tiny": (
        "pretrain",
        "RECIPE must come first: dsmoe pretrain RECIPE --FLAG VALUE; recipes are tiny",
    ),
    "finetune --data a.jsonl CKPT": ("finetune", "CKPT|HUB_ID must come first: dsmoe finetune CKPT|HUB_ID --data FILE"),
    "finetune": ("finetune", "CKPT|HUB_ID must come first: dsmoe finetune CKPT|HUB_ID --data FILE"),
    "finetune CKPT --lora.rr 3": ("finetune", "unknown flag --lora.rr: did you mean --lora.r?"),
    "finetune CKPT --lora.r 0": ("finetune", ": --lora.r must be "),
    "finetune CKPT --data.prefetch -1": ("finetune", ": --data.prefetch must be at least 0, got -1"),
    "finetune CKPT --quantize nf4": ("finetune", ": --quantize nf4 requires --lora"),
    "finetune CKPT --epochs 0": ("finetune", ": --epochs must be more than 0, got 0.0"),
    "finetune CKPT --show -1": ("finetune", ": --show must be at least 0, got -1"),
    "tokenize a.txt --tokenizer b --outt c": ("tokenize", "unknown flag --outt: did you mean --out?"),
    "finetune CKPT --recipe lora": ("finetune", "recipe must be one of full, full_8x40gb"),
    "finetune CKPT --recipe lora_1x80": ("finetune", "got 'lora_1x80': did you mean lora_1x80gb?"),
    "finetune CKPT --recipe": ("finetune", "--recipe: expected one argument"),
    "generate x --promt a": ("generate", "unknown flag --promt: did you mean --prompt?"),
    "chat x --xyzzy": ("chat", "unknown flag --xyzzy (see dsmoe chat --help)"),
    "info deepseek-moe-16b": ("info", "got 'deepseek-moe-16b': did you mean deepseek_moe_16b?"),
    "merge a b c d": ("merge", "unexpected argument 'd'"),
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_names_the_verb_and_the_way_out(typed: str, capsys: pytest.CaptureFixture[str]):
    verb, line = MISTAKES[typed]

    assert run(*typed.split()) == 2

    error = capsys.readouterr().err
    assert error.startswith(f"dsmoe {verb}: ")
    assert line in error
    assert error.count("\n") == 1


def test_a_misspelled_verb_is_suggested(capsys: pytest.CaptureFixture[str]):
    assert run("convrt", "a", "b") == 2

    error = capsys.readouterr().err
    assert error.startswith("dsmoe: verb must be one of demo, convert, ")
    assert error.endswith("got 'convrt': did you mean convert?\n")


def test_only_similar_flags_are_suggested():
    assert unknown_flag("--stpes", ["--steps", "--seed"]) == "unknown flag --stpes: did you mean --steps?"
    assert unknown_flag("--xyzzy", ["--steps"]) == "unknown flag --xyzzy"
