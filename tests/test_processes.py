"""Two processes with one mesh save the same checkpoint as one process.

They are started once, on loopback, and run all scenarios of `PROGRAM`; each test checks one.
"""

import json
from pathlib import Path

import pytest

from dsmoe_jax.checkpoint.native import load, save
from dsmoe_jax.model import DeepSeekMoE
from dsmoe_jax.text.train_tokenizer import train_tokenizer
from tests.helpers.hf_folder import tiny
from tests.helpers.processes import run_two

pytestmark = pytest.mark.heavy

TIMEOUT = 120
OTHER_FAILED = "DSMoEError: another process failed; see its log"

# Run by each process, with process index, coordinator and a folder as arguments; prints a JSON object with the outcome
# of each scenario.
PROGRAM = """
import json, os, sys
index, coordinator, home = int(sys.argv[1]), sys.argv[2], sys.argv[3]
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(coordinator, num_processes=2, process_id=index)
from jax.experimental.multihost_utils import sync_global_devices
from dsmoe_jax import DeepSeekMoE, MeshConfig, load, save
from dsmoe_jax.checkpoint import zarr_io
from tests.helpers.hf_folder import tiny

model = DeepSeekMoE.init(tiny(), mesh=MeshConfig(fsdp=4, expert=2))
write, seen = zarr_io.ArrayWriter.write, {}

def full_disk(*_):
    raise OSError("no space left")

def attempt(scenario, step):
    try:
        seen[scenario] = str(step())
    except (ValueError, OSError) as error:
        seen[scenario] = f"{type(error).__name__}: {error}"
    sync_global_devices(scenario)

for failing in (0, 1):
    zarr_io.ArrayWriter.write = full_disk if index == failing else write
    attempt(f"process {failing} cannot write", lambda: save(model, f"{home}/out"))
zarr_io.ArrayWriter.write = write
seen["left"] = sorted(os.listdir(home))
sync_global_devices("seen")
attempt("save", lambda: save(model, f"{home}/out"))
attempt("save again", lambda: save(model, f"{home}/out"))
attempt("load", lambda: load(f"{home}/out", mesh=MeshConfig(expert=4, fsdp=2)).config == tiny())
if index == 0:
    with open(f"{home}/out/parameters/state/embed/c/0/0", "r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
attempt("damage", lambda: load(f"{home}/out", mesh=MeshConfig(expert=4, fsdp=2)))
if index == 0:
    with open(f"{home}/out/parameters/state/embed/c/0/0", "r+b") as file:
        file.write(first)
from dsmoe_jax.train.config import DataConfig, RunConfig
from dsmoe_jax.train.loop import run
visible = lambda path: path if index == 0 else f"{path} is missing"  # process 1 does not find it
def trains(**changes):
    data = DataConfig(sources=(changes.pop("source", "python-stdlib"),), tokenizer=changes.pop("tokenizer", None))
    run(RunConfig(output_dir=f"{home}/run", data=data, **changes))
attempt("no model", lambda: trains(model=visible(f"{home}/out/config.json")))
attempt("no base", lambda: trains(init_from=visible(f"{home}/out")))
attempt("no data", lambda: trains(model=f"{home}/out/config.json", source=visible(f"{home}/out")))
attempt("no tokenizer", lambda: trains(model=f"{home}/wide.json", tokenizer=visible(f"{home}/tokenizer")))
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("processes")
    train_tokenizer(["ab"] * 9, home / "tokenizer", 300)
    (home / "wide.json").write_text(json.dumps(tiny(vocab_size=300).to_dict()))
    return home


@pytest.fixture(scope="module")
def seen(home: Path) -> list[dict[str, str]]:
    """Outcome of each scenario, per process."""
    return [json.loads(output.strip().split("\n")[-1]) for output in run_two(PROGRAM, str(home), timeout=TIMEOUT)]


def test_two_processes_save_the_checkpoint_of_one(seen: list[dict[str, str]], home: Path, tmp_path: Path):
    save(DeepSeekMoE.init(tiny()), tmp_path / "alone")

    alone, together = (
        json.loads((folder / "dsmoe_jax.json").read_text())["tensors"] for folder in (tmp_path / "alone", home / "out")
    )

    assert [process["save"] for process in seen] == ["None", "None"]
    assert together == alone
    assert load(home / "out").config == tiny()


def test_two_processes_load_onto_another_mesh(seen: list[dict[str, str]]):
    assert [process["load"] for process in seen] == ["True", "True"]


def test_all_refuse_to_overwrite(seen: list[dict[str, str]]):
    assert all(process["save again"].endswith("out exists; nothing is overwritten") for process in seen)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_process_fails_all_and_leaves_nothing(seen: list[dict[str, str]], failing: int):
    outcomes = [process[f"process {failing} cannot write"] for process in seen]

    assert outcomes[failing] == "OSError: no space left"
    assert outcomes[1 - failing] == OTHER_FAILED
    assert [process["left"] for process in seen] == [["tokenizer", "wide.json"]] * 2


def test_damage_that_one_process_finds_is_known_to_all(seen: list[dict[str, str]]):
    outcomes = [process["damage"] for process in seen]

    assert OTHER_FAILED in outcomes
    assert sum("damaged: 'parameters/state/embed/c/0/0'" in line for line in outcomes) == 1


@pytest.mark.parametrize(("scenario", "named"), {"no model": "", "no base": "", "no tokenizer": "no tokenizer"}.items())
def test_what_one_process_cannot_find_ends_all(seen: list[dict[str, str]], scenario: str, named: str):
    outcomes = [process[scenario] for process in seen]

    assert outcomes[0] == OTHER_FAILED
    assert "is missing" in outcomes[1]
    assert named in outcomes[1]


def test_no_process_waits_for_data_that_are_not_there(seen: list[dict[str, str]]):
    assert all(process["no data"].startswith("DSMoEError: ") for process in seen)
