"""Two processes of four devices evaluate as one: the same scores, kept by process 0, and resumed by both."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.evaluation import NUM_DOCS, TASKS, write_tasks
from tests.helpers.processes import run_two

pytest.importorskip("lm_eval", reason="evaluation needs the harness: pip install -e '.[eval]'")
pytestmark = pytest.mark.slow

TIMEOUT = 240
PROGRAM = """
import json, os, shutil, sys
index, coordinator, home, checkpoint = int(sys.argv[1]), *sys.argv[2:5]
os.environ["HF_DATASETS_CACHE"] = f"{home}/cache{index}"
os.environ["HF_HUB_OFFLINE"] = "1"
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(coordinator, num_processes=2, process_id=index)
from dsmoe_jax import MeshConfig
from dsmoe_jax.evaluate import evaluate, responses
seen, computed, add = {}, [], responses.Responses.add

def attempt(scenario, **changes):
    options = {"suite": sys.argv[5], "include_path": [f"{home}/tasks"], "data": f"{home}/data", "out": f"{home}/out"}
    try:
        found = evaluate(checkpoint, mesh=MeshConfig(fsdp=4, expert=2), **options | changes)
        seen[scenario] = {f"{r.row.task} {r.metric}": r.score for r in found.results}
    except (ValueError, RuntimeError) as error:
        seen[scenario] = f"{type(error).__name__}: {error}"

def killed(self, key, response):
    if len(computed) == 20:
        raise RuntimeError("killed")
    computed.append(key)
    add(self, key, response)

responses.Responses.add = killed
attempt("killed")
responses.Responses.add = lambda self, key, response: computed.append(key) or add(self, key, response)
attempt("resumed")
attempt("no data", suite="local_texts", data=f"{home}/data" if index == 0 else f"{home}/tasks")
seen["computed"] = len(computed)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    home = tmp_path_factory.mktemp("processes")
    write_tasks(home)
    outputs = run_two(PROGRAM, str(home), str(checkpoint), ",".join(TASKS), timeout=TIMEOUT)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def test_both_processes_have_the_scores_of_one(seen: list[dict[str, Any]], checkpoint: Path, tmp_path: Path):
    from dsmoe_jax.evaluate import evaluate, task_data

    tasks, data = write_tasks(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_data, "hub_is_reachable", lambda: False)
        alone = evaluate(checkpoint, suite=",".join(TASKS), include_path=[tasks], data=data, out=tmp_path / "out")

    assert seen[0]["resumed"] == seen[1]["resumed"]
    assert seen[0]["resumed"] == pytest.approx({f"{r.row.task} {r.metric}": r.score for r in alone.results}, rel=1e-5)


def test_a_kill_loses_only_what_was_not_computed(seen: list[dict[str, Any]]):
    assert [one["killed"] for one in seen] == ["RuntimeError: killed"] * 2
    assert [one["computed"] for one in seen] == [5 * NUM_DOCS] * 2


def test_data_that_one_process_lacks_stops_both(seen: list[dict[str, Any]]):
    assert "another process cannot load it" in seen[0]["no data"]
    assert "no data: expected" in seen[1]["no data"]
