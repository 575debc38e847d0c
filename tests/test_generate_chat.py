"""`Chat`: history, streaming, and reuse of the KV cache across turns."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.config import RopeScaling
from dsmoe_jax.generate import Chat, Generator, SamplingParams
from dsmoe_jax.model import DeepSeekMoE
from dsmoe_jax.text.tokenizer import Tokenizer
from tests.helpers.small import SMALL, small_model


def test_history_is_kept_until_reset(generator: Generator):
    chat = Chat(generator, max_new_tokens=4)

    first = "".join(chat.send("hello"))
    after_one = list(chat.messages)
    started: Any = chat.send("and now?")
    next(started, "")
    started.close()
    after_two = list(chat.messages)
    chat.reset()

    assert after_one == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    assert [message["role"] for message in after_two] == ["user", "assistant"] * 2
    assert chat.messages == []


def test_blank_reply_is_stored_as_empty(generator: Generator):
    assert generator.tokenizer is not None
    (blank,) = generator.tokenizer.encode(" ", add_special_tokens=False)
    chat = Chat(generator, max_new_tokens=4, logit_bias={blank: 100.0})

    pieces = list(chat.send("hello"))
    again = list(chat.send("and now?"))

    assert pieces == again == []
    assert [message["content"] for message in chat.messages] == ["hello", "", "and now?", ""]


def test_only_new_tokens_of_each_turn_are_prefilled(generator: Generator):
    assert generator.tokenizer is not None
    chat, read = Chat(generator, max_new_tokens=20), []
    new = len(generator.tokenizer.encode("<eos>User: question 1, and some more words\n\nAssistant:")) + 2

    for turn in range(5):
        output = "".join(chat.send(f"question {turn}, and some more words"))
        encoded = len(generator.tokenizer.encode(output))  # may differ from the generated tokens
        read.append((generator.stats.prompt_tokens, generator.stats.reused_tokens, encoded))

    assert read[0][1] == 0
    for (prompt, reused, _), (_, before, output) in zip(read[1:], read, strict=False):
        assert prompt <= new + output
        assert reused > before


# Templates that add different text before and after a reply.
TRIMS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + (m['content'] | trim) + "
    "('\n\n' if m['role'] == 'user' else eos_token) }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
)
FORGETS = (
    "{% for m in messages %}{% if m['role'] == 'user' or not loop.last %}{{ m['role'] + ': ' + "
    "(m['content'] if m['role'] == 'user' else m['content'][1:]) + '\n' }}{% endif %}{% endfor %}"
)
LAST_TURN = "{{ messages | length }} messages, the last: {{ messages[-1]['content'] }}\n"


SAMPLED = {"max_new_tokens": 6, "temperature": 2.0, "seed": 1}
STOPPED = {"max_new_tokens": 8, "stop": ["e", "a", " "]}
ENDINGS = {
    "cut": {"max_new_tokens": 1},
    "sampled": SAMPLED,
    "ignore_eos": SAMPLED | {"ignore_eos": True},
    "stop": STOPPED,
    "stop_token_ids": {"max_new_tokens": 8, "stop_token_ids": list(range(2, 1000))},
    "half characters": {"max_new_tokens": 3, "logit_bias": {token: 100.0 for token in range(100, 200)}},
    "empty": {"max_new_tokens": 8, "logit_bias": {1: 100.0}},
}
TURNS = {
    **{ending: (None, params) for ending, params in ENDINGS.items()},
    "a template that trims": (TRIMS, SAMPLED),
    "a template that forgets": (FORGETS, STOPPED),
    "a template of the last turn": (LAST_TURN, SAMPLED),
}
SLOW = ("cut", "ignore_eos", "stop_token_ids", "half characters", "a template of the last turn")


@pytest.mark.parametrize(
    ("template", "params"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in TURNS.items()],
)
def test_every_turn_encodes_the_rendered_history(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str | None, params: dict
):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    if template is not None:
        for file in tokenizer.files:
            shutil.copy(file, tmp_path)
        (tmp_path / "chat_template.jinja").write_text(template)
        tokenizer = Tokenizer.from_pretrained(tmp_path)
    made, read = Generator(small_model(), tokenizer, eos_token_id=[1, 7]), []
    start = made.start
    monkeypatch.setattr(made, "start", lambda ids, **options: read.append(ids) or start(ids, **options))
    chat = Chat(made, system="Be brief.", **params)

    for turn in range(3):
        pieces: Any = chat.send(f"d of end {turn}?")
        if turn == 1:
            next(pieces, "")
            pieces.close()
        "".join(pieces)
        history = chat.messages[:-1]

        assert read[turn] == tokenizer.encode(
            tokenizer.render_chat(history, add_generation_prompt=True), add_special_tokens=False
        )
    assert made([read[-1]], **params)[0].token_ids == chat.token_ids


def test_reply_is_stored_as_cut_by_the_stop_string(generator: Generator):
    full = Chat(generator, max_new_tokens=12, ignore_eos=True)
    text = "".join(full.send("hello"))
    stop = text[3:6]

    chat = Chat(generator, max_new_tokens=12, ignore_eos=True, stop=stop)
    shown = "".join(chat.send("hello"))

    assert shown == text[: text.index(stop)]
    assert chat.messages[-1]["content"] == shown


def test_keys_rotated_by_dynamic_ntk_are_not_reused():
    """The RoPE base of dynamic NTK depends on the length of the turn."""
    config = dataclasses.replace(SMALL, max_position_embeddings=24, rope_scaling=RopeScaling("dynamic", 2.0))
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    made, kept = Generator(DeepSeekMoE.init(config, seed=2)), []

    for ids in (range(10, 40), range(10, 20)):
        engine = made.engine()
        (output,) = engine.submit(list(ids), params, retain_prefix=True)
        while engine.busy:
            engine.step()
        kept.append(output.prefix is not None)

    assert kept == [False, True]
