"""Hostile checkpoints give one-line errors or load the same tensors as an independent reader.

Start at `HOSTILE`, folders with one attack each; mutated files follow. Hostile files alone are in test_reader.py.
"""

import functools
import json
import os
import re
import struct
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.reader import CheckpointReader
from dsmoe_jax.loading import load
from tests.helpers.hf_folder import INDEX, hf_tensors, random_params, snapshot
from tests.helpers.hostile import (
    HOOKS,
    MUTATIONS,
    SMALL,
    built,
    called,
    entry,
    good,
    group,
    legacy_file,
    named,
    opcodes,
    state,
    tensor,
    text,
    zip_file,
)

pytestmark = pytest.mark.heavy

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # hypothesis creates it even without a database

SECONDS = 10  # usually milliseconds; the machine may be busy
MEGABYTES = 64_000_000  # plus twice the size of the files


def within_bounds(folder: Path, attempt: Callable[[], object]) -> ValueError | None:
    """Run `attempt` within limits of time and traced memory, Python's and NumPy's; returns its error or None."""
    size = sum(path.lstat().st_size for path in folder.rglob("*"))
    raised = None
    tracemalloc.reset_peak()
    before, started = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        attempt()
    except ValueError as error:
        raised = error
    took, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1] - before
    assert took < SECONDS
    assert peak < 2 * size + MEGABYTES, f"{peak} bytes for files of {size}"
    if raised is not None:
        line = str(raised)
        assert line.startswith(str(folder)), line
        assert len(line) < 600, len(line)
        # Terminals must not break it either.
        assert line.isprintable(), line
    return raised


