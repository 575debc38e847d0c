"""Chat templates, loss masks, truncation and stop configs. Start at `test_loss_masks_match_literals`."""

import json
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from dsmoe_jax.text.tokenizer import Tokenizer
from dsmoe_jax.train.sft import infer_stop_config, write_examples
from dsmoe_jax.train.sft.examples import Example
from dsmoe_jax.train.sft.formats import Completion, Tokens, parse_record
from dsmoe_jax.train.sft.truncate import truncate
from tests.helpers.corpus import BOS, EOS, byte_tokenizer
from tests.helpers.sft import CALL, CHAT, TOOL, A, chat, jsonl, read, spans

SHARED = Path(__file__).parents[2] / "shared" / "tokenizer"
LONG = 10_000


@pytest.mark.parametrize("template", ["chat", "file", "deepseek-instruct"])
def test_split_special_tokens_keeps_strings_in_messages_as_text(tokenizer_folder: Path, tmp_path: Path, template: str):
    if template == "file":
        (tmp_path / "t").write_text("{% for m in messages %}{{ bos_token + m.content + eos_token }}{% endfor %}")
    line = chat(f"a{EOS}b", f"c{BOS}d{EOS}")
    example_by = {
        split: read(
            line,
            Tokenizer.from_pretrained(tokenizer_folder, split_special_tokens=split),
            tmp_path / "t" if template == "file" else template,
        )
        for split in (False, True)
    }
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)

    control = {split: [i for i in tokens.tolist() if i in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
               for split, (tokens, _) in example_by.items()}  # fmt: skip

    assert len(control[False]) == len(control[True]) + 3
    text = {split: tokenizer.decode(tokens, skip_special_tokens=False) for split, (tokens, _) in example_by.items()}
    assert text[True] == text[False]
    assert f"a{EOS}b" in tokenizer.decode(example_by[True].tokens)


def test_split_special_tokens_keeps_strings_in_completions(tokenizer_folder: Path):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder, split_special_tokens=True)

    tokens = read(Completion(f"a{EOS}", f"b{EOS}"), tokenizer).tokens.tolist()

    assert [i for i in tokens if i == tokenizer.eos_token_id] == [tokens[-1]]
    assert tokenizer.decode(tokens) == f"a{EOS}b{EOS}"


def test_loss_masks_match_literals(tokenizer: Tokenizer):
    line = chat("Hi", "Hello", "Bye", "See you")

    assert spans(read(line, tokenizer), tokenizer) == [
        (False, f"{BOS}User: Hi\n\nAssistant:"),
        (True, f" Hello{EOS}"),
        (False, "User: Bye\n\nAssistant:"),
        (True, f" See you{EOS}"),
    ]
    assert spans(read(line, tokenizer, train_on="last"), tokenizer) == [
        (False, f"{BOS}User: Hi\n\nAssistant: Hello{EOS}User: Bye\n\nAssistant:"),
        (True, f" See you{EOS}"),
    ]
    assert spans(read(Completion("1 + 1 =", " 2"), tokenizer), tokenizer) == [
        (False, f"{BOS}1 + 1 ="),
        (True, f" 2{EOS}"),
    ]
    assert spans(read(chat("Hi", "Hello"), tokenizer, "deepseek-instruct"), tokenizer) == [
        (
            False,
            f"{BOS}You are an AI assistant, developed by DeepSeek Company. For politically sensitive questions, "
            "security and privacy issues, you will refuse to answer.\n### Instruction:\nHi\n### Response:\n",
        ),
        (True, "Hello\n<|EOT|>"),
    ]
    record = Tokens([0, 70, 71, 72, 73, 1], [False, True, True, False, True, True])
    assert read(record, tokenizer).loss_mask.tolist() == record.loss_mask
    assert read(record, tokenizer, train_on="last").loss_mask.tolist() == [False] * 4 + [True] * 2


def test_loss_begins_where_generation_begins(tokenizer: Tokenizer):
    line = chat("Hi", "Hello", "Bye", "See you")
    tokens, loss_mask = read(line, tokenizer)

    for turn, begin in zip((1, 3), np.flatnonzero(np.diff(loss_mask.astype(int)) == 1) + 1, strict=True):
        prompt = tokenizer.apply_chat_template(line.messages[:turn], add_generation_prompt=True)
        assert tokens[:begin].tolist() == prompt


def test_turns_after_the_last_assistant_turn_are_omitted(tokenizer: Tokenizer):
    assert np.array_equal(read(chat("a", "b", "c"), tokenizer).tokens, read(chat("a", "b"), tokenizer).tokens)


