"""`python -m tests.benchmarks.conversion` imports and exports a checkpoint of the 16B's size and compares all bits.

Tensors are drawn from a seed, so the exported checkpoint is compared without a second copy on disk. Start at `measure`.
Needs slightly more than twice the checkpoint's size on disk; folders are deleted as soon as they are not needed.
"""

import argparse
import datetime
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import safe_open

from dsmoe_jax.checkpoint import zarr_io
from dsmoe_jax.config import PRESETS, ModelConfig
from dsmoe_jax.convert import export_hf, import_hf, verify
from dsmoe_jax.convert.param_mapping import export_order, hf_shapes
from dsmoe_jax.storage.atomic_dir import write_json
from tests.benchmarks import machine
from tests.benchmarks.timing import spread

_SHARD: Final = 5_000_000_000
_PIECE: Final = 16 << 20
_ITEM: Final = 2  # bfloat16


def main() -> None:
    """Measure, print, and write the dated report."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.conversion", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--preset", default="deepseek_moe_16b", choices=tuple(PRESETS))
    parser.add_argument("--rounds", type=int, default=3, help="rounds of import, export and cp at the 2B's size")
    parser.add_argument("--work", help="parent of the temporary folder; default: that of the system")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "reports", help="directory of the report")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)  # before a run of an hour
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        results = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": f"python -m tests.benchmarks.conversion --preset {args.preset} --rounds {args.rounds}",
            "commit": machine.commit(),
            "hardware": machine.hardware(),
            "versions": machine.versions(),
            "turns": turns(work, args.rounds),
            "hashing": hashing(work, args.rounds),
            "whole": measure(work, ModelConfig.preset(args.preset)),
        }
    path = args.out / f"{results['date']}-conversion.json"
    write_json(path, results)
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def measure(work: Path, config: ModelConfig) -> dict[str, Any]:
    """Run once: generate, copy, import, verify, export, compare."""
    hf, native, back, copy = (work / name for name in ("hf", "native", "back", "copy"))
    said: dict[str, Any] = {"make": _timed(lambda: write_checkpoint(hf, config)), "bytes": _size(hf)}
    said["cp"] = copied(hf, copy)
    said["import"] = converted("import_hf", hf, native)
    report = verify(native, hf)
    said["verify"] = {"seconds": report.seconds, "tensors": report.tensors, "mismatches": len(report.mismatches)}
    shutil.rmtree(hf)
    said["export"] = converted("export_hf", native, back)
    shutil.rmtree(native)
    started = time.perf_counter()
    said["compared"] = compare(back, config) | {"seconds": time.perf_counter() - started}
    shutil.rmtree(back)
    return said


def turns(work: Path, rounds: int) -> dict[str, list[float]]:
    """Return interleaved timings of cp, import and export of the 2B, each from a cold cache."""
    hf, native, back, copy = (work / name for name in ("hf", "native", "back", "copy"))
    write_checkpoint(hf, ModelConfig.preset("deepseek_moe_2b"))
    taken: dict[str, list[float]] = {"cp": [], "import": [], "export": []}
    for _ in range(rounds):
        taken["cp"].append(copied(hf, copy))
        taken["import"].append(converted("import_hf", hf, native)["seconds"])
        taken["export"].append(converted("export_hf", native, back)["seconds"])
        shutil.rmtree(native)
        shutil.rmtree(back)
    shutil.rmtree(hf)
    return taken


def hashing(work: Path, rounds: int) -> dict[str, list[float]]:
    """Return interleaved timings of `save` of the 2B, with and without hashing."""
    from dsmoe_jax import DeepSeekMoE, save

    class NoHash:
        def update(self, data: Any) -> None: ...
        def hexdigest(self) -> str:
            return ""

    class NoHashes:
        sha256 = NoHash
        file_digest = staticmethod(lambda file, name: NoHash())

    model = DeepSeekMoE.init(ModelConfig.preset("deepseek_moe_2b"), dtype="bfloat16")
    taken: dict[str, list[float]] = {"hashed": [], "not hashed": []}
    for _ in range(rounds):
        for how, library in (("hashed", hashlib), ("not hashed", NoHashes)):
            zarr_io.hashlib = library  # type: ignore[assignment]
            os.sync()
            taken[how].append(_timed(lambda: save(model, work / "saved")))
            shutil.rmtree(work / "saved")
    zarr_io.hashlib = hashlib
    return taken


# --- the checkpoint ---


def write_checkpoint(folder: Path, config: ModelConfig) -> None:
    """Write a bfloat16 checkpoint of random bits with a few megabytes in memory."""
    folder.mkdir()
    shapes = hf_shapes(config)
    shards: list[list[str]] = [[]]
    for name, _, _ in export_order(config):
        if sum(_nbytes(shapes[other]) for other in shards[-1]) + _nbytes(shapes[name]) > _SHARD:
            shards.append([])
        shards[-1].append(name)
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header, end = {}, 0
        for name in names:
            start, end = end, end + _nbytes(shapes[name])
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                out.writelines(bits(name, _nbytes(shapes[name])))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config.to_dict())
    os.sync()


def bits(name: str, size: int) -> Iterator[bytes]:
    """Yield the bytes of a tensor in chunks, seeded by its name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for start in range(0, size, _PIECE):
        yield rng.bytes(min(_PIECE, size - start))


