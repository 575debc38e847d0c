"""The conditions under which every test runs: 8 simulated devices, strict JAX, annotations executed.

On a machine with a GPU some of the extra `test` may be absent: `tests/gpu` needs none of it but pytest.
"""

import gc
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before jax starts. The suite compiles thousands of small programs and runs each once or twice, so on CPU it does
# without LLVM optimization (a third of its time) and, where jaxlib has both, without XLA's newer emitters (three
# quarters of the compile time; they are tested on Python 3.12). Flags of the environment come last and take precedence.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        *(["--xla_backend_optimization_level=0"] if os.environ["JAX_PLATFORMS"] == "cpu" else []),
        *(["--xla_cpu_use_fusion_emitters=false"] if importlib.metadata.version("jaxlib") < "0.11" else []),
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import jax
import jaxtyping
import pytest

if TYPE_CHECKING:
    from dsmoe_jax.generate import Generator
    from dsmoe_jax.text.tokenizer import Tokenizer

# Tracing allocates many objects that live on; collecting garbage at every 700 new ones finds little and costs CPU time.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Shapes are checked in the packages that compute with arrays; the others validate their input themselves.
ROOMS_OF_ARRAYS = (
    *("kv_cache", "kernels", "layers", "model"),
    *(f"train.{module}" for module in ("batch", "best", "finetune", "guard", "job", "loss", "optimizer", "step")),
)
CHECKS_SHAPES = importlib.util.find_spec("beartype") is not None
if CHECKS_SHAPES:
    jaxtyping.install_import_hook([f"dsmoe_jax.{room}" for room in ROOMS_OF_ARRAYS], "beartype.beartype")


def pytest_report_header() -> list[str]:
    return [] if CHECKS_SHAPES else ["annotations are not executed: beartype is not installed"]


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds a test may take; nothing enforces it: pytest-timeout is not installed")


@pytest.fixture
def no_compilation_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Turn off the compilation cache that a run enables for its process; equal runs share their compiled steps."""
    from jax.experimental.compilation_cache import compilation_cache

    from tests.helpers.runs import share_steps

    share_steps(monkeypatch)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture
def on_one_device(
    no_compilation_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Runs use one of the eight devices and share a compilation cache."""
    from dsmoe_jax.sharding import make_mesh
    from dsmoe_jax.train import loop

    monkeypatch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    monkeypatch.setattr(loop, "_CACHE", str(tmp_path_factory.getbasetemp() / "compiled"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes, shared: copy it before changing it."""
    from tests.helpers.corpus import byte_tokenizer

    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> "Tokenizer":
    from dsmoe_jax.text.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint of the small model with a tokenizer; do not modify."""
    from tests.helpers.small import save_checkpoint, small_model

    return save_checkpoint(tmp_path_factory.mktemp("small"), small_model())


@pytest.fixture(scope="session")
def generator(checkpoint: Path) -> "Generator":
    from dsmoe_jax.generate import Generator

    return Generator.from_pretrained(checkpoint)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run all tests of a file in one worker: they share models, runs and compiled programs."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, so that workers finish at the same time."""
    heavy = {item.path for item in items if item.get_closest_marker("heavy")}
    items.sort(key=lambda item: item.path not in heavy)