def test_first_token_has_no_loss(tokenizer: Tokenizer):
    assert read(Tokens([5, 6], [True, True]), tokenizer).loss_mask.tolist() == [False, True]
    with pytest.raises(ValueError, match="has no token with a loss"):
        read(Tokens([5, 6], [True, False]), tokenizer)


def test_bos_and_eos_are_added_at_most_once(tmp_path: Path):
    bare = byte_tokenizer(tmp_path / "bare", bos=False)
    eager = byte_tokenizer(tmp_path / "eager")
    config = json.loads((eager / "tokenizer_config.json").read_text()) | {"add_eos_token": True}
    (eager / "tokenizer_config.json").write_text(json.dumps(config))

    for home, bos in ((bare, ""), (eager, BOS)):
        tokenizer = Tokenizer.from_pretrained(home)
        for completion in (" 2", f" 2{EOS}"):
            example = read(Completion("1 + 1 =", completion), tokenizer)
            assert spans(example, tokenizer) == [(False, f"{bos}1 + 1 ="), (True, f" 2{EOS}")]


ODD_PAIRS = [  # instruction, output
    ("Hi", "Hello"),
    ("  spaces  ", "  spaces  "),
    ("\n\nlines\n", "\n\nlines\n"),
    ("tab\t", "\ttab"),
    ("\u3000wide\u2003blanks\x1c", "\u3000wide\u2003blanks\x1c"),
    ("", "to nothing"),
    (" \n ", "to blanks"),
    ("你好 世界。", "你好。"),
    ("Führer ø ö ú ÿ", "õ ÷ û ý À ù Á þ ü"),
    ("👩‍👧 zwj", "👍🏽"),
    ("e\u0301 combining", "\u202eright to left"),
    ("### Response:", "### Response:\n"),
    ("a\n### Response:\nb", "### Instruction:\nc"),
    ("<|EOT|>", "<|EOT|>"),
    ("x <|EOT|> y", "x\n<|EOT|>\n<|EOT|>"),
    (f"{BOS}{EOS}", f"a{EOS}b{BOS}"),
    ("{} {0} {instruction}", "{} {output}"),
    ("%s %(a)s \\n", "\\n {{ messages }} {% raw %}"),
    ("1234567890", "3.14159"),
    ("\r\nCRLF\r\n", "a\r\nb\r\n"),
    ("nul\0", "\0nul"),
]


def original(tokenizer: Tokenizer, instruction: str, output: str) -> tuple[list[int], list[bool]]:
    """Reference: finetune.py's source and target, tokenized with BOS, with the length of the source masked."""
    source = "".join(
        [
            "You are an AI assistant, developed by DeepSeek Company. ",
            "For politically sensitive questions, security and privacy issues, you will refuse to answer.",
            "\n",
            "### Instruction:",
            "\n",
            instruction.strip(),
            "\n",
            "### Response:",
            "\n",
        ]
    )
    both = tokenizer.encode(source + output + "\n<|EOT|>")
    masked = len(tokenizer.encode(source))
    return both, [at >= masked for at in range(len(both))]


@pytest.mark.parametrize("which", ["bytes", "deepseek"])
def test_deepseek_instruct_matches_the_original_script(tokenizer: Tokenizer, which: str):
    if which == "deepseek":
        if not (SHARED / "tokenizer.json").is_file():
            pytest.skip("../shared/tokenizer, the original's tokenizer, is not here")
        tokenizer = Tokenizer.from_pretrained(SHARED)

    for instruction, output in ODD_PAIRS:
        tokens, loss_mask = read(chat(instruction, output), tokenizer, "deepseek-instruct")

        assert (tokens.tolist(), loss_mask.tolist()) == original(tokenizer, instruction, output)


@pytest.mark.skipif(not (SHARED / "tokenizer.json").is_file(), reason="../shared/tokenizer is not here")
def test_chat_by_turn_matches_the_full_chat_template():
    tokenizer = Tokenizer.from_pretrained(SHARED)

    for question, answer in ODD_PAIRS[:15]:
        line = chat(question, answer, question, answer)
        tokens, _ = read(line, tokenizer)

        assert tokenizer.decode(tokens, skip_special_tokens=False) == tokenizer.decode(
            tokenizer.apply_chat_template(line.messages), skip_special_tokens=False
        )
    assert read(line, tokenizer).tokens.tolist() == tokenizer.apply_chat_template(line.messages)


def test_deepseek_instruct_refuses_several_turns(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="must be one user turn and one assistant turn"):
        read(chat("a", "b", "c", "d"), tokenizer, "deepseek-instruct")