@pytest.fixture(scope="module", autouse=True)
def memory():
    """Trace Python's allocations."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


# Attacks


Damage = Callable[[Path], object]
ONE, SHARD = "model.safetensors", "model-00002-of-00002.safetensors"
EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def weights(name: str, content: Callable[[], bytes]) -> Damage:
    """Replace the weights by this file."""

    def damage(folder: Path) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        (folder / name).write_bytes(content())

    return damage


def header(content: Callable[[], object], data: bytes = bytes(16)) -> Damage:
    return weights(ONE, lambda: built(content(), data))


def pickled(*parts: bytes) -> Damage:
    return weights("pytorch_model.bin", lambda: zip_file(opcodes(*parts), storages={}))


def replaced(name: str, content: Callable[[], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(content())


def placed_in(shard: str) -> Damage:
    """Place every tensor in `shard`."""
    return replaced(
        INDEX,
        lambda: json.dumps({"weight_map": dict.fromkeys(hf_tensors(SMALL, random_params(SMALL)), shard)}).encode(),
    )


def config(**fields: object) -> Damage:
    def damage(folder: Path) -> None:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | fields))

    return damage


def pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def linked(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / "moved")
        (folder / name).symlink_to(target)

    return damage


def sparse(name: str, start: bytes, size: int) -> Damage:
    def damage(folder: Path) -> None:
        weights(name, lambda: start)(folder)
        os.truncate(folder / name, size)

    return damage


@functools.cache
def filled(item: str, brackets: str = "{}", size: int = 4_000_000) -> bytes:
    """Return JSON of repeated items beyond the size limit; `#` is a hexadecimal counter."""
    count = size // (len(item.encode()) + 5 * item.count("#") + 1)
    items = (item.replace("#", f"{i:05x}") for i in range(count)) if "#" in item else [item] * count
    return (brackets[0] + ",".join(items) + brackets[1]).encode()


def bomb() -> bytes:
    """Return a zip bomb."""
    return zip_file(state(("w", tensor(numel=2**18, shape=(2**18,)))), {"0": bytes(2**20)}, compression=8)


def directory(entries: int, name: bytes = b"%07d", offset: int = 0) -> bytes:
    """Return a zip of one member and a directory of many entries."""
    row = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, offset)
    rows = b"".join(row + name % i for i in range(entries)) if b"%" in name else (row + name) * entries
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, entries & 0xFFFF, entries & 0xFFFF, len(rows), 37, 0)
    return struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 7, 0) + b"0000000" + rows + end


def overlapping() -> bytes:
    """Return a zip with overlapping members: storage 1 is also the end of storage 0."""
    inner = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 16, 16, 8, 0) + b"r/data/1" + bytes(16)
    content = zip_file(
        state(("w", tensor(numel=len(inner) // 4, shape=(4,))), ("v", tensor(key="1"))), {"0": inner + bytes(2)}
    )
    at, first = content.index(inner), content.index(b"PK\1\2")
    row = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 16, 16, 8, 0, 0, 0, 0, 0, at) + b"r/data/1"
    end = content.index(b"PK\5\6")
    count, size = struct.unpack("<HL", content[end + 10 : end + 16])
    fields = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count + 1, count + 1, size + len(row), first, 0)
    return content[:first] + row + content[first:end] + fields


def into_the_directory() -> bytes:
    """Return a zip whose last, unused member spans the rest of the file."""
    content = bytearray(zip_file(extra={"r/version": b"3"}))
    local, row, end = content.index(b"PK\3\4", content.index(b"r/data/0")), content.rindex(b"PK\1\2"), len(content)
    size = end - (local + 30 + len("r/version"))
    content[row + 20 : row + 28] = struct.pack("<2L", size, size)
    return bytes(content)


def one_storage_for_many() -> bytes:
    view = tensor(numel=2**16, shape=(2**16,), stride=(1,))
    return zip_file(state(*((f"w{i}", view) for i in range(1000))), {"0": bytes(2**18)})


def memo(count: int) -> bytes:
    return b")" + b"".join(b"r" + struct.pack("<I", i) for i in range(count))


def one_tensor_under(count: int) -> bytes:
    """Return a pickle that repeats one empty tensor, with two opcodes each time."""
    recalled = b"".join(text(f"{i:x}") + b"h\x00" for i in range(count))
    items = text("w") + tensor(numel=0, shape=(0,)) + b"q\x00" + recalled
    return zip_file(opcodes(b"}(", items, b"u"), {"0": b""})


LARGEST = {
    "vocab_size": 1 << 24, "hidden_size": 1 << 24, "intermediate_size": 1 << 24, "moe_intermediate_size": 1 << 24,
    "num_hidden_layers": 4096, "num_attention_heads": 1 << 23, "num_key_value_heads": 1 << 23,
    "n_shared_experts": 4096, "n_routed_experts": 65536, "num_experts_per_tok": 65536,
    "max_position_embeddings": 1 << 31,
}  # fmt: skip
TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'

# change of the folder | text of the error
# fmt: off
HOSTILE: dict[str, tuple[Damage, str]] = {
    # safetensors
    "overlapping offsets": (header(lambda: {"a": entry(0, 16, [4]), "b": entry(8, 16, [2])}), "'b' starts at 8"),
    "offsets with a hole": (header(lambda: {"a": entry(0, 4, [1]), "b": entry(8, 16, [2])}), "'b' starts at 8"),
    "offsets past the end": (header(lambda: {"a": entry(0, 2**40, [2**38])}), "up to byte 1099511627776"),
    "negative offsets": (header(lambda: {"a": entry(-16, 0, [4])}), "'a' starts at -16"),
    "header over 100 MB": (sparse(ONE, struct.pack("<Q", 10**8 + 1) + b"{", 10**8 + 99), "header of 100000001 bytes"),
    "header of 2**64 bytes": (weights(ONE, lambda: b"\xff" * 8 + b"{}"), "header of 18446744073709551615 bytes"),
    "header longer than the file": (weights(ONE, lambda: struct.pack("<Q", 99) + b"{}"), "header up to byte 107"),
    "duplicate names": (header(lambda: TWICE), "JSON key 'a' twice"),
    "name of two lines": (header(lambda: {"a\nb": entry(0, 16, [4])}), r"tensor name 'a\\nb' must have"),
    "name with NUL": (header(lambda: {"a\0": entry(0, 16, [4])}), "tensor name .* must have at most"),
    "name with a lone surrogate": (header(lambda: {"\ud800": entry(0, 16, [4])}), "tensor name .* must have at most"),
    "name of a megabyte": (header(lambda: {"a" * 10**6: entry(0, 16, [4])}), "tensor name .* must have at most"),
    "shape of 2**64 elements": (header(lambda: {"a": entry(0, 0, [2**32, 2**32])}, b""), r"2\*\*63 bytes or more"),
    "shape of 64 long numbers": (header(lambda: {"a": entry(0, 0, [2**62] * 64)}, b""), r"2\*\*63 bytes or more"),
    "header of tensors": (header(lambda: filled(f'"#":{EMPTY}'), b""), "may take .* bytes in memory"),
    "header of lists": (header(lambda: filled("[]", "[]")), "may take .* bytes in memory"),
    "header of objects": (header(lambda: filled('"#":{}')), "may take .* bytes in memory"),
    "header of emoji": (header(lambda: filled('"😀#":"😀"')), "may take .* bytes in memory"),
    "header wide by one emoji": (header(lambda: f'{{"a":"{"x" * 7_900_000}😀"}}'.encode()), "must describe tensor 'a'"),
    "header of open lists": (header(lambda: b"[" * 500_000), "nested too deeply"),
    "header nested in 100 levels": (header(lambda: b'{"a":' * 100 + b"1" + b"}" * 100), "nested too deeply"),
    "integer of 5,000 digits": (header(lambda: b'{"a":' + b"1" * 5000 + b"}"), "integer of 5000 digits"),
    "integer of 7 MB": (header(lambda: b'{"a":' + b"1" * 7_000_000 + b"}"), "integer of 7000000 digits"),
    "as many tensors as are read": (
        header(lambda: filled(f'"#":{EMPTY}', size=1_500_000), b""), "config.json asks for|is missing"
    ),
    # index
    "index: a folder above": (placed_in("../moved"), "a shard must be a .safetensors file"),
    "index: absolute": (placed_in("/etc/hostname"), "a shard must be a .safetensors file"),
    "index: a folder below": (placed_in("x/y"), "a shard must be a .safetensors file"),
    "index: backslash": (placed_in("..\\moved"), "a shard must be a .safetensors file"),
    "index: NUL": (placed_in("model\0.safetensors"), "a shard must be a .safetensors file"),
    "index: two lines": (placed_in("a\nb"), "a shard must be a .safetensors file"),
    "index: a lone surrogate": (placed_in("\ud800"), "a shard must be a .safetensors file"),
    "index: name of 10,000 characters": (placed_in("x" * 10_000), "a shard must be a .safetensors file"),
    "index: itself": (placed_in(INDEX), "a shard must be a .safetensors file"),
    "index: config": (placed_in("config.json"), "a shard must be a .safetensors file"),
    "index: of many tensors": (
        replaced(INDEX, lambda: b'{"weight_map":' + filled('"#":"x"', size=2_000_000) + b"}"), "'00000' is in|x: "
    ),
    "index: of lists": (replaced(INDEX, lambda: filled("[]", "[]")), "may take .* bytes in memory"),
    "index: over 100 MB": (sparse(INDEX, b"{", 10**8 + 1), "has 100000001 bytes"),
    # links and special files
    "shard is a pipe": (pipe(SHARD), "is not a regular file"),
    "index is a pipe": (pipe(INDEX), "is not a regular file"),
    "config is a pipe": (pipe("config.json"), "config.json: is not a regular file"),
    "shard links out of the folder": (linked(SHARD, "../moved"), "outside the checkpoint"),
    "index links out of the folder": (linked(INDEX, "../moved"), "outside the checkpoint"),
    "shard links to a device": (linked(SHARD, "/dev/zero"), "outside the checkpoint"),
    "config links to a device": (linked("config.json", "/dev/zero"), "config.json: is not a regular file"),
    "config links to itself": (linked("config.json", "config.json"), "config.json: "),
    # zip
    "zip bomb": (weights("pytorch_model.bin", bomb), "compressed or encrypted member"),
    "zip of a million members": (
        weights("pytorch_model.bin", lambda: directory(10**6, b"0000000")), "zip directory of 53000000 bytes; at most"
    ),
    "zip of 39,000 members": (weights("pytorch_model.bin", lambda: directory(39_000)), "inside the one before"),
    "zip with overlapping members": (weights("pytorch_model.bin", overlapping), "'r/data/1' inside the one before it"),
    "zip with a member in the directory": (weights("pytorch_model.bin", into_the_directory), "its directory starts at"),
    "zip with one member a thousand times": (
        weights("pytorch_model.bin", lambda: directory(1000, b"0000000")), "'0000000' twice"
    ),
    "one storage under a thousand names": (weights("pytorch_model.bin", one_storage_for_many), "at most twice its"),
    # pickle
    "os.system": (weights("pytorch_model.bin", lambda: zip_file(called("os", "system"))), "imports 'os.system'"),
    "os.system, legacy": (weights("pytorch_model.bin", lambda: legacy_file(called("os", "system"))), "'os.system'"),
    "builtins.eval": (
        weights("pytorch_model.bin", lambda: zip_file(called("builtins", "eval", "open('ran', 'w')"))), "eval"
    ),
    "__reduce__ chain": (
        pickled(HOOKS, group(named("os", "system")), b"R", group(text("touch ran")), b"R"), "imports 'os.system'"
    ),
    "__reduce__ of a result": (pickled(HOOKS, group(text("touch ran")), b"R"), "calls a dict, which is not allowed"),
    "deep nesting": (pickled(b"]" * 50_000, b"a" * 49_999), "holds a list"),
    "deep tuples": (pickled(b")", b"\x85" * 50_000), "holds a tuple"),
    "half a million dictionaries": (pickled(b"}" * 499_000), "ends with 499000 values"),
    "half a million memo entries": (pickled(memo(499_000)), "holds a tuple"),
    "memo index of 2**32": (pickled(b")r\xff\xff\xff\xff"), "holds a tuple"),
    "string of 4 GB": (pickled(b"X\xff\xff\xff\xff"), "string of 4294967295 bytes"),
    "string of 2**63 bytes": (pickled(b"\x8d" + b"\xff" * 8), "BINUNICODE8"),
    "strings of 7 MB": (pickled(*[text("😀" + "x" * 10**6) for _ in range(7)]), "ends with 7 values"),
    "number of 2 GB": (pickled(b"\x8b\xff\xff\xff\x7f"), "LONG4"),
    "number of 7 MB": (pickled(b"I" + b"7" * 7_000_000 + b"\n"), "opcode INT"),
    "function's name of 7 MB": (pickled(b"c" + b"o" * 7_000_000 + b"\nsystem\n"), "which is not a module and a name"),
    "a tensor under 60,000 names": (
        weights("pytorch_model.bin", lambda: one_tensor_under(60_000)), "holds 60001 tensors; at most 50000"
    ),
    # config
    "config: every size at its limit": (config(**LARGEST), "config.json asks for .* tensors"),
    "config: 4096 layers of 65536 experts": (
        config(num_hidden_layers=4096, n_routed_experts=65536), "asks for 805,150,722 tensors, the checkpoint holds 28"
    ),
    "config: a vocabulary of 2**24": (config(vocab_size=1 << 24), "has shape"),
    "config: 65536 experts": (config(n_routed_experts=65536), "config.json asks for"),
    "config: 4096 layers": (config(num_hidden_layers=4096), "config.json asks for"),
    "config: past the limits": (config(hidden_size=1 << 40), "hidden_size must be"),
    "config: an integer of 400 digits": (config(hidden_size=10**400), "an integer of 401 digits"),
    "config: an activation of a megabyte": (config(hidden_act="x" * 10**6), "hidden_act"),
    "config: a list for a size": (config(hidden_size=[0] * 10**5), "hidden_size"),
    "config: a number of architectures": (config(architectures=7), "architectures"),
    "config: nested": (replaced("config.json", lambda: b'{"a":' * 500 + b"1" + b"}" * 500), "nested too deeply"),
    "config: a field nested in 100 levels": (
        replaced("config.json", lambda: b'{"a":' * 100 + b"1" + b"}" * 100), "nested too deeply"
    ),
    "config: of 9 MB": (replaced("config.json", lambda: b" " * 9_000_000), "has 9000000 bytes; at most 8000000"),
    "config: of objects": (replaced("config.json", lambda: filled('"#":{}')), "may take .* bytes in memory"),
}
# fmt: on
# They take a second and more, and smaller cases repeat them.
SLOW = {
    "as many tensors as are read",
    "half a million memo entries",
    "zip of 39,000 members",
    "header of emoji",
    "header of objects",
    "index: of many tensors",
}


@pytest.mark.parametrize(
    ("damage", "named"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in HOSTILE.items()],
)
def test_hostile_folder_is_rejected_within_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage, named: str
):
    folder = tmp_path / "hf"
    folder.mkdir()
    for name, content in good("shards").items():
        (folder / name).write_bytes(content)
    damage(folder)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)

    error = within_bounds(folder, lambda: load(folder))

    assert error is not None
    assert re.search(named, str(error)), str(error)[:600]
    assert snapshot(tmp_path) == before


# Mutations

# Errors for files that the format allows: other dtypes, and tensors of other models.
STRICTER = re.compile(
    r"weights are F32, F16 or BF16|tensor name .* must have|JSON key .* twice|dimensions; at most|2\*\*63"
    r"|nested too deeply|integer of \d+ digits|by dtype, shape and data_offsets only|has no tensors|bytes; at most"
    r"|__metadata__ that is not an object|does not start with {"
)


def agrees_with_safetensors(file: Path, error: ValueError | None, got: dict[str, np.ndarray]) -> None:
    """Compare with the safetensors library."""
    try:
        theirs = safetensors.deserialize(file.read_bytes())
    except safetensors.SafetensorError:
        assert error is not None
        return
    if error is not None:
        assert STRICTER.search(str(error)), str(error)
        return
    codes = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    ours = {name: (list(array.shape), codes[array.dtype.name], array.tobytes()) for name, array in got.items()}
    assert ours == {name: (found["shape"], found["dtype"], bytes(found["data"])) for name, found in theirs}


def agrees_with_its_bytes(content: bytes, original: bytes, got: dict[str, np.ndarray]) -> None:
    """Check tensors after a change of their bytes only."""
    tensors = hf_tensors(SMALL, random_params(SMALL))
    assert got.keys() == tensors.keys()
    for name, array in tensors.items():
        start = original.index(array.tobytes())
        assert got[name].tobytes() == content[start : start + array.nbytes], name


def outcome(folder: Path, mutation: str, r: Random) -> str:
    """Mutate one file of a valid checkpoint, open it and restore the file; returns the result."""
    form, name, damage = MUTATIONS[mutation]
    files = good(form)
    content = damage(r, files[name])
    file = folder / name
    file.write_bytes(content)
    got: dict[str, np.ndarray] = {}

    def read() -> None:
        ModelConfig.from_file(folder)
        with CheckpointReader(folder) as reader:
            for tensor in reader.tensors:
                got[tensor] = reader.read(tensor)

    try:
        error = within_bounds(folder, read)
        assert sum(array.nbytes for array in got.values()) <= 2 * sum(map(len, files.values())) + len(content)
        if name == "model.safetensors":
            agrees_with_safetensors(file, error, got)
        if mutation.endswith(", tensor"):
            assert error is None
            agrees_with_its_bytes(content, files[name], got)
        if mutation == "zip, headers" and error is None:  # headers must lead to the same tensors
            agrees_with_its_bytes(files[name], files[name], got)
        got.clear()
        if error is None:
            error, kind = within_bounds(folder, lambda: load(folder)), "rejected by load"
        else:
            kind = "rejected by " + ("config" if "config.json" in str(error) else "the reader")
        assert {path.name for path in folder.iterdir()} == files.keys()
        assert not os.path.exists("ran")
        return "loaded" if error is None else kind
    finally:
        file.write_bytes(files[name])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Return a valid checkpoint of each form."""
    paths = {}
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(tmp_path_factory.mktemp("working"))
    for form in sorted({form for form, _, _ in MUTATIONS.values()}):
        paths[form] = tmp_path_factory.mktemp(form)
        for name, content in good(form).items():
            (paths[form] / name).write_bytes(content)
    yield paths
    monkeypatch.undo()


