"""Running `dsmoe` within the test process."""

from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.cli import main
from dsmoe_jax.generate import Generator


def run(*arguments: Any) -> int:
    """Return the exit code, including argparse's."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def load_once(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    """Patch `Generator.from_pretrained` to return the compiled `generator` unless called with options."""
    load = Generator.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type[Generator], path: Any, **options: Any) -> Generator:
        if options or not Path(path).is_dir():
            return load(cls, path, **options)
        generator._num_requests = 0
        return generator

    monkeypatch.setattr(Generator, "from_pretrained", classmethod(from_pretrained))
