"""`python -m tests.quantization` prints the README's table: what quantising changes, and what it saves."""

import jax.numpy as jnp
import numpy as np

from dsmoe_jax.axes import Array
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.model import abstract, split
from dsmoe_jax.quantize import KINDS, SCHEMES, kind_of, quantize_params, relative_error, usage
from tests.helpers import golden

CASE = "a_baseline"
PRESET = "deepseek_moe_16b"
EXPERTS = 2  # of a stack: a tile knows nothing of the others


def random_params(config: ModelConfig) -> dict[str, Array]:
    """The weights of the first two layers, N(0, 0.02²)."""
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(0.02 * rng.standard_normal(((EXPERTS,) if len(spec.shape) == 3 else ()) + spec.shape[-2:]))
        for name, spec in abstract(config)[1].items()
        if kind_of(name) and name.startswith(("layers.0.", "layers.1."))
    }


def row(source: str, params: dict[str, Array], scheme: str, double: bool) -> str:
    """One line of the table."""
    quantized = quantize_params(params, scheme, double=double)
    error, used = relative_error(params, quantized), usage(quantized)
    bits = 8 * sum(used[kind].bytes for kind in error) / sum(used[kind].weights for kind in error)
    errors = " | ".join(f"{error[kind]:.4f}" for kind in KINDS)
    return f"| {source} | {scheme}{' twice' if double else ''} | {bits:.3f} | {errors} |"


def main() -> None:
    """Print the table."""
    columns = ("weights", "scheme", "bits", *KINDS)
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    sources = {
        f"`{CASE}`": split(golden.model(CASE))[1],
        f"N(0, 0.02²), `{PRESET}`": random_params(ModelConfig.preset(PRESET)),
    }
    for source, params in sources.items():
        for scheme in SCHEMES:
            for double in (False, True)[: 1 if scheme == "int8" else 2]:
                print(row(source, params, scheme, double))


if __name__ == "__main__":
    main()
