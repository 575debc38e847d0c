"""Incremental detokenization with stop strings equals cutting the full text, as early as possible."""

import numpy as np
import pytest

from dsmoe_jax.generate.detokenizer import Detokenizer
from dsmoe_jax.text.tokenizer import Tokenizer
from tests.helpers.hf_folder import make_tokenizer

TEXT = "def naïve(x): # 日本語 🙂🙂 aaab aaaab\n\n    return 'ünïcödé' + x\n\n\nnaïve('🙂')"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer with a few merges."""
    folder = tmp_path_factory.mktemp("stop") / "tokenizer"
    make_tokenizer(folder, 400)
    return Tokenizer.from_pretrained(folder)


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]


def cut(text: str, stops: list[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def may_be_shown(text: str, stops: list[str]) -> str:
    """Return the longest prefix of an unfinished text that no stop string can still cut."""
    for at in range(len(text)):
        if any(text.startswith(stop, at) or stop.startswith(text[at:]) for stop in stops):
            return text[:at]
    return text


def assert_cut_like_the_full_text(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> None:
    full = tokenizer.decode(ids)
    stream, plain = Detokenizer(tokenizer.decode_stream(), stops), tokenizer.decode_stream()
    text = decoded = ""
    for token in ids:
        text += stream.feed(token)
        decoded += plain.feed(token)
        assert text == may_be_shown(decoded, stops)
    text += stream.flush()
    assert text == cut(full, stops)
    assert (stream.stop_string is not None) == any(stop in full for stop in stops)
    assert stream.stop_string is None or full.startswith(stream.stop_string, len(text))
    assert stream.feed(ids[0]) == "" or stream.stop_string is None


@pytest.mark.parametrize("seed", range(60))
def test_random_tokens_are_cut_like_their_full_text(tokenizer: Tokenizer, seed: int):
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, tokenizer.vocab_size, size=60).tolist()  # mostly broken UTF-8
    if seed % 2:  # few letters, so that many stop strings start
        ids = rng.choice(ids_of(tokenizer, "a", "b", "aa", "ab", "é", "🙂"), size=60).tolist()
    full = tokenizer.decode(ids)
    starts = rng.integers(0, len(full) - 8, size=3)
    stops = [full[start : start + rng.integers(1, 8)] for start in starts]
    stops += ["never\x00", full[starts[0] :][:3] + "?", "aab", "b🙂"][: seed % 5]

    for some in (stops[:1], stops, [stop + "\x00" for stop in stops], []):
        assert_cut_like_the_full_text(tokenizer, ids, some)


@pytest.mark.parametrize(
    "stops",
    [
        ["naïve"],
        ["🙂"],
        ["🙂🙂 a"],
        ["日本語 🙂🙂 aaab"],
        ["aaaab"],
        ["\n\n\n"],
        ["\n\n\n", "\n\n"],
        ["ünï", "nïcödé"],
        ["é' + x", "ö", "cödé"],
        [TEXT],
        [TEXT + "!"],
        ["absent"],
    ],
    ids=repr,
)
def test_stop_string_is_found_across_token_boundaries(tokenizer: Tokenizer, stops: list[str]):
    by_word, by_character = ids_of(tokenizer, TEXT), ids_of(tokenizer, *TEXT)
    by_byte = [ids_of(tokenizer, letter)[0] for letter in "xyz"]
    assert len(by_character) > len(by_word) > 3

    assert_cut_like_the_full_text(tokenizer, by_word, stops)
    assert_cut_like_the_full_text(tokenizer, by_character, stops)
    assert_cut_like_the_full_text(tokenizer, by_byte + by_character, stops)


def test_no_text_follows_a_stop_string(tokenizer: Tokenizer):
    stream = Detokenizer(tokenizer.decode_stream(), ["stop"])

    pieces = [stream.feed(token) for token in ids_of(tokenizer, "a", "s", "t", "o", "p", "q", "r")]

    assert pieces == ["a", "", "", "", "", "", ""]
    assert stream.stop_string == "stop"
    assert stream.flush() == ""


def test_partial_stop_string_is_released(tokenizer: Tokenizer):
    stream = Detokenizer(tokenizer.decode_stream(), ["stop"])

    pieces = [stream.feed(token) for token in ids_of(tokenizer, "s", "t", "s", "t", "o", "x", "s")]

    assert pieces == ["", "", "st", "", "", "stox", ""]
    assert stream.flush() == "s"
    assert stream.stop_string is None


@pytest.mark.parametrize(
    ("rest", "text"),
    [
        ("d", ""),  # the one that started first is complete, too
        ("x", "a"),
        ("", "a"),
    ],
)
def test_leftmost_of_overlapping_stop_strings_wins(tokenizer: Tokenizer, rest: str, text: str):
    stream = Detokenizer(tokenizer.decode_stream(), ["bc", "abcd"])

    shown = "".join(stream.feed(token) for token in ids_of(tokenizer, "a", "b", "c", *rest))

    assert shown + stream.flush() == text
    assert stream.stop_string == ("bc" if text else "abcd")


def test_shorter_of_stop_strings_at_one_start_wins(tokenizer: Tokenizer):
    stream = Detokenizer(tokenizer.decode_stream(), ["abc", "ab"])

    for token in ids_of(tokenizer, "a", "b"):
        assert stream.feed(token) == ""

    assert stream.stop_string == "ab"


def test_without_stop_strings_only_partial_characters_wait(tokenizer: Tokenizer):
    ids = ids_of(tokenizer, *TEXT)
    stream, plain = Detokenizer(tokenizer.decode_stream()), tokenizer.decode_stream()

    assert [stream.feed(token) for token in ids] == [plain.feed(token) for token in ids]
    assert stream.stop_string is None
