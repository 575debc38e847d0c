"""`.bin` files: those that torch wrote, damaged ones and hostile pickles; helpers/hostile.py writes the latter."""

import base64
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from dsmoe_jax.convert import torch_pickle
from dsmoe_jax.convert.reader import CheckpointReader
from tests.helpers.hf_folder import same_bits
from tests.helpers.hostile import (
    FOUR,
    HOOKS,
    REBUILD,
    assert_rejected,
    called,
    group,
    legacy_file,
    named,
    number,
    numbers,
    opcodes,
    state,
    storage,
    tensor,
    text,
    zip_file,
)

GOLDEN = Path(__file__).parent / "golden"


# One state_dict with `_metadata`, a transposed view, a Parameter that is a row of another tensor, float16,
# strided bfloat16 and an empty tensor: written by torch 2.13.0's torch.save, then zlib and base 85.
TORCH_FILES = {
    "legacy": """
c-noF*>2N76o$u3($>&YcFJ1zu!XEn!d8P&g=DeB-1r7rt~1m|#?Bd!TY(fQHz|c@;G&m2MjwS+9s!99&e&-
w5E$8`nKLv0cjiC#Q2wNaKRz#iUwrfB#X@-~KmDd)KLAp)=LsQw7W3GPLuZY$B#0xBaDzRID`CKSNF5sW0yhGA)7CJ^-
}R}J1n+4A$^g`oUBF=C$BaY4lx+oPLByeGs<tXL;%F77Of^lB=^-Yh9!E-|J!d`2Xzy|0aSg~d3#43Y-
H$^Gvd3fQ`DG{NL6~R`qbq3;_8d;5BxcT9O#`J=vZn+bce<+-
)clCH9L6qxnFlo}*mJn2(`YvJR;$^nRT}LI6tg_Neu}9TpK+M(n#7b%WdmkR#gsNc`{;|5_Ho#6!K_^r7f)G4dobrC*H`_Cx(EDRZ(isrr
n~_MO-aZe%JmL&IAX!kjLzb9IQEZQ_Fd+_rJOPij{lE$V$56UB25{=NmClZshoA1!x;<CZf28nA7Igf^I1uJH+&5ja@nzEPcXFW*u`HYz1
?Xy>UF&WmyjeQ>2l`O2(Ady)tpq~fc^EXdMnHgBDnFJ`lGBORehIm^AAF!uD9V95~h(*?h4CBa9ebhoKWRZv!I@(AH@-c#^0_8rE0a+sX-
H!2rB6!S0e0h<yCFxY8?)DEV!Ev;GR8$#~rlV?YZ2A``P*f8-oOv24G|#*v^mf(3FxSS-}tamH2rkkfll1$&+rYOe&{J%VgZ-
ok5#yPw$M$aETa(F*LS}ZR4v^BzqgK5n|wj?-1WD<0nXB1mX
""",
    "zip": """
c-oy-%Wm676djThEz@aZw@xGXkv@|uFIl9XOzN5-
3N`>2wN(Tl(uF`vv`Lf}eaTUb1PE%NmDBFhpz9)CcGq3eU4EgPuDS@&MUhp1Au~fsCTS^dGSH9^Ip^GS@0?3=!xVA|6$<FskWdlrul8(gm
-oK*4SgBinlcXfZa46Kr;ELyA4y+?JtuT}pLty@0lL@*u4Ls2*}fb24)9$Zgk87X8DP(kq)zB;4LrZs!A?I4!p?0)0-
;p0<_I7nEA1Tzaxp|Q{J_Rv#up{XTO3(a0nrl3xw|)jIa9<?*ff#Jo5CT?n}W$5g7kw+MJ!-A)rMCrku1i8u<!KXRhL9^b8g-
hU4}hPv4Y7T!lKDhilrF)8iv=~u*?F5!9JXsk;9%H+Pe;RLJ8i;a-ZEK%)$_gCO3qYnD<Q#Z?)m=@7bSs?!&n@ylauIK(6g?!+SBsDES-
Y(j@oyS?)4?K)87fAF`Z>@Db%cA9G*8@NpaB%5R0X*N2NKKAlxlZcI2YF-
`?86V3vLE1R?gL%2#0<(P97L!}Kelh_aX4k+U+8MX>lf<+i=R1cyBtjBxMi1AGftv0BGdvMK~Cx8wqmQCFS*V+9~ENVJfy9b{#1Kf7Ph*%
2NO)iR}t@4IBSGaMVd+6~9(YZ0xxJ%5q<?SHcwQ*;}Gt0j+<^BD?zrUqP&^eoT8Ld&?kuy8C@9p$=ojx{nbt?7$8jTtiu)YsZNlu7=u7Cx
UCjz$aU?-
q$X6PKc<$D<W4&@lG{j)+1E<Tr|fO4a*Uac7V`0BwrIcVfZ<^h?HG|G7P!M{Hi$&KO(jLMi%HuUlfmIAfVV;bwbU#$n!TDcQqiQ`y`q4Oj
b)2?aSf%ZsytUY16zk0gx%OY95IN?H5xvq`5s)pWp$t|3%bsnt{{)zq0Ob<|%sNz3=-nn`5{ufEHhyj`8$O%2-
z`Hhm?smMMq1Rq21G&;{wi-%PQJbpTs@LR(QkSdsTD{g#n-
#UCsMT6sZ7NiyQr!NnM0AvxN{(k$9O+E9rgTjC(R(C|OSaxp3iAh#j<<0Zo@|`u^ix1UQ@b_GkZhZU6vIQtFlo0eFxegH&H76~lOD^Wl0H
wPO1TM2&Z3fzPNRN0LMda^bhjtRlOt3$8!PF>`4mdaqa#OWVM%io({*I9>9*Z4Me)jL-
8tcE;^QNI{ya_$wZ!;LaP%dCz8OW2pWJyd#z<^^y!IJ4Im##
""",
}


