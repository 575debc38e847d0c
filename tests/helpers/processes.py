"""Two processes of one job on this machine, for the tests of several processes."""

import contextlib
import os
import socket
import subprocess
import sys


def run_two(program: str, *args: str, timeout: float) -> list[str]:
    """Run a program in two processes that each simulate four CPU devices; return what they print.

    Its arguments are the index of the process, the address of the coordinator, and `args`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        started = []
        for index in range(2):
            command = [sys.executable, "-c", program, str(index), coordinator, *args]
            started.append(stack.enter_context(subprocess.Popen(command, env=environment, **pipes)))
            stack.callback(started[-1].kill)
        outputs = []
        for process in started:
            output, error = process.communicate(timeout=timeout)
            assert process.returncode == 0, error[-2000:]
            outputs.append(output)
        return outputs
