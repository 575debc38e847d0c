"""Chat templates with a tokenizer: rendering, template selection and special-token injection."""

from pathlib import Path

import pytest

from dsmoe_jax.text.tokenizer import Tokenizer
from tests.helpers import tokenizers
from tests.helpers.tokenizers import BOS, CHAT, EOS, TEXTS, configure

json_file, model_file, folder = tokenizers.json_file, tokenizers.model_file, tokenizers.folder
json_folder, model_folder = tokenizers.json_folder, tokenizers.model_folder


def test_default_template_is_deepseeks(json_folder: Path):
    tokenizer = Tokenizer.from_pretrained(json_folder)

    text = f"{BOS}Be brief.\n\nUser: Hi\n\nAssistant: Hello 100%{EOS}User: Bye\n\n"
    assert tokenizer.render_chat(CHAT) == text
    assert tokenizer.render_chat(CHAT, add_generation_prompt=True) == text + "Assistant:"


def test_chat_has_one_bos_and_eos_after_each_answer(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    before = tokenizer.encode("Be brief.\n\nUser: Hi\n\nAssistant: Hello 100%", add_special_tokens=False)
    after = tokenizer.encode("User: Bye\n\nAssistant:", add_special_tokens=False)

    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)

    assert ids == [tokenizer.bos_token_id, *before, tokenizer.eos_token_id, *after]


def test_template_file_overrides_config_overrides_default(folder: Path):
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "listed"}]

    assert configure(folder, chat_template="config").render_chat(CHAT) == "config"
    assert configure(folder, chat_template=named).render_chat(CHAT) == "listed"
    (folder / "chat_template.jinja").write_text("{{ messages[1].content }} & {{ messages[1] | tojson }}")
    assert configure(folder, chat_template="no").render_chat(CHAT) == 'Hi & {"role": "user", "content": "Hi"}'


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(999) %}{{ 'x' * 99999 }}{% endfor %}", "it wrote more than 16000000 characters"),
    ],
)
def test_failing_template_is_a_one_line_error(json_folder: Path, template: str, reason: str):
    tokenizer = configure(json_folder, chat_template=template)

    with pytest.raises(ValueError, match=r"^the chat template failed: ") as caught:
        tokenizer.render_chat(CHAT)

    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_template_file_must_be_utf8(json_folder: Path):
    (json_folder / "chat_template.jinja").write_bytes(b"\xff\xfe")

    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 text"):
        Tokenizer.from_pretrained(json_folder)


def test_templates_see_all_special_tokens(json_folder: Path):
    template = "{{ eos_token + pad_token + unk_token }}{{ additional_special_tokens[0] }}{{ sep_token is defined }}"
    special = {"pad_token": EOS, "additional_special_tokens": [BOS], "eos_token": EOS}

    tokenizer = configure(json_folder, chat_template=template, **special)

    assert tokenizer.render_chat(CHAT) == f"{EOS}{EOS}<unk>{BOS}False"
    assert tokenizer.render_chat(CHAT, pad_token="P") == f"{EOS}P<unk>{BOS}False"


def test_named_templates_are_chosen_as_in_transformers(json_folder: Path):
    named = [{"name": name, "template": name} for name in ("default", "tool_use", "rag")]
    tokenizer = configure(json_folder, chat_template=named)

    assert tokenizer.render_chat(CHAT) == "default"
    assert tokenizer.render_chat(CHAT, tools=[]) == "tool_use"
    assert tokenizer.render_chat(CHAT, chat_template="rag", tools=[]) == "rag"
    assert tokenizer.render_chat(CHAT, chat_template="{{ 1 + 1 }}") == "2"
    only = configure(json_folder, chat_template=named[1:])
    with pytest.raises(ValueError, match="chat_template must be one of rag, tool_use: there is no default"):
        only.render_chat(CHAT)


def test_split_special_tokens_encodes_them_as_text(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    text = f"fox{tokenizer.eos_token} dog"

    ids = tokenizer.encode(text, split_special_tokens=True)

    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id in tokenizer.encode(text)
    assert Tokenizer.from_pretrained(folder, split_special_tokens=True).encode(text) == ids
    assert configure(folder, split_special_tokens=True).encode(text) == ids
    assert Tokenizer.from_pretrained(folder, split_special_tokens=False).encode_batch([text]) != [ids]


def test_split_ids_equal_the_tokenizers_library(json_folder: Path):
    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(json_folder / "tokenizer.json"))
    library.encode_special_tokens = True
    texts = [*TEXTS, f"a{EOS}b {BOS}", f"{EOS}{EOS}", EOS[:-1]]

    found = configure(json_folder, split_special_tokens=True, add_bos_token=False).encode_batch(texts)

    assert found == [library.encode(text, add_special_tokens=False).ids for text in texts]


def test_messages_cannot_inject_special_tokens(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    halves = [{"role": "user", "content": eos[:3]}, {"role": "user", "content": eos[3:]}]
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    chat = [{"role": "user", "content": f"{eos}a <b> {bos}"}, *halves]

    ids = tokenizer.apply_chat_template(chat, split_special_tokens=True, chat_template=template)

    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert [i for i in ids if i in (bos_id, eos_id)] == [ids[0], ids[-1]] == [bos_id, eos_id]
    assert tokenizer.decode(ids) == f"{eos}a <b> {bos}{eos}"
    assert [i for i in tokenizer.apply_chat_template(chat, chat_template=template) if i == eos_id] == [eos_id] * 3


@pytest.mark.parametrize("template", ["{{ messages[0].role }}", "{{ messages[0].arguments | tojson }}"])
def test_keys_and_roles_cannot_inject_special_tokens(folder: Path, template: str):
    tokenizer = Tokenizer.from_pretrained(folder)
    chat = [{"role": tokenizer.eos_token, "content": "", "arguments": {tokenizer.eos_token: 1}}]
    options = {"chat_template": template + "{{ eos_token }}", "split_special_tokens": True}

    ids = tokenizer.apply_chat_template(chat, **options)

    assert [at for at, i in enumerate(ids) if i == tokenizer.eos_token_id] == [len(ids) - 1]


def test_split_does_not_change_plain_chats(folder: Path):
    plain, split = (Tokenizer.from_pretrained(folder, split_special_tokens=split) for split in (False, True))
    chat = [*CHAT, {"role": "assistant", "content": "if a < b > c: | 你好"}]

    assert split.apply_chat_template(chat) == plain.apply_chat_template(chat)
    assert split.render_chat(chat) == plain.render_chat(chat)


def test_split_rejects_templates_that_rewrite_messages(folder: Path):
    tokenizer = configure(folder, chat_template="{{ messages[1].content | length }}")
    chat = [CHAT[0], {"role": "user", "content": tokenizer.eos_token}]

    with pytest.raises(ValueError, match="split_special_tokens is not supported by this"):
        tokenizer.apply_chat_template(chat, split_special_tokens=True)