def test_reads_bin_shards_of_torch():
    folder = GOLDEN / "k_bin_shards"
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())

    reader = CheckpointReader(folder)

    assert {name: info.file for name, info in reader.tensors.items()} == index["weight_map"]
    assert sum(reader.read(name).nbytes for name in reader.tensors) == index["metadata"]["total_size"]
    assert all(0 < np.abs(reader.read(name)).mean() < 2 for name in reader.tensors)


@pytest.mark.parametrize("form", TORCH_FILES)
def test_reads_both_formats_of_torch(tmp_path: Path, form: str):
    packed = base64.b85decode("".join(TORCH_FILES[form].split()))
    (tmp_path / "pytorch_model.bin").write_bytes(zlib.decompress(packed))
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)

    reader = CheckpointReader(tmp_path)

    assert list(reader.tensors) == ["whole", "turned", "row", "half", "brain", "none"]
    assert same_bits(reader.read("whole"), whole)
    assert same_bits(reader.read("turned"), whole.T)
    assert same_bits(reader.read("row"), whole[1])
    assert same_bits(reader.read("half"), np.array([0.5, -2], np.float16))
    assert same_bits(reader.read("brain"), np.arange(8).astype(ml_dtypes.bfloat16)[1::3])
    assert same_bits(reader.read("none"), np.zeros((0, 3), np.float32))
    assert np.shares_memory(reader.read("whole"), reader.read("row"))
    for name in reader.tensors:  # unaligned in the legacy format
        np.testing.assert_array_equal(jax.device_put(reader.read(name)), reader.read(name))


def opened(folder: Path, content: bytes) -> CheckpointReader:
    (folder / "pytorch_model.bin").write_bytes(content)
    return CheckpointReader(folder)


@pytest.mark.parametrize("write", [zip_file, legacy_file])
def test_reads_strided_views(tmp_path: Path, write):
    views = {
        "row": tensor(),
        "turned": tensor(shape=(2, 2), stride=(1, 2)),
        "tail": tensor(offset=1, shape=(2,), stride=(2,)),
        "scalar": tensor(offset=3, shape=(), stride=()),
        "empty": tensor(shape=(0, 7), stride=(7, 1)),
        "repeated": tensor(shape=(2, 2), stride=(0, 1)),
        "one": tensor(shape=(1, 4), stride=(2**70, 1)),
        "parameter": named("torch._utils", "_rebuild_parameter") + group(tensor(), b"\x88", HOOKS) + b"R",
        "new metadata": tensor()[:-2] + b"}tR",
    }

    reader = opened(tmp_path, write(state(*views.items())))

    assert reader.read("row").tolist() == reader.read("parameter").tolist() == [0, 1, 2, 3]
    assert reader.read("turned").tolist() == [[0, 2], [1, 3]]
    assert reader.read("tail").tolist() == [1, 3]
    assert reader.read("scalar").tolist() == 3
    assert reader.read("empty").shape == (0, 7)
    assert reader.read("repeated").tolist() == [[0, 1], [0, 1]]
    assert reader.read("one").tolist() == [[0, 1, 2, 3]]
    assert np.shares_memory(reader.read("row"), reader.read("turned"))


