"""Two processes with experts and cache sharded over both generate what one process does."""

import json
from typing import Any

import pytest

from dsmoe_jax.generate import Generator, SamplingParams
from dsmoe_jax.model import DeepSeekMoE
from tests.helpers.hf_folder import tiny
from tests.helpers.processes import run_two

pytestmark = pytest.mark.heavy

TIMEOUT = 240
PROMPTS = [[5, 6, 7], list(range(10, 60)), [8], [9, 10]]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2}
PARAMS = [SamplingParams(max_new_tokens=4, ignore_eos=True, **(SAMPLED if i % 2 else {})) for i in range(len(PROMPTS))]

# Run by each process with its index and the coordinator's address; prints its outputs.
PROGRAM = """
import json, sys
index, coordinator = int(sys.argv[1]), sys.argv[2]
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(coordinator, num_processes=2, process_id=index)
from dsmoe_jax import DeepSeekMoE, MeshConfig
from dsmoe_jax.generate import Generator
from tests.helpers.hf_folder import tiny
from tests.test_generate_processes import PARAMS, PROMPTS

model = DeepSeekMoE.init(tiny(), mesh=MeshConfig(fsdp=2, expert=4))
generator = Generator(model, max_batch_size=4, prefill_chunk=32)
print(json.dumps([output.token_ids for output in generator(PROMPTS, PARAMS)]))
"""


@pytest.mark.slow
def test_two_processes_match_one():
    generator = Generator(DeepSeekMoE.init(tiny()), max_batch_size=4, prefill_chunk=32)
    want = [output.token_ids for output in generator(PROMPTS, PARAMS)]

    got = [json.loads(output.strip().split("\n")[-1]) for output in run_two(PROGRAM, timeout=TIMEOUT)]

    assert got == [want, want]