def test_template_may_be_a_jinja_file(tmp_path: Path, tokenizer: Tokenizer):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
    )

    found = spans(read(chat("Hi", " Hello"), tokenizer, path), tokenizer)

    assert found == [(False, f"{BOS}[user]Hi[assistant]"), (True, f" Hello{EOS}")]


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}", 1),
        ("{{ messages | length }}{{ '!' if add_generation_prompt }}", 1),
        ("{% for m in messages[-2:] %}{{ m.content }};{% endfor %}", 3),
    ],
)
def test_template_without_a_stable_prefix_is_refused(tmp_path: Path, tokenizer_folder: Path, template: str, turn: int):
    (tmp_path / "bad.jinja").write_text(template)
    source = jsonl(tmp_path / "a.jsonl", [{"messages": chat("a", "b", "c", "d").messages}])

    with pytest.raises(ValueError, match=rf"a.jsonl:1 cannot be split at turn {turn}: the template renders") as refused:
        write_examples(
            source, tokenizer_folder, tmp_path / "out", template=tmp_path / "bad.jinja", sequence_length=LONG
        )

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"training": False}, {"learn": 0}, {"loss": False}, {"loss_mask": 0.0}]
)
def test_turn_marked_without_loss_has_none(tokenizer: Tokenizer, mark: dict[str, Any]):
    messages = chat("Hi", "Hello", "Bye", "See you").messages
    line = parse_record({"messages": [messages[0], messages[1] | mark, *messages[2:]]})

    want = [(False, f"{BOS}User: Hi\n\nAssistant: Hello{EOS}User: Bye\n\nAssistant:"), (True, f" See you{EOS}")]
    assert spans(read(line, tokenizer), tokenizer) == want


def test_only_the_completion_of_messages_has_a_loss(tokenizer: Tokenizer):
    messages = chat("Hi", "Hello", "Bye", "See you").messages
    line = parse_record({"prompt": messages[:3], "completion": messages[3:]})

    assert spans(read(line, tokenizer), tokenizer)[-1] == (True, f" See you{EOS}")
    assert read(line, tokenizer).loss_mask.sum() == len(f" See you{EOS}") - len(EOS) + 1


TOOLS = (
    "{% for tool in tools or [] %}<tool>{{ tool.function.name }}</tool>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content if m.content else '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}({{ call.function.arguments }}){% endfor %}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
)


TOOL_LINE = {
    "messages": [
        CHAT[0],
        {"role": A, "content": None, "tool_calls": [{"id": "1", **CALL}]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        {"role": A, "content": "5!"},
    ],
    "tools": json.dumps([TOOL]),
}


def test_template_with_tools_renders_them(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "tools.jinja").write_text(TOOLS)

    found = spans(read(parse_record(TOOL_LINE), tokenizer, tmp_path / "tools.jinja"), tokenizer)

    assert found == [
        (False, "<tool>look</tool>[user]q[assistant]"),
        (True, f"<call>look({{}}){EOS}"),
        (False, "[tool]5[assistant]"),
        (True, f"5!{EOS}"),
    ]


IGNORED = {
    "tools": ("tools or []", "[]", TOOL_LINE, "has 'tools', which"),
    "calls": ("m.tool_calls or []", "[]", TOOL_LINE, "has 'tool_calls' in message 1, which"),
    "the second call": ("m.tool_calls or []", "(m.tool_calls or [])[:1]",
                        {"messages": [CHAT[0], {"role": A, "content": "see", "tool_calls": [CALL, CALL]}]},
                        "has 'tool_calls' in message 1, which"),
    "arguments": ("call.function.arguments", "''", TOOL_LINE, "has 'tool_calls' in message 1, which"),
    "a result": ("m.content if m.content", "m.content if m.content and m.role != 'tool'", TOOL_LINE,
                 "has a text from 'tool' in message 2, which"),
    "a system": ("m.content if m.content", "m.content if m.content and m.role != 'system'",
                 {"messages": CHAT, "system": "q"}, "has a text from 'system' in message 0, which"),
    "a field of a turn": ("x", "x", {"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "so"}]},
                          "has 'reasoning_content' in message 1, which"),
    "a name": ("x", "x", {"messages": [{**CHAT[0], "name": "Ann"}, CHAT[1]]}, "has 'name' in message 0, which"),
    "a mask of unknown sense": ("x", "x", {"messages": [CHAT[0], {**CHAT[1], "mask": True}]},
                                "has 'mask' in message 1, which"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "fields", "problem"), IGNORED.values(), ids=IGNORED)
def test_fields_that_a_template_ignores_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, old: str, new: str, fields: dict[str, Any], problem: str
):
    (tmp_path / "tools.jinja").write_text(TOOLS.replace(old, new) if old in TOOLS else TOOLS)

    with pytest.raises(ValueError, match=f"{problem} the chat template ignores"):
        read(parse_record(fields), tokenizer, tmp_path / "tools.jinja")


def test_template_error_names_the_field(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="has 'tool_calls': the chat template failed"):
        read(parse_record({"messages": TOOL_LINE["messages"][:2]}), tokenizer)


def test_deepseek_instruct_refuses_tools(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="has 'tools', which deepseek-instruct ignores"):
        read(parse_record({"messages": CHAT, "tools": [TOOL]}), tokenizer, "deepseek-instruct")


TURN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + END }}{% endfor %}"