def test_reads_zip64_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 8)  # sizes and offsets past 8 bytes go into the extra fields
    content = zip_file()
    monkeypatch.undo()

    assert b"PK\x06\x06" in content
    assert opened(tmp_path, content).read("w").tolist() == [0, 1, 2, 3]


# fmt: off
BAD_TENSORS = {
    "offset": (tensor(offset=1), "'w' reaches element 4 of a storage of 4"),
    "negative offset": (tensor(offset=-1), "'w' has a negative offset or stride"),
    "shape": (tensor(shape=(5,)), "'w' reaches element 4 of a storage of 4"),
    "stride": (tensor(shape=(2, 2), stride=(3, 1)), "'w' reaches element 4"),
    "huge stride": (tensor(stride=(2**70,)), "'w' reaches element 3541774862152233910272 of"),
    "negative stride": (tensor(offset=3, stride=(-1,)), "'w' has a negative offset or stride"),
    "negative shape": (tensor(shape=(-1,)), "'w' has a dimension of -1"),
    "repeats": (tensor(shape=(2**40,), stride=(0,)), "'w' repeats 4 stored elements into 1099511627776"),
    "overflow": (tensor(shape=(2**40, 2**40), stride=(0, 0)), r"2\*\*63 bytes or more"),
    "empty overflow": (tensor(shape=(0, 2**62), stride=(1, 1)), r"2\*\*63 bytes or more"),
    "ranks": (tensor(shape=(2, 2)), "'w' has a negative offset or stride, or strides of another rank"),
    "rank": (tensor(shape=(1,) * 65, stride=(1,) * 65), "at most 64 integers"),
    "storage size": (tensor(numel=3, shape=(3,)), "'w' declares storage '0' as 3 x|must be 3 x"),
    "huge storage": (tensor(numel=2**70), "1180591620717411303424 x float32"),
    "dtype size": (tensor(kind="Half"), "as 4 x float16; it has 16 bytes|after its last storage"),
    "no storage": (tensor(key="1"), "'1', which is not in the file|'0', which no tensor uses|lists storage '0'"),
    "integers": (tensor(kind="Long"), "torch.LongStorage; weights are F32, F16 or BF16"),
    "doubles": (tensor(kind="Double"), "torch.DoubleStorage; weights are F32, F16 or BF16"),
    "complex": (tensor(kind="ComplexFloat"), "imports 'torch.ComplexFloatStorage'"),
    "conjugate": (tensor()[:-2] + b"}" + text("conj") + b"\x88stR", "arguments torch does not write"),
    "negative numel": (tensor(numel=-4), "definition of storage '0'"),
    "two storages of one key": (group(tensor(), tensor(kind="Half")), "conflicting definition of storage '0'"),
    "view of storage": (storage("Float", "0", 4, numbers(1)), "persistent id other than"),
    "storage": (storage("Float", "0", 4), "entry 'w' is a _Storage, not a tensor"),
    "number": (number(7), "entry 'w' is 7, not a tensor|storage '0'"),
    "nested": (b"}" + text("v") + tensor() + b"s", "entry 'w' is a dict, not a tensor"),
    "few arguments": (REBUILD + numbers(1) + b"R", "damaged pickle: TypeError"),
    "strange arguments": (REBUILD + numbers(0, 0, 0, 0, 0, 0) + b"R", "arguments torch does not write"),
    "float shape": (
        REBUILD + group(storage("Float", "0", 4), number(0), text("4"), numbers(1), b"NNtR"),
        "no tuple of",
    ),
    "parameter": (
        named("torch._utils", "_rebuild_parameter") + numbers(1, 2, 3) + b"R",
        "with 1, not a tensor",
    ),
    "filled OrderedDict": (
        named("collections", "OrderedDict") + numbers(1) + b"R",
        "OrderedDict with arguments",
    ),
}
# fmt: on


@pytest.mark.parametrize("write", [zip_file, legacy_file])
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensor_must_be_inside_its_storage(tmp_path: Path, case: str, write):
    content, match = BAD_TENSORS[case]
    (tmp_path / "pytorch_model.bin").write_bytes(write(state(("w", content))))

    assert_rejected(tmp_path, f"pytorch_model\\.bin: .*({match})")


MEMBER_NAME = zip_file().replace(b"r/data/0", b"r/data/1", 1)


