"""Metrics recorded by training runs."""

from pathlib import Path

from dsmoe_jax.train.metrics import read_records


def losses(run: Path, name: str = "loss") -> dict[int, float]:
    """A metric by step; `loss` by default."""
    return {record["step"]: record[name] for record in read_records(run) if name in record}