STOP_CONFIGS = {
    "an EOS token": ("eos_token + '\\n'", {}),
    "text": ("'<|im_end|>\\n'", {"stop_strings": ["<|im_end|>"]}),
    "another token": ("'\\n' + bos_token + '\\n'", {"eos_token_id": 0}),
    "nothing": ("'\\n'", {}),
}


@pytest.mark.parametrize(("end", "fields"), STOP_CONFIGS.values(), ids=STOP_CONFIGS)
def test_stop_config_is_inferred(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, end: str, fields: dict
):
    (tmp_path / "template").write_text(TURN.replace("END", end))

    found = infer_stop_config(tmp_path / "template", tokenizer)

    assert found == fields
    assert ("does not learn to stop" in caplog.text) == (end == "'\\n'")


def test_stop_config_survives_filters_of_the_template(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "template").write_text("{% for m in messages %}{{ m.content | upper }}###{% endfor %}")

    assert infer_stop_config(tmp_path / "template", tokenizer) == {"stop_strings": ["###"]}


def test_stop_token_stays_a_token_with_split_special_tokens(tmp_path: Path, tokenizer_folder: Path):
    split = Tokenizer.from_pretrained(tokenizer_folder, split_special_tokens=True)
    (tmp_path / "template").write_text(TURN.replace("END", "bos_token"))

    assert infer_stop_config("chat", split) == {}
    assert infer_stop_config(tmp_path / "template", split) == {"eos_token_id": 0}


def test_stop_config_of_known_templates(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        instruct, chat = (infer_stop_config(name, tokenizer) for name in ("deepseek-instruct", "chat"))

    assert (instruct, chat) == ({"stop_strings": ["<|EOT|>"]}, {})
    (line,) = [record.message for record in caplog.records if "Template" in record.message]
    assert line == (
        "Template deepseek-instruct: assistant turns end with the text '<|EOT|>', which is not an EOS token; "
        "adding it to stop_strings in generation_config.json"
    )


def masked(*runs: tuple[bool, int], bos: bool = True) -> Example:
    """BOS 0 and tokens 1, 2, …, in runs with or without loss."""
    loss_mask = np.concatenate([np.full(size, learned) for learned, size in runs])
    return Example(np.arange(len(loss_mask), dtype=np.int32) + (not bos), loss_mask)


def test_truncation_matches_literals():
    short = truncate(masked((False, 3), (True, 3), (False, 4)), 8, 0)
    assert short.tokens.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]

    late = truncate(masked((False, 10), (True, 6)), 6, 0)  # length // 2 loss tokens
    assert late.tokens.tolist() == [0, 8, 9, 10, 11, 12]
    assert late.loss_mask.tolist() == [False] * 3 + [True] * 3

    few = truncate(masked((False, 10), (True, 1), (False, 2), (True, 9)), 6, 0)  # a short completion is complete
    assert few.tokens.tolist() == [0, 6, 7, 8, 9, 10]

    bare = truncate(masked((False, 10), (True, 6), bos=False), 6, 0)
    assert bare.tokens.tolist() == [8, 9, 10, 11, 12, 13]


runs = strategies.lists(strategies.tuples(strategies.booleans(), strategies.integers(1, 30)), max_size=6)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(runs=runs, bos=strategies.booleans(), length=strategies.integers(2, 40))
def test_truncated_examples_keep_loss_tokens(runs: list[tuple[bool, int]], bos: bool, length: int):
    example = masked((False, 1), *runs, (True, 1), bos=bos)
    first = int(example.loss_mask.argmax())
    run = int(np.append(example.loss_mask[first:], False).argmin())

    tokens, loss_mask = truncate(example, length, 0)

    assert len(tokens) == len(loss_mask) == min(length, len(example.tokens))
    assert loss_mask.sum() >= min(run, length // 2) > 0
    assert not loss_mask[0]
    assert (tokens[0] == 0) == bos
    assert (np.diff(tokens[1:]) == 1).all()  # contiguous
    assert loss_mask.tolist() == example.loss_mask[tokens - (not bos)].tolist()
