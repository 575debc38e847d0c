"""Conversions in constant memory, interrupted, killed and out of disk space.

Start at `test_killed_conversion_resumes_correctly`.
"""

import contextlib
import json
import logging
import math
import random
import shutil
import subprocess
import sys
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import pytest

from dsmoe_jax.checkpoint.manifest import read_manifest
from dsmoe_jax.cli import main
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import ConversionReport, export_hf, import_hf, verify
from dsmoe_jax.convert.param_mapping import hf_shapes
from dsmoe_jax.loading import load
from dsmoe_jax.storage.atomic_dir import staging_path
from dsmoe_jax.storage.direct_io import DirectFile
from tests.helpers.hf_folder import (
    hf_tensors,
    random_params,
    snapshot,
    stop_after,
    stored,
    tiny,
    write_hf,
    write_tensors,
)

pytestmark = pytest.mark.heavy

REPOSITORY = Path(__file__).resolve().parent.parent
KILLS: Final = 6
GROWTH: Final = 64 << 20  # of anonymous memory
LARGE: Final = 20 * GROWTH
WIDE: Final = {"vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408}


class Way:
    """A direction of conversion with its source and the expected result."""

    def __init__(self, convert: Callable[..., ConversionReport], source: Path, options: dict[str, Any], expected: Path):
        self.convert, self.source, self.options, self.expected = convert, source, options, expected

    def run(self, out: Path, **more: Any) -> ConversionReport:
        return self.convert(self.source, out, **self.options, **more)

    def is_whole(self, folder: Path) -> bool:
        """Return whether a folder equals the expected result; a staging directory may have its journal."""
        if self.convert is export_hf:
            return {n: data for n, data in snapshot(folder).items() if n != "journal.jsonl"} == snapshot(self.expected)
        same = read_manifest(folder).tensors == read_manifest(self.expected).tensors
        return same and verify(folder, self.source).mismatches == []


def make_ways(work: Path, config: ModelConfig, shard: int) -> dict[str, Way]:
    """Return both directions of one checkpoint."""
    hf = write_hf(work / "hf", config, random_params(config))
    import_hf(hf, work / "native")
    export_hf(work / "native", work / "back", max_shard_size=shard)
    return {
        "import": Way(import_hf, hf, {}, work / "native"),
        "export": Way(export_hf, work / "native", {"max_shard_size": shard}, work / "back"),
    }


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Way]:
    return make_ways(tmp_path_factory.mktemp("streaming"), tiny(), 10_000)


@pytest.fixture(params=["import", "export"])
def way(request: pytest.FixtureRequest, ways: dict[str, Way]) -> Way:
    return ways[request.param]


def loads(folder: Path) -> bool:
    """Return whether the folder loads as a checkpoint."""
    with contextlib.suppress(ValueError):
        load(folder)
        return True
    return False


# Kills

# Forks a child for each conversion, which starts at once, and kills it some seconds after its journal has some units.
SERVER = """
import json, os, signal, sys, time
import jax
from orbax.checkpoint import v1
from dsmoe_jax.convert import export_hf, import_hf

for line in sys.stdin:
    convert, source, out, options, seconds, units, journal = json.loads(line)
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            {"import_hf": import_hf, "export_hf": export_hf}[convert](source, out, **options)
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        until = time.monotonic() + 60
        while units and time.monotonic() < until:
            if os.path.exists(journal) and open(journal, "rb").read().count(b"\\n") > units:
                break
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, time.perf_counter() - started]), flush=True)
"""


class Server:
    """The forking process."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def run(self, way: Way, out: Path, seconds: float | None = None, units: int = 0) -> tuple[int, float]:
        """Kill a conversion some time after some units; returns exit code and time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        journal = str(staging_path(out) / "journal.jsonl")
        command = (way.convert.__name__, str(way.source), str(out), way.options, seconds, units, journal)
        print(json.dumps(command), file=self._process.stdin, flush=True)
        code, took = json.loads(self._process.stdout.readline())
        return code, took


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        yield Server(process)
        process.kill()


@pytest.fixture(scope="module")
def larger_ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Way]]:
    """Return a source of 57 MB, large enough to be killed in time."""
    config = tiny(
        vocab_size=4096, hidden_size=256, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=4,
        n_routed_experts=16,
    )  # fmt: skip
    work = tmp_path_factory.mktemp("larger")
    yield make_ways(work, config, 2_000_000)
    shutil.rmtree(work)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["import", "export"])
