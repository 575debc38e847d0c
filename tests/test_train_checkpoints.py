"""Training checkpoints: saving, restoring, damage, retention.

Start at `test_a_state_is_restored_bit_for_bit_after_donation`.
"""

import errno
import json
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.model import DeepSeekMoE, abstract, split
from dsmoe_jax.sharding import MeshConfig, make_mesh
from dsmoe_jax.train.checkpoints import Checkpoints
from dsmoe_jax.train.optimizer import OptimizerConfig, make_optimizer
from dsmoe_jax.train.step import StepConfig, TrainState, init_state, state_shardings
from tests.helpers.hf_folder import flip_bit, tiny

METADATA = {"stream": {"seed": 0}}
OPTIONS = StepConfig(bias_update_rate=0.1)
OPTIMIZER = make_optimizer(OptimizerConfig(schedule="constant"), 10)[0]


def fresh(params: dict[str, Any]) -> TrainState:
    return init_state(tiny(), params, OPTIMIZER, OPTIONS)


def like(mesh: MeshConfig | None = None) -> TrainState:
    specs = {name: jax.ShapeDtypeStruct(spec.shape, np.float32) for name, spec in abstract(tiny())[1].items()}
    places = state_shardings(tiny(), OPTIMIZER, OPTIONS, None if mesh is None else make_mesh(mesh))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(fresh, specs),
        places,
    )


@pytest.fixture(scope="module")
def state() -> TrainState:
    """A training state with distinct leaves."""
    state = fresh(split(DeepSeekMoE.init(tiny()))[1])
    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, [leaf + jnp.asarray(i, leaf.dtype) for i, leaf in enumerate(leaves)])


def same(got: TrainState, want: TrainState) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (one.dtype, np.asarray(one).tobytes()) == (other.dtype, np.asarray(other).tobytes())


