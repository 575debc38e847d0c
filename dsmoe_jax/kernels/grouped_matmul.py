"""The grouped matmul of rows sorted by expert, and its gradients: `gmm`, `gmm_transposed`, `tgmm`.

A weight is [N, K] here: [out, in] as in PyTorch. Rows beyond the sum of `group_sizes` are ignored and give zeros.
Accumulation is in fp32; fp32 operands follow `jax_default_matmul_precision`, TF32 by default on NVIDIA.
"""

import functools
import importlib
from typing import Any, Final

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.errors import DSMoEError, check_choice

_Dims = jax.lax.RaggedDotDimensionNumbers
_FWD: Final = _Dims((([1], [2]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
_DGRAD: Final = _Dims((([1], [1]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
_WGRAD: Final = _Dims((([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


@jax.named_scope("gmm")
def gmm(
    rows: Float[Array, "R K"],
    weights: Float[Array, "E N K"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str,
    out_dtype: Any = None,
) -> Float[Array, "R N"]:
    """Compute y_r = W_e x_r in `out_dtype`, by default that of the rows."""
    return _run(_FWD, rows, weights, group_sizes, implementation, out_dtype or rows.dtype)


@jax.named_scope("gmm_transposed")
def gmm_transposed(
    rows: Float[Array, "R N"],
    weights: Float[Array, "E N K"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str,
    out_dtype: Any = None,
) -> Float[Array, "R K"]:
    """Compute x_r = W_eᵀ y_r: the dgrad of `gmm`."""
    return _run(_DGRAD, rows, weights, group_sizes, implementation, out_dtype or rows.dtype)


@jax.named_scope("tgmm")
def tgmm(
    a: Float[Array, "R N"], b: Float[Array, "R K"], group_sizes: Int[Array, "E"], *, implementation: str
) -> Float[Array, "E N K"]:
    """Sum a_r b_rᵀ over each expert's rows in fp32: the wgrad of `gmm`, of its output gradients a and rows b."""
    return _run(_WGRAD, a, b, group_sizes, implementation, jnp.float32)


def available(implementation: str) -> str | None:
    """Return None if the implementation can run on the default device, or else the reason, in one line."""
    check_choice("grouped matmul", implementation, IMPLEMENTATIONS)
    platforms, modules, gpu_modules = _NEEDS[implementation]
    platform = jax.default_backend()
    if platforms and platform not in platforms:
        return f"it has no kernel for {platform!r}, only for {' and '.join(platforms)}"
    if gpu_modules and platform == "gpu" and (capability := _compute_capability()) < 8:
        return f"it needs an NVIDIA GPU of compute capability 8 (Ampere) or newer, this one has {capability}"
    for module in modules if platform != "gpu" else modules + gpu_modules:
        if reason := _import_failure(module):
            return reason
    return None


def _import_failure(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a module for another version of jax can fail in any way
        if isinstance(error, ModuleNotFoundError) and error.name == module in ("tokamax", "jax_triton"):
            return f"{module} is not installed: pip install 'dsmoe_jax[tokamax]', on Python 3.12 or newer"
        return f"{module} cannot be imported under jax {jax.__version__}: {error}"
    return None


def _compute_capability() -> float:
    """Return that of the first GPU; infinity if it is not a number, as on AMD."""
    try:
        return float(jax.local_devices()[0].compute_capability)
    except (AttributeError, ValueError):
        return float("inf")


def _run(dims: _Dims, x: Array, y: Array, group_sizes: Array, implementation: str, out_dtype: Any) -> Array:
    if reason := available(implementation):
        raise DSMoEError(f"grouped matmul {implementation!r} cannot run here: {reason}")
    if x.dtype != y.dtype:
        raise DSMoEError(f"grouped matmul operands must have one dtype, got {x.dtype} and {y.dtype}")
    # A kernel needs at least one row.
    return IMPLEMENTATIONS[implementation if len(x) else "ragged"](dims, x, y, group_sizes, out_dtype)


def _ragged(dims: _Dims, x: Array, y: Array, group_sizes: Array, out_dtype: Any) -> Array:
    """Plain XLA: fast on TPU, a masked dense matmul (E× the work) on CPU and NVIDIA."""

    def dot(x: Array, y: Array) -> Array:
        out = jax.lax.ragged_dot_general(x, y, group_sizes, dims, preferred_element_type=jnp.float32)
        return out.astype(out_dtype)

    return _mask_unused(dot, dims, x, y, group_sizes)


def _tokamax(dims: _Dims, x: Array, y: Array, group_sizes: Array, out_dtype: Any) -> Array:
    """Google's tokamax (0.0.17, tested on CPU only): tuned kernels for Ampere to Blackwell.

    Its Mosaic kernels support bf16 and fp16 only. Its XLA implementation equals `ragged`, so it is not used on GPU. For
    `gmm` it copies weights to [in, out].
    """
    tokamax = importlib.import_module("tokamax")
    # By its tables for H100, Triton is 4× as fast for wgrad, Mosaic faster otherwise.
    on_gpu = ("triton", "mosaic") if dims == _WGRAD else ("mosaic", "triton")
    kernels = on_gpu if jax.default_backend() == "gpu" else ("xla",)

    options = {"preferred_element_type": out_dtype, "implementation": kernels}
    dot = lambda x, y: tokamax.ragged_dot_general(x, y, group_sizes, dims, **options)  # noqa: E731
    return _mask_unused(dot, dims, x, y, group_sizes)


def _pallas(dims: _Dims, x: Array, y: Array, group_sizes: Array, out_dtype: Any) -> Array:
    """Our Pallas kernels; interpreted on CPU, for tests."""
    from dsmoe_jax.kernels import pallas_matmul  # slow to import

    kernel = pallas_matmul.tgmm if dims == _WGRAD else functools.partial(pallas_matmul.gmm, transposed=dims == _DGRAD)
    return kernel(x, y, group_sizes, out_dtype=out_dtype, interpret=jax.default_backend() == "cpu")


def _mask_unused(dot: Any, dims: _Dims, x: Array, y: Array, group_sizes: Array) -> Array:
    """Mask rows beyond the groups, which kernels leave undefined, add to the last group, or multiply by 0 (NaN)."""
    used = (jnp.arange(len(x)) < group_sizes.sum())[:, None]
    if dims == _WGRAD:
        return dot(jnp.where(used, x, 0), jnp.where(used, y, 0))
    return jnp.where(used, dot(x, y), 0)


IMPLEMENTATIONS: Final = {"pallas": _pallas, "tokamax": _tokamax, "ragged": _ragged}
_TRITON: Final = "jax.experimental.pallas.triton"
# fmt: off
_NEEDS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    # implementation  platforms        modules         and on GPU
    "pallas":        (("cpu", "gpu"),  (_TRITON,),     (_TRITON,)),
    "tokamax":       (("cpu", "gpu"),  ("tokamax",),   ("jax_triton",)),
    "ragged":        ((),              (),             ()),  # any platform
}
# fmt: on
