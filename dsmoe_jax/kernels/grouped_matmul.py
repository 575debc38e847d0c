"""The grouped matmul on rows sorted by expert, in the three legs that a matmul and its gradients need.

Start at `gmm`, `gmm_transposed` and `tgmm`; `available` says which `IMPLEMENTATIONS` can run here. A weight is [N, K]
here, [out, in] as PyTorch keeps it: F and D, or D and F (not heads). The first `group_sizes[0]` rows are expert 0's,
and so on. Rows beyond the sum of `group_sizes` give zeros and count for nothing, whatever they hold. Products are
summed in fp32; fp32 operands follow `jax_default_matmul_precision`, whose default on NVIDIA is TF32. The legs are not
promised to be differentiable: each is the gradient of another, for a custom VJP to combine.
"""

import importlib
from typing import Any, Final

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Float, Int

_Dims = jax.lax.RaggedDotDimensionNumbers
_FORWARD: Final = _Dims((([1], [2]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
_ROWS: Final = _Dims((([1], [1]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
_WEIGHTS: Final = _Dims((([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


@jax.named_scope("gmm")
def gmm(
    rows: Float[Array, "R K"],
    weights: Float[Array, "E N K"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str,
    out_dtype: Any = None,
) -> Float[Array, "R N"]:
    """y_r = W_e x_r, in `out_dtype`, by default that of the rows.

    Raises `ValueError` for an implementation that does not exist or cannot run here, and for operands of two dtypes.
    """
    return _run(_FORWARD, rows, weights, group_sizes, implementation, out_dtype or rows.dtype)


@jax.named_scope("gmm_transposed")
def gmm_transposed(
    rows: Float[Array, "R N"],
    weights: Float[Array, "E N K"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str,
    out_dtype: Any = None,
) -> Float[Array, "R K"]:
    """x_r = W_eᵀ y_r: the gradient of `gmm` by its rows. Raises as `gmm` does."""
    return _run(_ROWS, rows, weights, group_sizes, implementation, out_dtype or rows.dtype)


@jax.named_scope("tgmm")
def tgmm(
    a: Float[Array, "R N"], b: Float[Array, "R K"], group_sizes: Int[Array, "E"], *, implementation: str
) -> Float[Array, "E N K"]:
    """The sum of a_r b_rᵀ over each expert's rows, in fp32: the gradient of `gmm` by its weights.

    `a` holds the gradients of its results, `b` its rows. Raises as `gmm` does.
    """
    return _run(_WEIGHTS, a, b, group_sizes, implementation, jnp.float32)


def available(implementation: str) -> str | None:
    """None where the implementation can run on this process's default device, otherwise why not, in one line.

    Raises `ValueError` for an implementation that does not exist.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"grouped matmul {implementation!r} does not exist, only {', '.join(IMPLEMENTATIONS)}")
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
    except Exception as error:  # built for another jax, a module fails with whatever it misses first
        if isinstance(error, ModuleNotFoundError) and error.name == module in ("tokamax", "jax_triton"):
            return f"{module} is not installed: pip install 'dsmoe_jax[tokamax]', on Python 3.12 or newer"
        return f"{module} cannot be imported under jax {jax.__version__}: {error}"
    return None


def _compute_capability() -> float:
    """That of the first GPU; infinite where the device has none to tell (an AMD GPU's is a name)."""
    try:
        return float(jax.local_devices()[0].compute_capability)
    except (AttributeError, ValueError):
        return float("inf")


def _run(dims: _Dims, x: Array, y: Array, group_sizes: Array, implementation: str, out_dtype: Any) -> Array:
    if reason := available(implementation):
        raise ValueError(f"grouped matmul {implementation!r} cannot run here: {reason}")
    if x.dtype != y.dtype:
        raise ValueError(f"a grouped matmul takes operands of one dtype, not {x.dtype} and {y.dtype}")
    if not len(x):
        implementation = "ragged"  # a kernel cannot be launched over nothing
    return IMPLEMENTATIONS[implementation](dims, x, y, group_sizes, out_dtype)


def _ragged(dims: _Dims, x: Array, y: Array, group_sizes: Array, out_dtype: Any) -> Array:
    """Plain XLA: fast on TPU, a masked dense matmul (E× the work) on CPU and NVIDIA."""

    def dot(x: Array, y: Array) -> Array:
        out = jax.lax.ragged_dot_general(x, y, group_sizes, dims, preferred_element_type=jnp.float32)
        return out.astype(out_dtype)

    return _without_strays(dot, dims, x, y, group_sizes)


def _tokamax(dims: _Dims, x: Array, y: Array, group_sizes: Array, out_dtype: Any) -> Array:
    """Google's tokamax: kernels for Ampere to Blackwell and tables of their tuning (0.0.17 was read, and tried on CPU).

    Its Mosaic kernels take bf16 and fp16 only. On GPU never its plain XLA, which is `ragged` under another name. It
    takes weights as [in, out] and transposes ours in memory for `gmm`; `gmm_transposed` and `tgmm` need no copy.
    """
    tokamax = importlib.import_module("tokamax")
    # By its own tables on H100 Triton is four times as fast for weight gradients, and Mosaic the better otherwise.
    on_gpu = ("triton", "mosaic") if dims == _WEIGHTS else ("mosaic", "triton")
    kernels = on_gpu if jax.default_backend() == "gpu" else ("xla",)

    def dot(x: Array, y: Array) -> Array:
        return tokamax.ragged_dot_general(
            x, y, group_sizes, dims, preferred_element_type=out_dtype, implementation=kernels
        )

    return _without_strays(dot, dims, x, y, group_sizes)


def _pallas(dims: _Dims, x: Array, y: Array, group_sizes: Array, out_dtype: Any) -> Array:
    """Our own kernels; on CPU interpreted, for tests."""
    from dsmoe_jax.kernels import pallas_matmul  # see there why only now

    interpret = jax.default_backend() == "cpu"
    if dims == _WEIGHTS:
        return pallas_matmul.tgmm(x, y, group_sizes, out_dtype=out_dtype, interpret=interpret)
    transposed = dims == _ROWS
    return pallas_matmul.gmm(x, y, group_sizes, transposed=transposed, out_dtype=out_dtype, interpret=interpret)


def _without_strays(dot: Any, dims: _Dims, x: Array, y: Array, group_sizes: Array) -> Array:
    """`dot`, for kernels that leave rows beyond the groups undefined, or let them into the last group's sum.

    tokamax on H100 multiplies strangers by a zero mask, and NaN × 0 is NaN.
    """
    mine = (jnp.arange(len(x)) < group_sizes.sum())[:, None]
    if dims == _WEIGHTS:
        return dot(jnp.where(mine, x, 0), jnp.where(mine, y, 0))
    return jnp.where(mine, dot(x, y), 0)


IMPLEMENTATIONS: Final = {"pallas": _pallas, "tokamax": _tokamax, "ragged": _ragged}
_TRITON: Final = "jax.experimental.pallas.triton"
# fmt: off
_NEEDS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    # implementation  runs on          modules         and on a GPU
    "pallas":        (("cpu", "gpu"),  (_TRITON,),     (_TRITON,)),
    "tokamax":       (("cpu", "gpu"),  ("tokamax",),   ("jax_triton",)),
    "ragged":        ((),              (),             ()),  # wherever XLA does
}
# fmt: on