def saved(folder: Path, state: TrainState, *steps: int, **options: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state, METADATA)
    checkpoints.wait()
    return checkpoints


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, state: TrainState) -> Path:
    """A folder of two checkpoints; copy before changing it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "two"
    saved(folder, state, 10, 20).close()
    return folder


@pytest.fixture
def copy(two: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two, tmp_path / "copy"))


def test_a_state_is_restored_bit_for_bit_after_donation(tmp_path: Path, state: TrainState):
    copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
    destroy = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)

    checkpoints.save(10, copied, METADATA)
    jax.block_until_ready(destroy(copied))
    checkpoints.wait()

    assert checkpoints.newest() == (10, METADATA)
    same(checkpoints.restore(10, like()), state)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(fsdp=8), id="fsdp=8", marks=pytest.mark.slow),
        pytest.param(MeshConfig(fsdp=2, expert=4), id="expert=4"),
    ],
)
def test_a_state_is_restored_onto_a_mesh_and_back(tmp_path: Path, two: Path, state: TrainState, mesh: MeshConfig):
    over_mesh = Checkpoints(two).restore(20, like(mesh))

    checkpoints = saved(tmp_path, over_mesh, 30)

    same(over_mesh, state)
    assert over_mesh.params["embed"].sharding == like(mesh).params["embed"].sharding
    same(checkpoints.restore(30, like()), state)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        pytest.param({"max_to_keep": 1}, [5], marks=pytest.mark.slow),
        ({"max_to_keep": 2}, [4, 5]),
        ({"max_to_keep": 1, "keep_period": 2}, [2, 4, 5]),
        pytest.param({"max_to_keep": 9}, [1, 2, 3, 4, 5], marks=pytest.mark.slow),
    ],
)
def test_old_checkpoints_are_removed(tmp_path: Path, state: TrainState, options: dict[str, int], left: list[int]):
    checkpoints = saved(tmp_path, state, 1, 2, 3, 4, 5, **options)

    assert sorted(checkpoints.steps()) == left


def data_file(home: Path) -> Path:
    return max((path for path in home.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def sha256_in(home: Path) -> int:
    """Offset of a digit of a SHA-256 in the manifest."""
    return (home / "manifest.json").read_bytes().index(b'"sha256": "') + len(b'"sha256": "')


# Damage to the newest checkpoint | message
SPOIL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda home: (home / "manifest.json").unlink(), "incomplete: 'manifest.json' is missing"),
    "a flipped bit": (lambda home: flip_bit(data_file(home), -100), "does not match its SHA-256"),
    "a flipped bit in the manifest": (
        lambda home: flip_bit(home / "manifest.json", sha256_in(home)),
        "'manifest.json' does not match its SHA-256",
    ),
    "a missing file": (lambda home: data_file(home).unlink(), "is missing"),
    "a manifest that is no JSON": (lambda home: (home / "manifest.json").write_text("{"), "is not JSON"),
    "other facts": (
        lambda home: (home / "manifest.json").write_text(
            (home / "manifest.json").read_text().replace('"seed": 0', '"seed": 1')
        ),
        "'manifest.json' does not match its SHA-256",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOIL.values(), ids=SPOIL)
def test_the_newest_intact_checkpoint_is_found(
    copy: Path, state: TrainState, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], Any], message: str
):
    spoil(copy / "step-00000020")

    checkpoints = Checkpoints(copy)
    found = checkpoints.newest()

    assert found == (10, METADATA)
    assert "step-00000020" in caplog.text
    assert message in caplog.text
    same(checkpoints.restore(10, like()), state)


def test_no_intact_checkpoint_is_found(copy: Path, tmp_path: Path):
    for home in copy.iterdir():
        (home / "manifest.json").unlink()

    assert Checkpoints(copy).newest() is None
    assert Checkpoints(tmp_path / "nowhere").newest() is None


def test_a_save_replaces_an_incomplete_checkpoint(copy: Path, state: TrainState):
    (copy / "step-00000020" / "manifest.json").unlink()
    (copy / "step-00000020.orbax-checkpoint-tmp").mkdir()

    checkpoints = saved(copy, state, 20)

    assert checkpoints.newest() == (20, METADATA)
    assert sorted(path.name for path in copy.iterdir()) == ["step-00000010", "step-00000020"]


def test_a_checkpoint_of_another_model_is_refused(two: Path):
    wanted = like()
    embed = wanted.params["embed"]
    larger = jax.ShapeDtypeStruct((2, *embed.shape), embed.dtype)
    less = {name: spec for name, spec in wanted.params.items() if name != "embed"}

    for params, message in (
        (wanted.params | {"more": embed}, "tensor params/more is missing"),
        (less, "tensor params/embed is unexpected under this config"),
        (less | {"embed": larger}, r"tensor params/embed has shape \[64, 32\], the config asks for \[2, 64, 32\]"),
    ):
        with pytest.raises(ValueError, match=f"step-00000020: {message}"):
            Checkpoints(two).restore(20, wanted._replace(params=params))


def test_background_errors_are_raised_by_the_next_call(
    tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.ERROR)
    checkpoints = saved(tmp_path, state, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsmoe_jax.train.checkpoints.write_manifest", full)
    checkpoints.save(2, state, METADATA)

    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()

    assert checkpoints.newest() == (1, METADATA)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one and a half checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=650k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system requires root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_during_a_save_keeps_the_last_checkpoint(
    small_disk: Path, state: TrainState, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dsmoe_jax.train.checkpoints._check_space", lambda *_: None)
    checkpoints = saved(small_disk, state, 1)

    checkpoints.save(2, state, METADATA)
    with pytest.raises(OSError, match=r"No space left on device: '.*step-00000002'$") as refused:
        checkpoints.wait()

    assert refused.value.errno == errno.ENOSPC
    assert not caplog.records
    assert checkpoints.newest() == (1, METADATA)
    same(checkpoints.restore(1, like()), state)
    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    assert saved(small_disk, state, 2).newest() == (2, METADATA)
    assert sorted(path.name for path in small_disk.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("room", [4, 12, 100, 420])
def test_a_full_disk_is_one_line_at_any_file(
    small_disk: Path, state: TrainState, room: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    subprocess.run(["mount", "-o", f"remount,size={room}k", small_disk], check=True)
    monkeypatch.setattr("dsmoe_jax.train.checkpoints._check_space", lambda *_: None)  # it fills up afterwards
    checkpoints = Checkpoints(small_disk / "new")

    def save() -> None:
        checkpoints.save(1, state, METADATA)
        checkpoints.wait()

    with pytest.raises(OSError, match=r"No space left on device: '.*step-00000001'$"):
        save()
    checkpoints.close()

    assert capfd.readouterr().err == ""
    assert checkpoints.newest() is None


def test_a_full_disk_is_refused_before_writing(small_disk: Path, state: TrainState):
    subprocess.run(["mount", "-o", "remount,size=300k", small_disk], check=True)

    with pytest.raises(ValueError, match=r"step-00000001 needs 0.00 GB more; .*disk has 0.00 GB free$"):
        Checkpoints(small_disk).save(1, state, METADATA)

    assert list(small_disk.iterdir()) == []


def test_a_damaged_checkpoint_is_saved_again(copy: Path, state: TrainState):
    flip_bit(data_file(copy / "step-00000020"), -100)
    checkpoints = Checkpoints(copy, max_to_keep=2)
    checkpoints.newest()

    checkpoints.save(20, state, METADATA)
    aside = copy / "step-00000020.damaged"
    assert aside.exists()
    checkpoints.wait()

    assert not aside.exists()
    assert Checkpoints(copy).newest() == (20, METADATA)
    assert sorted(path.name for path in copy.iterdir()) == ["step-00000010", "step-00000020"]


def test_an_unverified_damaged_checkpoint_is_saved_again(copy: Path, state: TrainState):
    flip_bit(data_file(copy / "step-00000020"), -100)

    saved(copy, state, 20).close()

    assert Checkpoints(copy).newest() == (20, METADATA)


def test_only_intact_checkpoints_are_counted(copy: Path, state: TrainState):
    flip_bit(data_file(copy / "step-00000020"), -100)

    saved(copy, state, 30, max_to_keep=2).close()
    assert sorted(Checkpoints(copy).steps()) == [10, 20, 30]

    saved(copy, state, 40, max_to_keep=2).close()
    assert sorted(Checkpoints(copy).steps()) == [30, 40]


def test_the_manifest_lists_every_file(two: Path):
    home = two / "step-00000020"

    files = json.loads((home / "manifest.json").read_text())["files"]

    there = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}
    assert set(files) == there - {"manifest.json"}