def test_killed_conversion_resumes_correctly(
    tmp_path: Path, larger_ways: dict[str, Way], server: Server, direction: str
):
    way = larger_ways[direction]
    seconds = 0.0
    for name in ("first", "second"):
        code, seconds = server.run(way, tmp_path / name)
        assert (code, way.is_whole(tmp_path / name)) == (0, True)
        shutil.rmtree(tmp_path / name)
    chance = random.Random(0)
    left: Counter[str] = Counter()

    for i in range(KILLS):
        out = tmp_path / "out"
        if i % 2:  # at a random time
            code, _ = server.run(way, out, seconds=(i + chance.random()) / KILLS * seconds)
        else:  # during a write
            code, _ = server.run(way, out, seconds=chance.random() / 100, units=1 + i // 2)
        if out.exists():  # killed after the rename, or not at all
            assert way.is_whole(out)
            assert not (out / "journal.jsonl").exists()
            left["all"] += 1
        else:
            assert code == -9
            assert not loads(staging_path(out)) or way.is_whole(staging_path(out))
            reused = way.run(out).reused_bytes
            assert way.is_whole(out)
            left["some" if reused else "nothing"] += 1
        assert list(tmp_path.iterdir()) == [out]
        shutil.rmtree(out)

    assert left["some"] >= 1
    assert left.total() == KILLS


def test_conversion_killed_before_the_rename_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Way):
    def killed(folder: Path) -> None:
        if folder.name.endswith(".incomplete"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dsmoe_jax.storage.atomic_dir.sync_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            way.run(tmp_path / "out")

    done = way.run(tmp_path / "out")

    assert done.reused_bytes == done.bytes
    assert way.is_whole(tmp_path / "out")


# Interrupts


def test_interrupted_conversion_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture, way: Way):
    caplog.set_level(logging.INFO)
    total = sum(
        len(tensor.data) for tensor in stored(way.expected if way.convert is export_hf else way.source).values()
    )
    reused = []

    for share in (0.3, 0.6, 0.9):
        with pytest.raises(KeyboardInterrupt):
            way.run(tmp_path / "out", progress=stop_after(int(share * total)))
        assert not loads(staging_path(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
        reused.append(sum(path.stat().st_size for path in staging_path(tmp_path / "out").rglob("*") if path.is_file()))
    done = way.run(tmp_path / "out")

    assert "run the same command to resume" in caplog.text
    assert 0 < reused[0] < reused[1] < reused[2]
    assert 0.5 * total < done.reused_bytes < done.bytes == total
    assert "were already written" in str(done)
    assert way.is_whole(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_uninterrupted_conversion_reuses_nothing(tmp_path: Path, way: Way):
    done = way.run(tmp_path / "out")

    assert done.reused_bytes == 0
    assert "already" not in str(done)


def mixed(folder: Path) -> Path:
    """Return a checkpoint whose norms have a wider dtype than its config."""
    config = tiny(torch_dtype="bfloat16")
    write_hf(folder, config, random_params(config))
    tensors = hf_tensors(config, random_params(config))
    write_tensors(folder, {n: t if "norm" in n else t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()})
    return folder


@pytest.mark.parametrize(("first", "then"), [(None, "bfloat16"), ("bfloat16", None), (None, "float32")])
def test_import_with_another_dtype_starts_over(tmp_path: Path, first: str | None, then: str | None):
    source = mixed(tmp_path / "hf")
    import_hf(source, tmp_path / "want", dtype=then)
    with pytest.raises(KeyboardInterrupt):
        import_hf(source, tmp_path / "out", dtype=first, progress=stop_after(55_000))

    done = import_hf(source, tmp_path / "out", dtype=then)

    assert done.reused_bytes == 0
    assert read_manifest(done.path).tensors == read_manifest(tmp_path / "want").tensors


@pytest.mark.parametrize("other", [{"dtype": "float16"}, {"max_shard_size": 9_999}])
def test_export_with_other_options_starts_over(tmp_path: Path, ways: dict[str, Way], other: dict[str, Any]):
    way = ways["export"]
    with pytest.raises(KeyboardInterrupt):
        export_hf(way.source, tmp_path / "out", **(way.options | other), progress=stop_after(50_000))

    done = way.run(tmp_path / "out")

    assert done.reused_bytes == 0
    assert way.is_whole(done.path)


def test_changed_source_starts_over(tmp_path: Path):
    source = write_hf(tmp_path / "hf", tiny(), random_params(tiny()))
    with pytest.raises(KeyboardInterrupt):
        import_hf(source, tmp_path / "out", progress=stop_after(100_000))
    write_tensors(source, {name: -array for name, array in hf_tensors(tiny(), random_params(tiny())).items()})

    done = import_hf(source, tmp_path / "out")

    assert done.reused_bytes == 0
    assert verify(done.path, source).mismatches == []


def test_missing_or_truncated_part_is_rewritten(tmp_path: Path, ways: dict[str, Way]):
    way = ways["import"]
    with pytest.raises(KeyboardInterrupt):
        way.run(tmp_path / "out", progress=stop_after(100_000))
    state = staging_path(tmp_path / "out") / "parameters" / "state"
    (state / "embed" / "c" / "0" / "0").unlink()
    (state / "layers.0.mlp.up.weight" / "c" / "0" / "0").write_bytes(b"cut")
    shutil.rmtree(state / "norm.weight")  # as if killed before writing it

    done = way.run(tmp_path / "out")

    assert done.reused_bytes > 0
    assert way.is_whole(done.path)


# Disk space

Usage = namedtuple("Usage", "total used free")


def test_free_space_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Way):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 9 * 10**5, 10**5))
    before = snapshot(tmp_path)

    with pytest.raises(ValueError, match=r"out needs 0\.00 GB more; .* has 0\.00 GB free"):
        way.run(tmp_path / "out")

    assert snapshot(tmp_path) == before


