"""Compatibility with the PEFT library, in both directions.

Start at `test_adapter_of_peft_has_equal_outputs`. The model is the `TorchModel` of the tests; `CASES` are configs of
`peft.LoraConfig`. The tests pass with every release since 0.13, although releases match differently.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.param_mapping import export_order
from dsmoe_jax.convert.peft import CONFIG, WEIGHTS, attach_adapter, merge_adapter, read_adapter, write_adapter
from dsmoe_jax.loading import load
from dsmoe_jax.lora import PROJECTIONS
from dsmoe_jax.model import split
from tests.helpers import golden
from tests.helpers.hf_folder import random_params, tiny, write_hf

pytest.importorskip("peft", reason="the peft library is the other side: pip install -e '.[test-peft]'")
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file
from torch import nn  # pyright: ignore[reportMissingImports]
from transformers import PretrainedConfig, PreTrainedModel  # pyright: ignore[reportMissingImports]

from tests.helpers.torch_model import TorchModel

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and peft

MERGED = 1e-6  # absolute, weights below 4
IDS = np.random.default_rng(1).integers(0, 64, (3, 20))
RELEASE = tuple(map(int, peft.__version__.split(".")[:2]))

ROUTED = r".*mlp\.experts\.\d+\.(gate|up|down)_proj"
SAME = {"(experts.3.up_proj)": 6, "(up_proj)": 2, "(o_proj)": 1}
TIED = {"tie_word_embeddings": True}
DEEP = {"num_hidden_layers": 3}
FF = ("gate_proj", "up_proj", "down_proj")


class Case(NamedTuple):
    """An adapter case: config, model, how it is saved, and whether all PEFT releases agree."""

    options: dict[str, Any]
    model: dict[str, Any] = {}  # noqa: RUF012 (read only)
    saving: dict[str, Any] = {}  # noqa: RUF012
    alike: bool = True


CASES = {
    "every projection": Case({}),
    "one projection": Case({"target_modules": ["o_proj"]}),
    "rslora": Case({"use_rslora": True}),
    "rslora with patterns": Case({"use_rslora": True, "rank_pattern": SAME, "alpha_pattern": SAME}),
    "regex": Case({"target_modules": ROUTED}),
    "all-linear": Case({"target_modules": "all-linear"}),
    "same keys": Case({"rank_pattern": SAME, "alpha_pattern": dict.fromkeys(SAME, 5.0)}),
    "a path as a key": Case({"rank_pattern": {"model.layers.0.mlp.up_proj": 6, "model.layers.1.self_attn.q_proj": 2}}),
    "keys that overlap": Case(
        {"rank_pattern": {"up_proj": 6}, "alpha_pattern": {"shared_experts.up_proj": 9}}, alike=False
    ),
    "keys of alternatives": Case({"alpha_pattern": {r"q_proj|k_proj": 3}}, alike=False),
    "keys from the start": Case({"rank_pattern": {r"^model.layers.1.*q_proj": 6}}, alike=False),
    "layers by name": Case({"target_modules": FF, "layers_to_transform": [1, 2], "layers_pattern": "layers"}, DEEP),
    "layers": Case({"target_modules": ["up_proj"], "layers_to_transform": [1]}, DEEP, alike=False),
    "layers without experts": Case({"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "embedding and head": Case({"modules_to_save": ["embed_tokens", "lm_head"]}),
    "norms": Case({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "router": Case({"target_modules": ["q_proj", "gate_proj"], "modules_to_save": ["gate"]}),
    "a whole layer's feed-forward": Case({"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]}),
    "embeddings unlisted": Case({"target_modules": ["q_proj"]}, saving={"save_embedding_layers": True}),
    "tied": Case({}, TIED),
    "tied head": Case({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, TIED),
    "tied embedding": Case({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, TIED),
    "tied unlisted": Case({"target_modules": ["q_proj"]}, TIED, {"save_embedding_layers": True}),
    "bin": Case({"modules_to_save": ["lm_head"]}, saving={"safe_serialization": False}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class HubConfig(PretrainedConfig):
    """Config fields as attributes, as in transformers."""

    def __init__(self, fields: Mapping[str, Any]):
        super().__init__(tie_word_embeddings=fields["tie_word_embeddings"])
        self.fields, self.model_type, self.vocab_size = fields, fields["model_type"], fields["vocab_size"]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


class HubModel(PreTrainedModel):
    """`TorchModel` with the interface of PEFT; a tied head is a module."""

    def __init__(self, fields: Mapping[str, Any]):
        super().__init__(HubConfig(fields))
        inner = TorchModel(fields)
        self.model = inner.model
        self.lm_head = inner.lm_head or nn.Linear(fields["hidden_size"], fields["vocab_size"], bias=False)
        if fields["tie_word_embeddings"]:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return TorchModel.forward(self, input_ids)  # type: ignore[arg-type]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def prepare_inputs_for_generation(self) -> None:
        """Required by PEFT, never called."""


def write_base(folder: Path, **changes: Any) -> tuple[Path, ModelConfig]:
    """Return a model in which every weight affects the logits."""
    config = tiny(**changes)
    params = random_params(config)
    for name, value in params.items():
        params[name] = 1 + value if name.endswith("norm.weight") else 3 * value
    return write_hf(folder, config, params), config


def base_model(folder: Path) -> HubModel:
    model = HubModel(json.loads((folder / "config.json").read_text()))
    found = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert (found.unexpected_keys, set(found.missing_keys) - {"lm_head.weight"}) == ([], set())
    return model.eval()


def make_adapter(folder: Path, base: Path, case: Case) -> Any:
    """Return PEFT's model with a random adapter, saved as `folder`."""
    options = {"r": 4, "lora_alpha": 7, "target_modules": list(PROJECTIONS), "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base_model(base), peft.LoraConfig(**(options | case.options)))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder, **case.saving)
    return model.eval()


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).numpy()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    bin_file = folder / "adapter_model.bin"
    return torch.load(bin_file, weights_only=True) if bin_file.is_file() else load_file(folder / WEIGHTS)