def test_valid_checkpoints_load(folders: dict[str, Path]):
    want = hf_tensors(SMALL, random_params(SMALL))
    for folder in folders.values():
        assert within_bounds(folder, lambda folder=folder: load(folder)) is None
        with CheckpointReader(folder) as reader:
            assert all(np.array_equal(reader.read(name), array) for name, array in want.items())


@pytest.mark.parametrize("mutation", MUTATIONS)
@settings(max_examples=8, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(r=st.randoms(use_true_random=False))
def test_mutated_file_loads_or_is_a_one_line_error(folders: dict[str, Path], mutation: str, r: Random):
    assert outcome(folders[MUTATIONS[mutation][0]], mutation, r)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_mutated_files_load_or_are_rejected(folders: dict[str, Path]):
    counts = {mutation: Counter() for mutation in MUTATIONS}
    started, number = time.perf_counter(), 12_800

    for seed in range(number):
        mutation = list(MUTATIONS)[seed % len(MUTATIONS)]
        try:
            counts[mutation][outcome(folders[MUTATIONS[mutation][0]], mutation, Random(seed))] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}: {mutation}")
            raise

    total = sum(counts.values(), Counter())
    print(f"\n{number} files in {time.perf_counter() - started:.0f} s: {dict(total)}")
    for mutation, count in counts.items():
        print(f"{mutation:22} {dict(count)}")
    assert total["loaded"] > number // 20
    assert all(count["loaded"] < count.total() for mutation, count in counts.items() if "tensor" not in mutation)