def test_large_checkpoint_sizes_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    size = write_sparse(tmp_path / "hf", tiny(**WIDE, n_routed_experts=64))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 1_230_000_000))

    for dtype, needed in ((None, size), ("float32", 2 * size)):
        with pytest.raises(ValueError, match=rf"out needs {needed / 1e9:.2f} GB more; .* has 1\.23 GB free"):
            import_hf(tmp_path / "hf", tmp_path / "out", dtype=dtype)

    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("typed", [False, True], ids=["called", "typed"])
def test_conversion_resumes_after_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, way: Way, typed: bool
):
    flush, calls = DirectFile._flush, iter(range(3))

    def until_full(file: DirectFile, size: int) -> None:
        if next(calls, None) is None:
            raise OSError(28, "No space left on device")
        flush(file, size)

    monkeypatch.setattr(DirectFile, "_flush", until_full)
    if typed:
        verb = ["convert"] if way.convert is import_hf else ["export", "--max-shard-size", "10000"]
        code = main([*verb, str(way.source), str(tmp_path / "out")])
        assert code == 2
        assert f"{tmp_path / 'out'}: No space left on device" in capsys.readouterr().err.splitlines()[-1]
    else:
        with pytest.raises(OSError, match="No space left on device"):
            way.run(tmp_path / "out")
    left = [path.name for path in tmp_path.iterdir()]
    monkeypatch.undo()

    done = way.run(tmp_path / "out")

    assert left == [".out.incomplete"]
    assert 0 < done.reused_bytes < done.bytes
    assert way.is_whole(done.path)
    assert list(tmp_path.iterdir()) == [done.path]


# Memory

# Prints the growth of anonymous memory, in bytes, of a second import and export.
MEASURE = """
import json, sys, threading
from dsmoe_jax.convert import export_hf, import_hf

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

def growth(convert, *arguments, **options):
    start, peak, over = anonymous(), 0, threading.Event()
    def watch():
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, anonymous())
    watching = threading.Thread(target=watch)
    watching.start()
    convert(*arguments, **options)
    over.set()
    watching.join()
    return peak - start

work, dtype = sys.argv[1], json.loads(sys.argv[2])
for size in ("small", "large"):
    grown = [
        growth(import_hf, f"{work}/{size}", f"{work}/{size}-native", dtype=dtype),
        growth(export_hf, f"{work}/{size}-native", f"{work}/{size}-back", max_shard_size="500MB"),
    ]
print(json.dumps(grown))
"""


def write_sparse(folder: Path, config: ModelConfig) -> int:
    """Write a sparse bfloat16 checkpoint of zeros; returns the tensors' bytes."""
    folder.mkdir()
    header, end = {}, 0
    for name, shape in hf_shapes(config).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return end


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is what Linux tells of a process")
@pytest.mark.parametrize(
    ("changes", "dtype", "least", "bound"),
    [
        ({"n_routed_experts": 43}, None, LARGE, GROWTH),
        ({"n_routed_experts": 4, "vocab_size": 25600}, "float32", 0, GROWTH),
    ],
    ids=["as stored", "to float32"],
)
def test_memory_is_independent_of_checkpoint_size(
    tmp_path: Path, changes: dict[str, Any], dtype: str | None, least: int, bound: int
):
    write_sparse(tmp_path / "small", tiny())
    size = write_sparse(tmp_path / "large", tiny(**(WIDE | changes), tie_word_embeddings=True))

    command = [sys.executable, "-c", MEASURE, str(tmp_path), json.dumps(dtype)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    finally:
        for folder in tmp_path.iterdir():  # gigabytes
            shutil.rmtree(folder)

    grown = json.loads(done.stdout)
    print(f"{size / 2**30:.2f} GiB: {[f'{one / 2**20:.1f} MiB' for one in grown]}")
    assert size >= least
    assert max(grown) <= bound