def fields(folder: Path) -> dict[str, Any]:
    """Return a config's non-empty fields with sorted lists."""
    found = json.loads((folder / CONFIG).read_text())
    return {name: sorted(value) if isinstance(value, list) else value for name, value in found.items() if value}


@every_case
def test_adapter_of_peft_has_equal_outputs(tmp_path: Path, case: Case):
    base, _ = write_base(tmp_path / "base", **case.model)
    theirs = make_adapter(tmp_path / "adapter", base, case)
    plain = np.asarray(load(base)(IDS).logits)

    ours = attach_adapter(load(base), tmp_path / "adapter")(IDS).logits

    want = logits(theirs)
    assert np.abs(want - plain).max() > 100 * golden.LOGITS
    np.testing.assert_allclose(ours, want, rtol=0, atol=golden.LOGITS)


@every_case
def test_merged_weights_equal_peft(tmp_path: Path, case: Case):
    base, _ = write_base(tmp_path / "base", **case.model)
    theirs = make_adapter(tmp_path / "adapter", base, case).merge_and_unload()

    merged = merge_adapter(load(base), tmp_path / "adapter")

    ours, want = split(merged)[1], theirs.state_dict()
    order = export_order(merged.config)
    assert set(want) - {name for name, _, _ in order} <= ({"lm_head.weight"} if case.model == TIED else set())
    for name, mine, expert in order:
        got = ours[mine] if expert is None else ours[mine][expert]
        np.testing.assert_allclose(got, want[name], rtol=0, atol=MERGED, err_msg=name)


@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.alike], ids=[name for name, case in CASES.items() if case.alike]
)
def test_peft_loads_our_adapters(tmp_path: Path, case: Case):
    if case is CASES["router"] and RELEASE < (0, 15):
        pytest.xfail("before 0.15 PEFT does not load adapters of gate_proj if gate is in modules_to_save")
    base, config = write_base(tmp_path / "base", **case.model)
    theirs = make_adapter(tmp_path / "adapter", base, case)
    adapter = read_adapter(tmp_path / "adapter", config)

    write_adapter(tmp_path / "again", adapter.config, config, adapter.params, base=adapter.base)
    again = peft.PeftModel.from_pretrained(base_model(base), tmp_path / "again")

    np.testing.assert_allclose(logits(again), logits(theirs), rtol=0, atol=MERGED)
    got, want = tensors(tmp_path / "again"), tensors(tmp_path / "adapter")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    mine, other = fields(tmp_path / "again"), fields(tmp_path / "adapter")
    if "save_embedding_layers" in case.saving:
        assert mine.pop("modules_to_save") == ["embed_tokens", "lm_head"]
    for name in ("peft_version", "qalora_group_size"):  # since 0.16 and 0.18, without effect
        other.pop(name, None)
    assert mine == other


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.alike])
def test_config_on_which_releases_disagree_is_not_written(tmp_path: Path, name: str):
    base, config = write_base(tmp_path / "base", **CASES[name].model)
    make_adapter(tmp_path / "adapter", base, CASES[name])
    adapter = read_adapter(tmp_path / "adapter", config)

    with pytest.raises(ValueError, match=r"^releases of peft disagree on model"):
        write_adapter(tmp_path / "again", adapter.config, config, adapter.params)


@pytest.mark.parametrize("target", ["gate", "lm_head", "embed_tokens"])
def test_adapters_on_other_modules_are_an_error(tmp_path: Path, target: str):
    base, config = write_base(tmp_path / "base")
    case = Case({"target_modules": ["q_proj", target]})
    if target == "gate":
        with pytest.raises(ValueError, match=r"Target module Gate\(\) is not supported"):
            make_adapter(tmp_path / "adapter", base, case)
        return
    with pytest.warns(UserWarning, match="embedding layers found in `target_modules`"):
        make_adapter(tmp_path / "adapter", base, case)

    with pytest.raises(ValueError, match=rf"target_modules: (model\.)?{target} cannot be adapted"):
        read_adapter(tmp_path / "adapter", config)