def compare(folder: Path, config: ModelConfig) -> dict[str, int]:
    """Read the export with the safetensors library; return the number of tensors, and of those that differ."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shapes, wrong = hf_shapes(config), 0
    for file in sorted(set(weight_map.values())):
        with safe_open(folder / file, framework="numpy") as opened:
            for name in [name for name, home in weight_map.items() if home == file]:
                data = opened.get_tensor(name).reshape(-1).view(np.uint8)
                want = hashlib.sha256()
                for piece in bits(name, _nbytes(shapes[name])):
                    want.update(piece)
                wrong += hashlib.sha256(data).digest() != want.digest()
    return {"tensors": len(weight_map), "expected": len(shapes), "wrong": wrong}


# --- timed operations ---


def copied(source: Path, copy: Path) -> float:
    """Return the seconds of `cp` with fsync, from a cold cache."""
    drop_caches()
    seconds = _timed(lambda: subprocess.run(["cp", "-r", "--reflink=never", source, copy], check=True), os.sync)
    shutil.rmtree(copy)
    return seconds


def converted(function: str, source: Path, out: Path) -> dict[str, float]:
    """Run `import_hf` or `export_hf` in a child process, from a cold cache."""
    drop_caches()
    command = [sys.executable, "-c", f"from tests.benchmarks import conversion; conversion.child({function!r})"]
    return json.loads(subprocess.run([*command, source, out], check=True, stdout=subprocess.PIPE).stdout)


def child(function: str) -> None:
    """Convert as the arguments specify and fsync; print seconds and peak memory as JSON."""
    source, out = sys.argv[1:]
    peaks, stop = {"RssAnon": 0, "VmRSS": 0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = _timed(lambda: {"import_hf": import_hf, "export_hf": export_hf}[function](source, out), os.sync)
    stop.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "anonymous": peaks["RssAnon"], "total": peaks["VmRSS"]}))


def drop_caches() -> None:
    """Drop the page cache; needs root."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        print(f"page cache not dropped: {error}", file=sys.stderr)


def markdown(results: dict[str, Any]) -> str:
    """The report."""
    whole, size = results["whole"], results["whole"]["bytes"]
    rows = [
        f"| {step} | {whole[step]['seconds']:.1f} | {size / whole[step]['seconds'] / 1e9:.2f} | "
        f"{whole['cp'] / whole[step]['seconds']:.2f} | {whole[step]['anonymous'] / 2**30:.2f} | "
        f"{whole[step]['total'] / 2**30:.2f} |"
        for step in ("import", "export")
    ]
    medians = {step: spread(seconds).median for step, seconds in results["turns"].items()}
    hashed, bare = (spread(results["hashing"][how]).median for how in ("hashed", "not hashed"))
    compared = whole["compared"]
    lines = [
        f"# Conversion, {results['date']}",
        "",
        f"`{results['command']}`, commit {results['commit']}, "
        + ", ".join(f"{name} {value}" for name, value in (results["hardware"] | results["versions"]).items()),
        "",
        f"{compared['tensors']:,} tensors, {size / 1e9:.2f} GB; caches dropped before each step, everything on the "
        "disk at its end.",
        "",
        "| step | seconds | GB/s | speed over cp's | peak anonymous GiB | peak RSS GiB, mapped files included |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| cp -r --reflink=never | {whole['cp']:.1f} | {size / whole['cp'] / 1e9:.2f} | 1 | | |",
        *rows,
        "",
        f"- verify of both against each other: {whole['verify']['mismatches']} mismatches in "
        f"{whole['verify']['tensors']:,} tensors, {whole['verify']['seconds']:.1f} s",
        f"- exported tensors against the seed, read by the safetensors library: {compared['wrong']} of "
        f"{compared['tensors']:,} wrong, {compared['seconds']:.1f} s",
        f"- in turns at the 2B's size ({len(results['turns']['cp'])} rounds, medians): cp {medians['cp']:.2f} s, "
        f"import {medians['import']:.2f} s ({medians['cp'] / medians['import']:.2f} of cp's speed), export "
        f"{medians['export']:.2f} s ({medians['cp'] / medians['export']:.2f})",
        f"- `save` of the 2B: {hashed:.2f} s, without hashing {bare:.2f} s: {max(0.0, 1 - bare / hashed):.1%} "
        "of it is the manifest",
        "",
    ]
    return "\n".join(lines)


def _timed(*steps: Callable[[], Any]) -> float:
    started = time.perf_counter()
    for step in steps:
        step()
    return time.perf_counter() - started


def _nbytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * _ITEM


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the folder is deleted
    main()
