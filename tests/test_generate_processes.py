"""Two processes with experts and cache sharded over both generate what one process does."""

import contextlib
import json
import socket
import subprocess
import sys
from typing import Any

import pytest

from dsmoe_jax.generate import Generator, SamplingParams
from dsmoe_jax.model import DeepSeekMoE
from tests.helpers.hf_folder import tiny

pytestmark = pytest.mark.heavy

TIMEOUT = 240
PROMPTS = [[5, 6, 7], list(range(10, 60)), [8], [9, 10]]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2}
PARAMS = [SamplingParams(max_new_tokens=4, ignore_eos=True, **(SAMPLED if i % 2 else {})) for i in range(len(PROMPTS))]

# Run by each process with its index and the coordinator's address; prints its outputs.
PROGRAM = """
import json, os, sys
index, coordinator = int(sys.argv[1]), sys.argv[2]
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
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


def test_two_processes_match_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    generator = Generator(DeepSeekMoE.init(tiny()), max_batch_size=4, prefill_chunk=32)
    want = [output.token_ids for output in generator(PROMPTS, PARAMS)]

    with contextlib.ExitStack() as stack:
        started = []
        for i in range(2):
            command = [sys.executable, "-c", PROGRAM, str(i), coordinator]
            started.append(stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
            stack.callback(started[-1].kill)
        got = [json.loads(process.communicate(timeout=TIMEOUT)[0].strip().split("\n")[-1]) for process in started]

    assert got == [want, want]
