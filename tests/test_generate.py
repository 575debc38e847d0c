"""`Generator`: prompts, stop conditions, log-probabilities, scoring, seeds and loading."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import RopeScaling
from dsmoe_jax.generate import Generator
from dsmoe_jax.generate.loading import upcast_for_cpu
from dsmoe_jax.generate.programs import bucket, step
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import DeepSeekMoE, assemble, merge, split
from tests.helpers import golden, reference
from tests.helpers.small import SMALL, small_model


def test_text_and_its_token_ids_are_equivalent_prompts(generator: Generator):
    assert generator.tokenizer is not None
    ids = generator.tokenizer.encode("import os")

    by_text, by_ids = generator(["import os", ids], max_new_tokens=8, ignore_eos=True)

    assert by_text == by_ids
    assert by_text.text == generator.tokenizer.decode(by_text.token_ids)
    assert (by_text.finish_reason, by_text.stop_reason) == ("length", None)


def test_chat_is_rendered_with_the_generation_prompt(generator: Generator):
    assert generator.tokenizer is not None
    chat = [{"role": "user", "content": "hi"}]

    assert generator.encode(chat) == generator.tokenizer.apply_chat_template(chat, add_generation_prompt=True)


def test_split_special_tokens_encodes_them_as_text(checkpoint: Path):
    generator = Generator.from_pretrained(checkpoint, split_special_tokens=True)
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    eos = tokenizer.eos_token_id

    text, chat = generator.encode(f"a{tokenizer.eos_token}"), [{"role": "user", "content": f"a{tokenizer.eos_token}"}]

    assert eos not in [*text, *generator.encode(chat)]
    assert tokenizer.decode(text) == f"a{tokenizer.eos_token}"


def test_stream_equals_call(generator: Generator):
    options = {"max_new_tokens": 8, "temperature": 0.9, "seed": 3, "ignore_eos": True}

    pieces = list(generator.stream("import os", **options))

    assert "".join(pieces) == generator(["import os"], **options)[0].text


def test_outputs_do_not_depend_on_the_order_of_prompts(generator: Generator):
    prompts = [[5, 6, 7], list(range(10, 25)), [8]]
    options = {"max_new_tokens": 6, "ignore_eos": True}

    together = generator(prompts, **options)
    swapped = generator(prompts[::-1], **options)[::-1]

    assert [output.token_ids for output in together] == [output.token_ids for output in swapped]


def test_text_excludes_the_eos_token(generator: Generator):
    tokens = generator([[5, 6, 7]], max_new_tokens=8, ignore_eos=True)[0].token_ids
    ending = Generator(small_model(), generator.tokenizer, eos_token_id=tokens[3])

    output = ending([[5, 6, 7]], max_new_tokens=8)[0]

    assert output.token_ids == tokens[: tokens.index(tokens[3]) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert output.text == ending.tokenizer.decode(output.token_ids[:-1])  # type: ignore[union-attr]
    assert "".join(ending.stream([5, 6, 7], max_new_tokens=8)) == output.text


def test_generator_without_tokenizer_returns_token_ids():
    output = Generator(small_model())([[1, 2, 3]], max_new_tokens=2, ignore_eos=True)[0]

    assert len(output.token_ids) == 2
    assert output.text == ""


def test_context_may_exceed_max_position_embeddings():
    case = "d_rope_linear"  # max_position_embeddings 32
    prompt = golden.tensors(case)["in.input_ids"][0]  # 40 tokens
    model = golden.model(case)

    output = Generator(model)([prompt], max_new_tokens=2, ignore_eos=True)[0]

    assert output.token_ids[0] == int(np.argmax(golden.tensors(case)["logits"][0, -1]))


def test_dynamic_ntk_uses_the_longest_prompt_not_the_bucket():
    scaled = RopeScaling("dynamic", 2.0)
    config = dataclasses.replace(SMALL, max_position_embeddings=6, rope_scaling=scaled)
    model = DeepSeekMoE.init(config, seed=2)
    graph, params = split(model)
    prompts, new = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15, 16, 17]], 6

    @jax.jit
    def read(ids: jax.Array, cache: KVCache, length: jax.Array):
        hidden = merge(graph, params).hidden(ids, cache=cache, rope_length=length)
        return merge(graph, params).logits(hidden.last_hidden_state[:, -1]).argmax(-1), hidden.cache

    outputs = Generator(model)(prompts, max_new_tokens=new, ignore_eos=True)

    # One unpadded row at a time, with the length of the left-padded batch of transformers at each step.
    for prompt, output in zip(prompts, outputs, strict=True):
        token, cache = read(jnp.asarray([prompt]), KVCache.empty(config, 1, 16), jnp.int32(9))
        tokens = [int(token[0])]
        for more in range(1, new):
            token, cache = read(token[:, None], cache, jnp.int32(9 + more))
            tokens.append(int(token[0]))
        assert output.token_ids == tokens


def test_eos_comes_from_generation_config(tmp_path: Path):
    shutil.copytree(golden.folder("a_baseline"), tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))

    assert Generator.from_pretrained(tmp_path / "hf").eos_token_ids == {7, 9}


def test_eos_of_the_tokenizer_is_added(checkpoint: Path, tmp_path: Path):
    shutil.copytree(checkpoint, tmp_path / "native")
    (tmp_path / "native" / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "stop_strings": "x"}))

    made = Generator.from_pretrained(tmp_path / "native")

    assert made.eos_token_ids == {7, 1}
    assert made.stop_strings == ("x",)


def test_text_ends_before_the_stop_string(generator: Generator):
    options = {"max_new_tokens": 24, "ignore_eos": True}
    (full,) = generator(["import os"], **options)
    stop = full.text[9:12]

    (output,) = generator(["import os"], stop=[stop, "never to be seen"], **options)
    pieces = list(generator.stream("import os", stop=stop, **options))

    assert output.text == full.text[: full.text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert len(output.token_ids) < len(full.token_ids)
    assert "".join(pieces) == output.text


def test_stop_string_of_the_model_acts_like_eos(generator: Generator):
    (full,) = generator(["import os"], max_new_tokens=24, ignore_eos=True)
    stop, other = full.text[9:12], full.text[5:7]
    made = Generator(small_model(), generator.tokenizer, eos_token_id=[], stop_strings=[stop])

    (output,) = made(["import os"], max_new_tokens=24)
    (earlier,) = made(["import os"], max_new_tokens=24, stop=other)
    (ignored,) = made(["import os"], max_new_tokens=24, ignore_eos=True)

    assert output.text == "".join(made.stream("import os", max_new_tokens=24)) == full.text[: full.text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert earlier.text == full.text[: min(full.text.index(other), full.text.index(stop))]
    assert ignored == full


def test_absent_stop_string_changes_nothing(generator: Generator):
    options = {"max_new_tokens": 8, "ignore_eos": True}

    plain, stopping = (generator(["import os"], stop=stop, **options)[0] for stop in ([], ["never to be seen"]))

    assert stopping == plain


def test_generator_is_usable_after_a_closed_stream(generator: Generator):
    options = {"max_new_tokens": 30, "ignore_eos": True}
    want = generator(["import os"], **options)[0].text
    pieces = generator.stream("import os", **options)

    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]

    assert want.startswith(first)
    assert generator(["import os"], **options)[0].text == want


def test_log_probabilities_match_the_model(generator: Generator):
    prompt = [5, 6, 7]

    (output,) = generator([prompt], max_new_tokens=5, ignore_eos=True, logprobs=3, temperature=0.7, top_k=5)

    ids = np.array([[*prompt, *output.token_ids]])
    want = np.asarray(jax.nn.log_softmax(small_model()(ids).logits[0]))[len(prompt) - 1 : -1]
    for token, found, row in zip(output.token_ids, output.logprobs or [], want, strict=True):
        assert found.logprob == pytest.approx(row[token], abs=1e-4)
        assert list(found.top) == np.argsort(-row, kind="stable")[:3].tolist()
        assert list(found.top.values()) == pytest.approx(np.sort(row)[::-1][:3], abs=1e-4)


def test_text_continuation_is_tokenized_with_its_prompt(generator: Generator):
    assert generator.tokenizer is not None
    ids = generator.tokenizer.encode("import os, sys")
    begun = len(generator.tokenizer.encode("import"))

    blank_before, blank_after, by_ids = generator.score(
        ["import", "import ", ids[:begun]], [" os, sys", "os, sys", ids[begun:]]
    )

    assert blank_before == blank_after == by_ids


@pytest.mark.parametrize("prompt", ["", " ", "\n ", []], ids=repr)
def test_empty_context_is_bos(generator: Generator, prompt: Any):
    assert generator.tokenizer is not None
    blank = prompt if isinstance(prompt, str) else ""
    ids = generator.tokenizer.encode(blank + "import os", add_special_tokens=False)

    assert generator.score([prompt], ["import os"]) == generator.score([[0]], [ids])


def test_empty_context_precedes_token_ids(generator: Generator):
    assert generator.score([""], [[5, 6]]) == generator.score([[]], [[5, 6]]) == generator.score([[0]], [[5, 6]])


def test_empty_context_is_eos_without_bos():
    parts = split(small_model())[1]
    with_eos, with_neither = (
        Generator(assemble(dataclasses.replace(SMALL, bos_token_id=None, eos_token_id=eos), parts)) for eos in (1, None)
    )

    assert with_eos.score([[]], [[5, 6]]) == with_eos.score([[1]], [[5, 6]])
    with pytest.raises(ValueError, match="an empty prompt needs a BOS or EOS token"):
        with_neither.score([[]], [[5, 6]])


@pytest.mark.parametrize("text", ["", []], ids=repr)
def test_perplexity_of_empty_text_is_rejected(generator: Generator, text: Any):
    with pytest.raises(ValueError, match="no token to predict: tokens has length 0"):
        generator.perplexity(text)


def test_perplexity_predicts_every_token_including_the_first(generator: Generator):
    assert generator.tokenizer is not None
    text = "import os\n" * 20
    ids = generator.tokenizer.encode(text)

    by_text, by_ids = generator.perplexity(text, window=16), generator.perplexity(ids, window=16)

    assert by_text.num_tokens == by_ids.num_tokens == len(ids) - 1  # BOS is not predicted
    assert by_text.nll == pytest.approx(by_ids.nll)
    assert by_text.bits_per_byte == pytest.approx(by_text.nll / np.log(2) / len(text))


def test_buckets_are_few_and_pad_at_most_a_third():
    sizes = {bucket(n) for n in range(1, 4097)}

    assert all(bucket(n) >= n for n in range(1, 4097))
    assert all(bucket(n) * 2 <= n * 3 for n in range(16, 4097))
    assert len(sizes) == 17


def test_prompt_lengths_of_one_bucket_share_a_program(generator: Generator):
    options = {"max_new_tokens": 4, "ignore_eos": True}
    generator([[5] * 9], **options)
    before = step._cache_size()  # type: ignore[attr-defined]

    for length in (10, 11, 12):
        generator([[5] * length], **options)

    assert step._cache_size() == before  # type: ignore[attr-defined]


def test_seed_determines_the_sample(generator: Generator):
    def output(seed: int) -> list[int]:
        return generator([[5, 6]], max_new_tokens=8, temperature=1.0, seed=seed, ignore_eos=True)[0].token_ids

    assert output(1) == output(1)
    assert output(1) != output(2)


@pytest.mark.parametrize("quantize", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_weights_are_quantized_while_loading(checkpoint: Path, quantize: str):
    generator = Generator.from_pretrained(checkpoint, quantize=quantize)

    (output,) = generator(["import os"], max_new_tokens=4, ignore_eos=True)

    dense = sum(leaf.nbytes for leaf in jax.tree.leaves(split(small_model())[1]))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(generator._params)) < 0.6 * dense
    assert generator._params["head.weight"].dtype == jnp.float16
    assert len(output.token_ids) == 4


def test_half_precision_outside_experts_is_upcast_on_cpu(caplog: pytest.LogCaptureFixture):
    model = reference.random_model(SMALL, dtype=jnp.bfloat16)
    wide = assemble(model.config, {name: value.astype(jnp.float32) for name, value in split(model)[1].items()})
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]

    with caplog.at_level("INFO", logger="dsmoe_jax"):
        outputs = Generator(model)(prompts, max_new_tokens=6, ignore_eos=True)

    params = upcast_for_cpu(split(model)[1])
    assert {name for name, value in params.items() if value.dtype == jnp.bfloat16} == {
        f"layers.1.moe.experts.{part}" for part in ("gate", "up", "down")
    }
    assert "from bfloat16 to float32" in caplog.text
    want = Generator(wide)(prompts, max_new_tokens=6, ignore_eos=True)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in want]
