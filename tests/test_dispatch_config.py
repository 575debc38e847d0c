"""`DispatchConfig`: invalid values, and the flags of a run that set it."""

import json
import re
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

from dsmoe_jax.cli import main
from dsmoe_jax.kernels.expert_ffn import BACKENDS, Backend
from dsmoe_jax.layers import token_dispatcher
from dsmoe_jax.layers.token_dispatcher import DispatchConfig
from dsmoe_jax.model import abstract, assemble, merge, split
from dsmoe_jax.text.train_tokenizer import train_tokenizer
from dsmoe_jax.train.flags import parse_finetuning
from tests.helpers.hf_folder import random_params, tiny


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "scatter"}, "dispatch.strategy must be one of gather, all_to_all, got 'scatter'"),
        ({"backend": "cutlass"}, f"expert_ffn backend must be one of {', '.join(BACKENDS)}, got 'cutlass'"),
        *(
            ({"buffer_factor": factor}, f"dispatch.buffer_factor must be positive, got {factor}")
            for factor in (0.0, -1.5, float("nan"), float("-inf"))
        ),
    ],
    ids=str,
)
def test_invalid_configs_are_rejected(fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DispatchConfig(**fields)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--dispatch.strategy", "scatter"),
            "--dispatch.strategy must be one of ",
        ),
        (("--dispatch.backend", "cutlass"), "expert_ffn backend must be one of block_loop"),
        (("--dispatch.buffer-factor", "0"), "--dispatch.buffer-factor must be positive, got 0"),
    ],
)
def test_invalid_flags_are_rejected_in_one_line(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture):
    code = main(["pretrain", "tiny", *flags])

    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert message in error


def test_fine_tuning_has_the_same_flags():
    config, _ = parse_finetuning(["base", "--dispatch.strategy", "gather", "--dispatch.buffer-factor", "2"])

    assert config.dispatch == DispatchConfig("gather", 2.0)


def test_the_config_reaches_every_moe_layer_and_no_dense_model():
    config = DispatchConfig("all_to_all", 2.0, "dense")

    sparse, dense = tiny(), tiny(n_routed_experts=None, num_experts_per_tok=None, n_shared_experts=None)
    model = merge(abstract(sparse, config)[0], split(assemble(sparse, random_params(sparse)))[1])

    assert {block.moe.experts.dispatch for block in model.layers if block.moe is not None} == {config}
    assert abstract(dense, config)[0] == abstract(dense)[0]


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.usefixtures("no_compilation_cache")
def test_pretraining_runs_the_requested_dispatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = [f"def f{n}(x):\n    return x + {n}\n" for n in range(200)]
    train_tokenizer(texts, tmp_path / "tokenizer", 300)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "model.json").write_text(json.dumps(tiny(vocab_size=300).to_dict()))
    flags = ["--output-dir", tmp_path / "out", "--model", tmp_path / "model.json", "--steps", 1, "--trackers", "jsonl"]
    flags += ["--data.sources", tmp_path / "text.jsonl", "--data.tokenizer", tmp_path / "tokenizer"]
    flags += ["--data.sequence-length", 24, "--mesh.fsdp", 2, "--mesh.expert", 4]
    flags += ["--dispatch.strategy", "all_to_all", "--dispatch.backend", "batched"]
    calls = set()
    forward, backward = BACKENDS["batched"]
    exchange = token_dispatcher._exchange

    def record(name: str, function: Any) -> Any:
        return lambda *args: calls.add(name) or function(*args)

    recorded = Backend(record("forward", forward), record("backward", backward))
    monkeypatch.setitem(BACKENDS, "batched", recorded)
    monkeypatch.setattr(token_dispatcher, "_exchange", record("exchange", exchange))

    assert main(["pretrain", "tiny", *map(str, flags)]) == 0

    assert calls == {"forward", "backward", "exchange"}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["dispatch"] == {
        "strategy": "all_to_all", "buffer_factor": None, "backend": "batched",
    }  # fmt: skip
