"""XLA options on GPUs: where they apply, and that those of the user take precedence."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dsmoe_jax import xla_options
from dsmoe_jax.plan import absent_gpu
from dsmoe_jax.sharding import MeshConfig, make_mesh
from dsmoe_jax.xla_options import ON_SEVERAL_GPUS, compiler_options, quiet_cache_reads


def mesh_of(platform: str, devices: int) -> Any:
    return cast(Any, SimpleNamespace(size=devices, devices=np.full(devices, SimpleNamespace(platform=platform))))


def test_only_several_gpus_get_options():
    assert compiler_options(None) is compiler_options(mesh_of("gpu", 1)) is compiler_options(mesh_of("cpu", 8)) is None
    assert compiler_options(mesh_of("gpu", 8)) == ON_SEVERAL_GPUS


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch):
    name = next(iter(ON_SEVERAL_GPUS))
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=false")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")

    xla_options.set_environment()

    assert set(compiler_options(mesh_of("gpu", 8)) or {}) == set(ON_SEVERAL_GPUS) - {name}
    assert xla_options.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"


def test_the_memory_fraction_is_set_where_nobody_did(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)

    xla_options.set_environment()

    assert xla_options.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"


def test_xla_knows_every_option():
    try:
        devices = absent_gpu.devices("h100", 2)
    except ValueError as error:
        pytest.skip(str(error))
    mesh = make_mesh(MeshConfig(), devices)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((8, 8), np.float32, sharding=place)

    program = jax.jit(lambda x: x.sum(), compiler_options=compiler_options(mesh)).lower(x).compile()

    assert "all-reduce" in str(program.as_text())


@pytest.mark.slow
def test_a_program_from_the_compilation_cache_loads_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}

    with quiet_cache_reads():
        try:
            for name, value in zip(names, (str(tmp_path), 0.0), strict=True):
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            for _ in range(2):  # compiled, then read
                jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile()
                jax.clear_caches()
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()

    assert list(tmp_path.glob("jit*"))
    assert "cpu_aot_loader" not in capfd.readouterr().err


def test_other_lines_of_xla_are_shown(capfd: pytest.CaptureFixture):
    line = b"E1128 1 cpu_aot_loader.cc:195] Loading XLA:CPU AOT result. Target machine feature +%s is not supported\n"

    with xla_options._filtered_stderr(xla_options._HARMLESS):
        for feature in (b"prefer-no-gather", b"avx512f", b"prefer-no-scatter"):
            os.write(2, line % feature)

    assert capfd.readouterr().err == (line % b"avx512f").decode()
