"""What the READMEs call as `python -m MODULE`, at small size: `MODULES`."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.sharding import MeshConfig


def _small_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks' sizes, on the preset `tiny` with fewer layers."""
    from tests.benchmarks import limits, plan

    sizes = {"PRESET": "tiny", "PREFILL_TOKENS": 8, "PROMPT": 4, "NEW_TOKENS": 2, "TRAIN_SHAPE": (2, 8)}
    for name, size in (sizes | {"KERNEL_TOKENS": 8}).items():
        monkeypatch.setattr(plan, name, size)
    monkeypatch.setattr(limits, "_FLOATS", 2**10)
    monkeypatch.setattr(limits, "_SIDE", 64)


def _parity(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import parity

    monkeypatch.setattr(parity.golden, "CASES", parity.golden.CASES[:1])
    parity.main()


def _quantization(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import quantization

    monkeypatch.setattr(quantization.golden, "CASES", quantization.golden.CASES[:1])
    monkeypatch.setattr(quantization, "PRESET", "tiny")
    quantization.main()


def _benchmarks(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its peers, and with the children's work in this process."""
    from tests.benchmarks import __main__ as benchmarks
    from tests.benchmarks.children import CONTENDERS

    class Here:
        def __init__(self, contender: str, task: str, folder: Path):
            room, options = CONTENDERS[contender]
            module = __import__(f"tests.benchmarks.{room}", fromlist=["actions"])
            self._actions = module.actions(task, folder, **options) | {"peak bytes": lambda: 1}

        def __enter__(self) -> "Here":
            return self

        def __exit__(self, *_: object) -> None: ...

        def call(self, action: str, *arguments: Any) -> Any:
            return self._actions[action](*arguments)

        def take_turn(self, action: str, *, warm_up: bool = False) -> tuple[Any, float]:
            return self.call(action), 0.0

    _small_plan(monkeypatch)
    monkeypatch.setattr(benchmarks, "Child", Here)
    code = benchmarks.main([*arguments, "--contenders", "ours", "--rounds", "1", "--out", "reports"])
    assert code == 0
    assert len(list(Path("reports").iterdir())) == 2


def _conversion(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.benchmarks import conversion

    small = ModelConfig.preset("tiny")
    monkeypatch.setattr(conversion.ModelConfig, "preset", lambda name: small)
    called("conversion", conversion.main, "--rounds", "1", "--out", "reports")(arguments, monkeypatch)


def _training(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.benchmarks import training

    monkeypatch.setattr(training, "ROWS", 2)
    monkeypatch.setattr(training, "TOKENS", 8)
    called("training", training.main, "--preset", "tiny", "--rounds", "1")(arguments, monkeypatch)


def _generation(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.benchmarks import generation

    _small_plan(monkeypatch)
    for name, size in {"REQUESTS": 2, "PROMPTS": (4, 8), "ANSWERS": (2, 4)}.items():
        monkeypatch.setattr(generation, name, size)
    called("generation", generation.main, "--rounds", "1")(arguments, monkeypatch)


def _instructions(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.benchmarks import instructions

    for name, size in {"TRAINED": 8, "EVALUATED": 2}.items():
        monkeypatch.setattr(instructions, name, size)
    ways = ("--ways", *list(instructions.WAYS)[:2])
    called("instructions", instructions.main, "--steps", "1", *ways)(arguments or ["runs/tiny/model"], monkeypatch)


def _abstract(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe `tiny` for the device that is there; tests/test_compiled_for_gpu.py has the cards."""
    from tests.benchmarks import abstract

    monkeypatch.setattr(abstract, "CASES", {"tiny": abstract.Case(MeshConfig(), 1, tokens=16)})
    called("abstract", abstract.main)([], monkeypatch)


def _serving(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.benchmarks import serving

    for name, size in {"PROMPTS": (4, 8), "OUTPUTS": (2, 4)}.items():
        monkeypatch.setattr(serving, name, size)
    called("serving", serving.main, "--requests", "4", "--clients", "2", "--rounds", "1")(arguments, monkeypatch)


def _plan_check(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.benchmarks import plan_check

    called("plan_check", plan_check.main, next(iter(plan_check.CASES)))(arguments, monkeypatch)


def _gpu(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trial on a CPU."""
    from tests.benchmarks.gpu import __main__ as gpu

    assert gpu.main([*arguments, "--small", "--only", "decode", "--minutes", "2", "--out", "reports"]) == 0


def _tuning(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.benchmarks.gpu import tuning

    assert arguments[0] == "--into"  # what a GPU does at full size, no trial
    tuning.main(["--small", "--minutes", "0.2"])


def _tokenization(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.benchmarks import tokenization

    small = ["book.txt", "moe16b", "--rounds", "1", "--workers", "0"]
    called("tokenization", tokenization.main, *small)([], monkeypatch)


def called(module: str, run: Callable[[], None], *small: str) -> Callable[[list[str], pytest.MonkeyPatch], None]:
    """A `main` that reads `sys.argv`."""

    def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", [module, *arguments, *small])
        run()

    return call


def _debian_texts(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the packages, which need a network."""
    from tests.benchmarks import debian_texts

    monkeypatch.setattr(debian_texts, "PACKAGES", {})
    debian_texts.main(Path(arguments[0]))


MODULES: Final[dict[str, Callable[[list[str], pytest.MonkeyPatch], None]]] = {
    "tests.parity": _parity,
    "tests.quantization": _quantization,
    "tests.benchmarks": _benchmarks,
    "tests.benchmarks.conversion": _conversion,
    "tests.benchmarks.training": _training,
    "tests.benchmarks.generation": _generation,
    "tests.benchmarks.instructions": _instructions,
    "tests.benchmarks.abstract": _abstract,
    "tests.benchmarks.serving": _serving,
    "tests.benchmarks.plan_check": _plan_check,
    "tests.benchmarks.plan_scale": lambda *_: importlib.import_module("tests.benchmarks.plan_scale").main(),
    "tests.benchmarks.debian_texts": _debian_texts,
    "tests.benchmarks.tokenization": _tokenization,
    "tests.benchmarks.gpu": _gpu,
    "tests.benchmarks.gpu.tuning": _tuning,
}