# fmt: off
BAD_FILES = {
    "nonsense": (b"nonsense", "neither a torch zip archive nor a legacy torch file"),
    "another pickle": (pickle.dumps(1, 2), "neither a torch zip archive"),
    "truncated zip": (zip_file()[:-30], "is truncated or not a zip"),
    "half a zip": (zip_file()[:200], "is truncated or not a zip"),
    "compressed": (zip_file(compression=zipfile.ZIP_DEFLATED), "compressed or encrypted member 'r/data.pkl'"),
    "big endian": (zip_file(extra={"r/byteorder": b"big"}), "byteorder other than little"),
    "no pickle": (zip_file().replace(b"data.pkl", b"data.pkm"), "has 0 members called <root>/data.pkl"),
    "two pickles": (zip_file(extra={"q/data.pkl": b""}), "has 2 members called <root>/data.pkl"),
    "member twice": (
        zip_file(extra={"r/data/1": b""}).replace(b"data/1", b"data/0"),
        "member 'r/data/0' twice",
    ),
    "local name": (MEMBER_NAME, "member 'r/data/0', whose header has another name"),
    "unused storage": (zip_file(storages={"0": FOUR, "1": FOUR}), "storage '1', which no tensor uses"),
    "missing storage": (zip_file(storages={}), "'w' needs storage '0', which is not in the file"),
    "truncated legacy": (legacy_file()[:-1], "must be 4 x float32, got 4 in 15 bytes"),
    "legacy without data": (legacy_file(data=b""), "got 0 in 0 bytes"),
    "legacy with more": (legacy_file() + b"1", "has 1 bytes after its last storage"),
    "legacy size": (legacy_file(data=struct.pack("<q", 2**62) + FOUR), "got 4611686018427387904"),
    "legacy protocol": (legacy_file(protocol=1002), "legacy protocol 1002; it must be 1001"),
    "legacy big endian": (legacy_file(system={"little_endian": False}), "not written on a little"),
    "legacy keys": (legacy_file(keys={"0": 1}), "must list its storages, got a dict"),
    "legacy keys twice": (legacy_file(keys=("0", "0")), "lists storage '0' twice"),
    "legacy keys lack": (legacy_file(keys=(), data=b""), "'w' needs storage '0', which is not in the file"),
}
# fmt: on


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_bin_file_is_an_error(tmp_path: Path, case: str):
    content, match = BAD_FILES[case]
    (tmp_path / "pytorch_model.bin").write_bytes(content)

    assert_rejected(tmp_path, f"pytorch_model\\.bin: .*({match})")


# Executing one of these pickles would create a file "ran" in the working directory.
NESTED_TUPLE = b")" + b"".join(b"q\x00h\x00\x86" for _ in range(200))  # t = (t, t): 2**200 leaves in 800 bytes


