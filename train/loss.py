"""Training losses: next-token cross-entropy, from logits or fused with the output projection, and load balancing."""

import functools
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.layers.router import Routing
from dsmoe_jax.sharding import BATCH_AXES, TENSOR, current_mesh

IGNORED: Final = -100  # label without a loss
_CHUNK_BYTES: Final = 64 << 20  # of a device's fp32 logits


def cross_entropy(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
    """Compute the mean next-token cross-entropy in nats.

    Labels are shifted instead of logits, and targets selected by comparison: no copy of [B, T, V] in either pass.

    Args:
        logits: float [B, T, V], any dtype.
        labels: int [B, T], the token ids (not shifted); -100 is ignored.

    Returns:
        The mean over all targets, fp32.
    """
    logits = logits.astype(jnp.float32)
    targets = shift_labels(labels)
    counted = targets != IGNORED
    is_target = targets[:, :, None] == jnp.arange(logits.shape[-1])[None, None, :]
    picked = jnp.where(is_target, logits, 0).sum(axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.where(counted, losses, 0).sum() / counted.sum()


def shift_labels(labels: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the label of the next token at each position, -100 at the last."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)


class CrossEntropySums(NamedTuple):
    """Sums over all targets; only `total` is differentiable."""

    total: Float[Array, ""]  # Σ cross-entropy + z_loss · logsumexp²
    cross_entropy: Float[Array, ""]  # Σ cross-entropy


def chunk_tokens(tokens: int, vocab_size: int) -> int:
    """Return the tokens whose logits exist at once on a device with `vocab_size` rows of the head."""
    return min(tokens, max(1, _CHUNK_BYTES // (4 * vocab_size)))


def chunked_cross_entropy(
    states: Float[Array, "B T D"], head: Float[Array, "V D"], targets: Int[Array, "B T"], *, z_loss: float = 0.0
) -> CrossEntropySums:
    """Compute output projection and cross-entropy of shifted labels, fused in chunks of tokens.

    The forward pass computes the gradient from the same fp32 logits. `z_loss` weights logsumexp² (PaLM, arXiv
    2204.02311, section 5). On a mesh each device processes its tokens and its shard of the vocabulary.
    """
    mesh = current_mesh()
    if mesh is None:
        return _chunked(states, head, targets, z_loss, None)
    over = TENSOR if head.shape[0] % mesh.shape[TENSOR] == 0 else None

    def local(states, head, targets):
        # Each copy has a partial gradient; these casts make autodiff sum them.
        states = jax.lax.pcast(states, (TENSOR,), to="varying")
        head = jax.lax.pcast(head, BATCH_AXES if over else (*BATCH_AXES, TENSOR), to="varying")
        targets = jax.lax.pcast(targets, (TENSOR,), to="varying")
        sums: Any = _chunked(states, head, targets, z_loss, over)
        # The sums are equal over the tensor axis.
        return CrossEntropySums(*(jax.lax.pmean(jax.lax.psum(x, BATCH_AXES), TENSOR) for x in sums))

    rows = PartitionSpec(BATCH_AXES)
    run = jax.shard_map(local, in_specs=(rows, PartitionSpec(over), rows), out_specs=PartitionSpec())
    return run(states, head, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked(states: Any, head: Any, targets: Any, z_loss: float, over: str | None) -> Any:
    return _sums(states, head, targets, z_loss, over, with_gradients=False)[0]


def _chunked_forward(states: Array, head: Array, targets: Array, z_loss: float, over: str | None):
    return _sums(states, head, targets, z_loss, over, with_gradients=True)


def _chunked_backward(z_loss: float, over: str | None, saved: tuple[Array, Array], grads: CrossEntropySums):
    grad_states, grad_head = saved
    scale = grads.total if over is None else jax.lax.psum(grads.total, over)
    return (grad_states * scale).astype(grad_states.dtype), (grad_head * scale).astype(grad_head.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


@jax.named_scope("head")
def _sums(states: Array, head: Array, targets: Array, z_loss: float, over: str | None, with_gradients: bool):
    """Return the sums, and the gradients of `total` with respect to states and head."""
    (B, T, D), V = states.shape, head.shape[0]
    first, M = 0 if over is None else jax.lax.axis_index(over) * V, B * T
    size = chunk_tokens(M, V)
    chunks = -(-M // size)
    pad = chunks * size - M
    x = jnp.pad(states.reshape(M, D), ((0, pad), (0, 0))).reshape(chunks, size, D)
    y = jnp.pad(targets.reshape(M), (0, pad), constant_values=IGNORED).reshape(chunks, size)

    def one(carry, chunk):
        sums, grad_head = carry
        x, y = chunk
        logits = jnp.einsum("md,vd->mv", x, head, preferred_element_type=jnp.float32)
        log_sum = _logsumexp(logits, over)
        is_target = (y[:, None] - first) == jnp.arange(V)[None, :]
        picked = jnp.where(is_target, logits, 0).sum(axis=-1)
        picked = picked if over is None else jax.lax.psum(picked, over)
        counted = y != IGNORED
        ce = jnp.where(counted, log_sum - picked, 0).sum()
        z = jnp.where(counted, z_loss * jnp.square(log_sum), 0).sum()
        sums = CrossEntropySums(sums.total + ce + z, sums.cross_entropy + ce)
        if not with_gradients:
            return (sums, grad_head), None
        scale = (1 + 2 * z_loss * log_sum)[:, None]
        grad = jnp.where(counted[:, None], jnp.exp(logits - log_sum[:, None]) * scale - is_target, 0).astype(x.dtype)
        grad_x = jnp.einsum("mv,vd->md", grad, head, preferred_element_type=jnp.float32).astype(x.dtype)
        # Transposed: XLA's matmul on CPU is twice as fast with the long dimension V last.
        grad_head = grad_head + jnp.einsum("md,mv->dv", x, grad, preferred_element_type=jnp.float32)
        return (sums, grad_head), grad_x

    zero = (states[0, 0, 0] * 0 + head[0, 0] * 0).astype(jnp.float32)  # varies over the mesh axes of both
    start = (CrossEntropySums(zero, zero), zero + jnp.zeros((D, V) if with_gradients else (), jnp.float32))
    (sums, grad_head), grad_x = jax.lax.scan(one, start, (x, y))
    if grad_x is None:
        return sums, None
    return sums, (grad_x.reshape(-1, D)[:M].reshape(B, T, D), grad_head.T.astype(head.dtype))


def _logsumexp(logits: Float[Array, "M V"], over: str | None) -> Float[Array, "M"]:
    most = jax.lax.stop_gradient(logits.max(axis=-1))
    most = most if over is None else jax.lax.pmax(most, over)
    total = jnp.exp(logits - most[:, None]).sum(axis=-1)
    return most + jnp.log(total if over is None else jax.lax.psum(total, over))


def balance_loss(
    config: ModelConfig, routing: Mapping[int, Routing], counted: Bool[Array, "B T"] | None = None
) -> dict[int, Float[Array, ""]]:
    """Compute the expert-level balance loss of each MoE layer, α · Σ_e f_e · P_e.

    See arXiv 2401.06066, eq. 12 to 14. P_e is the mean score of expert e, f_e its share of the routed tokens times E,
    without gradient; both per sequence and then averaged (`seq_aux`), or over the whole batch.

    Args:
        config: Config of the model, with α = `aux_loss_alpha`.
        routing: Router outputs by MoE layer.
        counted: Mask of the tokens that count, [B, T]; all by default, padding included, as in the original.

    Returns:
        The loss of each MoE layer.
    """

    def one(routed: Routing) -> Float[Array, ""]:
        f, P = _shares(routed, counted, by_sequence=config.seq_aux)
        losses = (f * P).sum(axis=-1)
        if counted is None or not config.seq_aux:
            return config.aux_loss_alpha * losses.mean()
        # Sequences of padding alone do not count.
        return config.aux_loss_alpha * losses.sum() / jnp.maximum(counted.any(axis=1).sum(), 1)

    return {layer: one(routed) for layer, routed in routing.items()}


def device_balance_loss(
    routing: Mapping[int, Routing], groups: int, alpha: float, counted: Bool[Array, "B T"] | None = None
) -> dict[int, Float[Array, ""]]:
    """Compute the device-level balance loss of each MoE layer, α · Σ_d f'_d · P'_d (arXiv 2401.06066, eq. 15 to 17).

    f'_d is the mean of f over a group of experts, P'_d the sum of P, both over the batch.
    """

    def one(routed: Routing) -> Float[Array, ""]:
        f, P = _shares(routed, counted, by_sequence=False)
        if groups < 1 or f.size % groups:
            raise DSMoEError(f"groups must divide {f.size} experts, got {groups}")
        return alpha * (f.reshape(groups, -1).mean(axis=1) * P.reshape(groups, -1).sum(axis=1)).sum()

    return {layer: one(routed) for layer, routed in routing.items()}


def _shares(
    routed: Routing, counted: Bool[Array, "B T"] | None, by_sequence: bool
) -> tuple[Float[Array, "sequences E"], Float[Array, "sequences E"]]:
    """Return f and P per sequence, or of the whole batch."""
    B, T, E = routed.scores.shape
    A = routed.ids.shape[-1]
    weight = jnp.ones((B, T), jnp.float32) if counted is None else counted.astype(jnp.float32)
    axes = (1,) if by_sequence else (0, 1)
    tokens = jnp.maximum(weight.sum(axis=axes), 1)[..., None]
    chosen = (jax.nn.one_hot(routed.ids, E) * weight[:, :, None, None]).sum(axis=2)
    f = jax.lax.stop_gradient(chosen.sum(axis=axes) / tokens * E / A)
    P = (routed.scores * weight[:, :, None]).sum(axis=axes) / tokens
    return jnp.atleast_2d(f), jnp.atleast_2d(P)
