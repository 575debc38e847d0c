"""`python -m tests.benchmarks.gpu.child PART SECONDS [--small]`: run one part and print its rows as JSON lines.

Started by `__main__.py`. Output of libraries is redirected to stderr.
"""

import functools
import importlib
import json
import os
import sys
import time
from typing import Any

from tests.benchmarks.gpu import cases, parts
from tests.benchmarks.gpu.sizes import sizes


def main() -> None:
    """Run the part."""
    part, seconds, *rest = sys.argv[1:]
    until = time.monotonic() + float(seconds)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(row: dict[str, Any]) -> None:
        print(json.dumps(row), file=lines, flush=True)

    module, name = parts.PARTS[part].cases.split(".")
    if module != "peers":  # which leave the GPU to PyTorch
        tell({"facts": importlib.import_module("tests.benchmarks.gpu.timing").facts()})
    found = getattr(importlib.import_module(f"tests.benchmarks.gpu.{module}"), name)
    cases.serve(functools.partial(found, sizes(small="--small" in rest)), until, tell)


if __name__ == "__main__":
    main()