# fmt: off
HOSTILE = {
    "os.system": (called("os", "system"), "imports 'os.system'; allowed are collections.OrderedDict"),
    "posix.system": (called("posix", "system"), "imports 'posix.system'"),
    "eval": (called("builtins", "eval", "open('ran', 'w')"), "imports 'builtins.eval'"),
    "getattr": (called("builtins", "getattr"), "imports 'builtins.getattr'"),
    "python 2": (called("__builtin__", "eval", "open('ran', 'w')"), "imports '__builtin__.eval'"),
    "load_from_bytes": (called("torch.storage", "_load_from_bytes"), "'torch.storage._load_from_bytes'"),
    "dotted": (called("collections", "OrderedDict.fromkeys"), "imports 'collections.OrderedDict.fromkeys'"),
    "space": (called("torch", "FloatStorage x"), "imports 'torch.FloatStorage x'"),
    "torch.hub": (called("torch.hub", "load"), "imports 'torch.hub.load'"),
    "chain": (opcodes(HOOKS, group(named("os", "system")), b"R"), "imports 'os.system'"),
    "call of a result": (opcodes(HOOKS, b")R"), "calls a dict, which is not allowed"),
    "call of a storage": (opcodes(named("torch", "FloatStorage"), b")R"), "calls 'torch.FloatStorage'"),
    "instance": (b"(S'touch ran'\nios\nsystem\n.", "uses pickle opcode STRING"),
    "object": (opcodes(named("collections", "OrderedDict"), b")\x81"), "uses pickle opcode NEWOBJ"),
    "extension": (opcodes(b"\x82\x01"), "uses pickle opcode EXT1"),
    "duplicate": (opcodes(b")2"), "uses pickle opcode DUP"),
    "stack global": (pickle.dumps(os.system, 4), "is a pickle of protocol 4"),
    "stack global of 2": (opcodes(text("os"), text("system"), b"\x93"), "uses pickle opcode STACK_GLOBAL"),
    "build a function": (opcodes(REBUILD, b"}", text("__code__"), b"Nsb"), "sets attributes other"),
    "build a dictionary": (opcodes(HOOKS, b"}", text("items"), b"Nsb"), "sets attributes other"),
    "empty": (b"", "pickle exhausted before seeing STOP"),
    "no value": (opcodes(), "ends with 0 values"),
    "two values": (opcodes(b"))"), "ends with 2 values"),
    "not a dictionary": (opcodes(b"]"), "holds a list, not a dictionary of tensors"),
    "pop": (opcodes(b"0"), "uses pickle opcode POP"),
    "empty tuple of 2": (opcodes(b"\x86"), "damaged pickle: IndexError at opcode 1"),
    "no mark": (opcodes(b"t"), "damaged pickle: IndexError"),
    "no memo": (opcodes(b"h\x07"), "damaged pickle: KeyError"),
    "huge memo": (opcodes(b")r\xff\xff\xff\xff"), "holds a tuple"),
    "huge string": (opcodes(b"X\xff\xff\xff\xff"), "string of 4294967295 bytes; at most 1048576"),
    "a list in itself": (opcodes(b"]q\x00h\x00a"), "holds a list"),
    "a dictionary in itself": (opcodes(b"}q\x00", text("w"), b"h\x00s"), "entry 'w' is a dict"),
    "set on a list": (opcodes(b"]", text("w"), b"Ns"), "sets 2 keys and values on a list"),
    "append to a dictionary": (opcodes(b"}Na"), "appends to a dict"),
    "key without value": (opcodes(b"}(Nu"), "sets 1 keys and values"),
    "key is a number": (opcodes(b"}K\x01Ns"), "has key 1, which is not a string"),
    "key twice": (state(("w", tensor()), ("w", tensor())), "has key 'w', which is not a string or a dup"),
    "key takes years to hash": (opcodes(b"}", NESTED_TUPLE, b"Ns"), "has key a tuple, which is not a string"),
    "value takes years to print": (state(("w", NESTED_TUPLE)), "entry 'w' is a tuple, not a tensor"),
    "storage id takes years": (opcodes(NESTED_TUPLE, b"Q"), "persistent id other than"),
    "name of a megabyte": (state(("w" * 1_000_000, b"N")), r"entry 'w+\.\.\. is None, not a tensor"),
    "name of two lines": (state(("w\nv", b"N")), r"entry 'w\\nv' is None"),
    "nested lists": (opcodes(b"]" * 200_000, b"a" * 199_999), "holds a list"),
    "open lists": (opcodes(b"]" * 400_000), "ends with 400000 values"),
    "open marks": (opcodes(b"(" * 400_000), "ends with 0 values"),
    "nested marks": (opcodes(b"(" * 200_000, b"t" * 200_000), "holds a tuple"),
    "opcodes": (opcodes(b")" * 500_001), "more than 500000 opcodes"),
    "bytes": (b"\x80\x02" + bytes(8 << 20), "has a data.pkl of 8388610 bytes; at most 8388608|opcode"),
}
# fmt: on


def hostile_zip(content: bytes) -> bytes:
    return zip_file(content, storages={})


def hostile_legacy(content: bytes) -> bytes:
    return legacy_file(content, keys=(), data=b"")


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("write", [hostile_zip, hostile_legacy])
def test_hostile_pickle_is_rejected_unexecuted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, write):
    content, match = HOSTILE[case]
    (tmp_path / "pytorch_model.bin").write_bytes(write(content))
    monkeypatch.chdir(tmp_path)
    functions = [(function, dict(vars(function))) for function in torch_pickle._CALLS.values()]

    assert_rejected(tmp_path, f"pytorch_model\\.bin: .*({match})")

    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]
    assert functions == [(function, vars(function)) for function in torch_pickle._CALLS.values()]


@pytest.mark.parametrize("write", [zip_file, legacy_file])
def test_random_damage_is_a_one_line_error_or_harmless(tmp_path: Path, write):
    whole = bytearray(write(state(("w", tensor()), ("v", tensor(shape=(2, 2), stride=(1, 2))))))
    random = np.random.default_rng(0)

    for _ in range(400):
        damaged = whole.copy()
        for position in random.integers(len(whole), size=random.integers(1, 4)):
            damaged[position] = random.integers(256)
        (tmp_path / "pytorch_model.bin").write_bytes(damaged)
        try:
            reader = CheckpointReader(tmp_path)
        except ValueError:
            assert_rejected(tmp_path, r"pytorch_model\.bin: ")
        else:
            assert all(reader.read(name).nbytes <= len(whole) for name in reader.tensors)
