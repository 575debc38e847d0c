"""Slow reference of the model in float64 NumPy, one token, head and expert at a time.

Start at `forward` and `moe`, for the kernels at `expert_ffn` and `dense`. It shares only the parameters' names and
layout, [out, in], with the model.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kernels.operand import LowRank, Quantized
from dsmoe_jax.layers.ablation import Ablation
from dsmoe_jax.model import DeepSeekMoE, abstract, assemble, split

Params = Mapping[str, np.ndarray]

NO_ABLATION = Ablation()

TILE = 10  # of 4-bit operands; divides no row or expert of the tests


@dataclasses.dataclass
class Output:
    logits: np.ndarray  # [B, T, V]
    hidden_states: list[np.ndarray]  # L + 1 of [B, T, D], the last after the final norm
    last_before_norm: np.ndarray
    chosen: dict[int, np.ndarray]  # [B, T, A] expert ids by MoE layer


def forward(
    model: DeepSeekMoE,
    token_ids: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    ablation: Ablation = NO_ABLATION,
) -> Output:
    """Return the expected output of `model(token_ids, attention_mask, position_ids, ablation=ablation)`."""
    config = model.config
    params = {name: np.asarray(value, np.float64) for name, value in split(model)[1].items()}
    ids = np.asarray(token_ids)
    T = ids.shape[1]
    positions = np.broadcast_to(np.arange(T), ids.shape) if position_ids is None else np.asarray(position_ids)
    real = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    mask = np.tril(np.ones((T, T), bool)) & real[:, None, :]
    angles = positions[:, :, None] * frequencies(config, length=T)

    x = params["embed"][ids]
    states, chosen = [x], {}
    for i in range(config.num_hidden_layers):
        layer = under(params, f"layers.{i}")
        normal = rms_norm(x, layer["attention_norm.weight"], config.rms_norm_eps)
        x = x + self_attention(config, under(layer, "attention"), normal, angles, mask)
        normal = rms_norm(x, layer["ffn_norm.weight"], config.rms_norm_eps)
        if config.is_moe_layer(i):
            y, chosen[i] = moe(config, under(layer, "moe"), normal, ids, i, ablation)
        else:
            y = swiglu(normal, *projections(under(layer, "mlp")), activation=config.hidden_act)
        x = x + y
        states.append(x)
    final = rms_norm(x, params["norm.weight"], config.rms_norm_eps)
    head = params["embed"] if config.tie_word_embeddings else params["head.weight"]
    return Output(final @ head.T, [*states[:-1], final], x, chosen)


def moe(
    config: ModelConfig,
    params: Params,
    x: np.ndarray,
    token_ids: np.ndarray,
    layer: int,
    ablation: Ablation = NO_ABLATION,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the MoE layer, one token and expert at a time."""
    experts = params["experts.gate"], params["experts.up"], params["experts.down"]
    active = ablation.active or (config.num_experts_per_tok or 0) + (not ablation.shared)
    every = ablation.disabled
    disabled = every.get(layer, ()) if isinstance(every, Mapping) else every
    y, chosen = np.zeros_like(x), np.zeros((*x.shape[:-1], active), int)
    for token in np.ndindex(x.shape[:-1]):
        if config.hash_routing:
            chosen[token], kept = murmur(int(token_ids[token]), layer) % (config.n_routed_experts or 1), np.ones(1)
        else:
            scores = softmax(params["router.weight"] @ x[token])
            ranked = [e for e in np.argsort(-scores, kind="stable") if e not in disabled]
            chosen[token] = ranked[ablation.disable_top :][:active]
            kept = scores[chosen[token]]
        if config.norm_topk_prob and config.num_experts_per_tok != 1:
            kept = kept / kept.sum()
        for e, weight in zip(chosen[token], kept, strict=True):
            y[token] += weight * swiglu(x[token], *(w[e] for w in experts), activation=config.hidden_act)
    if config.n_shared_experts is not None and ablation.shared:
        y += swiglu(x, *projections(under(params, "shared")), activation=config.hidden_act)
    return y, chosen


def murmur(token: int, layer: int) -> int:
    """Return the hash of a token in a layer: the finalizer of MurmurHash3."""
    x = (token + layer * 0x9E3779B9) & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def expert_ffn(
    rows: np.ndarray,
    weights: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    group_sizes: Any,
    activation: str,
) -> np.ndarray:
    """Compute the routed experts on sorted rows, `group_sizes[e]` for each expert; further rows are zero."""
    out, start = np.zeros(rows.shape), 0
    for e, size in enumerate(group_sizes):
        mine = slice(start, start + size)
        out[mine] = weights[mine, None] * swiglu(rows[mine], gate[e], up[e], down[e], activation)
        start += size
    return out


def expert_ffn_grads(
    rows: np.ndarray,
    weights: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    group_sizes: Any,
    activation: str,
    grad_out: np.ndarray,
) -> list[np.ndarray]:
    """Compute the gradients of `expert_ffn` by hand, the activation's numerically."""
    act, h = ACTIVATIONS[activation], 1e-6
    grads = [np.zeros(array.shape) for array in (rows, weights, gate, up, down)]
    d_rows, d_weights, d_gate, d_up, d_down = grads
    start = 0
    for e, size in enumerate(group_sizes):
        mine = slice(start, start + size)
        x, dy = rows[mine], weights[mine, None] * grad_out[mine]
        g, u = x @ gate[e].T, x @ up[e].T
        d_weights[mine] = (grad_out[mine] * swiglu(x, gate[e], up[e], down[e], activation)).sum(axis=1)
        d_down[e] = dy.T @ (act(g) * u)
        dg = dy @ down[e] * u * (act(g + h) - act(g - h)) / (2 * h)
        du = dy @ down[e] * act(g)
        d_gate[e], d_up[e] = dg.T @ x, du.T @ x
        d_rows[mine] = dg @ gate[e] + du @ up[e]
        start += size
    return grads


def dense(operand: Any) -> np.ndarray:
    """Return the weights [E, O, I] of a dense, quantized or low-rank operand."""
    if hasattr(operand, "base"):
        a, b = np.asarray(operand.a, np.float64), np.asarray(operand.b, np.float64)
        return dense(operand.base) + np.stack([b[e] @ a[e] for e in range(len(a))])
    return dequantize(operand) if hasattr(operand, "codes") else np.asarray(operand, np.float64)


def dequantize(quantized: Any) -> np.ndarray:
    """Dequantize a `Quantized` of all experts, one code at a time."""
    scales, units = dense(quantized.scales), unscaled(quantized)
    values = np.zeros(units.shape)
    for e in range(len(units)):
        for n, unit in enumerate(units[e].flat):
            values[e].flat[n] = unit * scales[e].flat[n // quantized.tile]
            if quantized.offset is not None:
                values[e].flat[n] += float(quantized.offset[e])
    return values


def unscaled(quantized: Any) -> np.ndarray:
    """Return the unscaled values of the codes of a `Quantized`."""
    codes, codebook = np.asarray(quantized.codes), quantized.codebook
    if codebook is None:
        return codes.astype(np.float64)
    numbers = codes.ravel().tolist()
    if len(codebook) == 16:
        numbers = [half for byte in numbers for half in divmod(byte, 16)]
    return np.array([codebook[number] for number in numbers], np.float64).reshape(*codes.shape[:-1], -1)


def operand_grads(name: str, operand: Any, grad: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gradients of an operand's float leaves by path, from the gradient of its dense weights."""
    if hasattr(operand, "base"):
        a, b = np.asarray(operand.a, np.float64), np.asarray(operand.b, np.float64)
        return operand_grads(f"{name}.base", operand.base, grad) | {
            f"{name}.a": np.stack([b[e].T @ grad[e] for e in range(len(grad))]),
            f"{name}.b": np.stack([grad[e] @ a[e].T for e in range(len(grad))]),
        }
    if not hasattr(operand, "codes"):
        return {name: grad}
    units, of_scales = unscaled(operand), np.zeros(dense(operand.scales).shape)
    for e in range(len(units)):
        for n, unit in enumerate(units[e].flat):
            of_scales[e].flat[n // operand.tile] += unit * grad[e].flat[n]
    of_offset = {} if operand.offset is None else {f"{name}.offset": np.array([one.sum() for one in grad])}
    return operand_grads(f"{name}.scales", operand.scales, of_scales) | of_offset


def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray, activation: str) -> np.ndarray:
    return (ACTIVATIONS[activation](x @ gate.T) * (x @ up.T)) @ down.T


def self_attention(
    config: ModelConfig, params: Params, x: np.ndarray, angles: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    B, T, _ = x.shape
    q, k, v = (linear(under(params, part), x).reshape(B, T, -1, config.head_dim) for part in "qkv")
    out = attention(rotate(q, angles), rotate(k, angles), v, mask)
    return linear(under(params, "o"), out.reshape(B, T, -1))


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Attend with q [B, T, N, H], k and v [B, S, K, H] and mask [B, T, S], one query head at a time."""
    B, _, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros(q.shape)
    for b, head in np.ndindex(B, N):
        scores = q[b, :, head] @ k[b, :, head // group].T / math.sqrt(H)
        # As in the original, a fully masked query attends uniformly.
        scores = np.where(mask[b], scores, np.finfo(np.float32).min)
        out[b, :, head] = softmax(scores) @ v[b, :, head // group]
    return out


def frequencies(config: ModelConfig, length: int) -> np.ndarray:
    """Return the RoPE angles, with position interpolation (linear) or NTK-aware scaling (dynamic)."""
    H, base, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    if scaling is not None and scaling.type == "dynamic" and length > config.max_position_embeddings:
        stretch = scaling.factor * length / config.max_position_embeddings - (scaling.factor - 1)
        base = base * stretch ** (H / (H - 2))
    speed = np.array([base ** (-2 * j / H) for j in range(H // 2)])
    return speed / scaling.factor if scaling is not None and scaling.type == "linear" else speed


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotate x [B, T, N, H] by angles [B, T, H/2]; entries j and j + H/2 are a complex number."""
    real, imaginary = np.split(x, 2, axis=-1)
    turned = (real + 1j * imaginary) * np.exp(1j * angles)[:, :, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def linear(params: Params, x: np.ndarray) -> np.ndarray:
    return x @ params["weight"].T + params.get("bias", 0)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}


def under(params: Params, prefix: str) -> dict[str, np.ndarray]:
    """Return the parameters below `prefix`, by the rest of their path."""
    return {name.removeprefix(f"{prefix}."): value for name, value in params.items() if name.startswith(f"{prefix}.")}


def projections(params: Params) -> list[np.ndarray]:
    return [params[f"{part}.weight"] for part in ("gate", "up", "down")]


def random_model(config: ModelConfig, seed: int = 0, dtype=jnp.float32) -> DeepSeekMoE:
    """Return a model in which every parameter matters: weights preserve the rms, no bias is 0, no norm 1."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, spec in abstract(config)[1].items():
        values = rng.normal(size=spec.shape)
        if spec.initializer.kind == "constant":
            values = spec.initializer.scale + 0.3 * values
        elif name != "embed":
            values = values / math.sqrt(spec.shape[-1])
        params[name] = jnp.asarray(values, dtype)
    return assemble(config, params)


def random_operand(kind: str, shape: tuple[int, int, int], rng: np.random.Generator, dtype: Any = jnp.float32) -> Any:
    """Return an operand [E, O, I] of this kind that preserves the rms; `dtype` is for dense weights."""
    experts, out, into = shape
    size, tiles = 1 / math.sqrt(into), math.ceil(out * into / TILE)
    match kind.split(" over "):
        case ["dense"]:
            return jnp.asarray(size * rng.normal(size=shape), dtype)
        case ["int8"]:  # one scale per output
            scales = jnp.asarray(size * rng.uniform(0.01, 0.03, (experts, out, 1)), jnp.float32)
            return Quantized(jnp.asarray(rng.integers(-128, 128, shape), jnp.int8), scales, tile=into)
        case ["4-bit" | "double" as kind]:  # tiles may span rows; the last may be short
            scales = jnp.asarray(size * rng.uniform(1, 3, (experts, tiles)), jnp.float32)
            if kind == "double":
                scales = Quantized(
                    jnp.asarray(rng.integers(0, 256, (experts, tiles)), jnp.uint8),
                    jnp.asarray(size * rng.uniform(0.5, 1, (experts, math.ceil(tiles / 4))), jnp.float32),
                    offset=jnp.asarray(size * rng.uniform(1.5, 2, experts), jnp.float32),
                    tile=4,
                    codebook=tuple(np.linspace(-1, 1, 256).tolist()),
                )
            codes = jnp.asarray(rng.integers(0, 256, (experts, out, into // 2)), jnp.uint8)
            return Quantized(codes, scales, tile=TILE, codebook=tuple(np.linspace(-1, 1.2, 16).tolist()))
        case ["low-rank", base]:
            a, b = rng.normal(size=(experts, 3, into)), 0.5 * rng.normal(size=(experts, out, 3))
            base = random_operand(base, shape, rng, dtype)
            return LowRank(base, jnp.asarray(size * a, jnp.float32), jnp.asarray(b, jnp.float32))
    raise ValueError(f"no operand of kind {kind!r}")


def encode(
    values: np.ndarray, codebook: tuple[float, ...], tile: int, largest: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize fp32 values, one tile and one value at a time; returns the codes' values and scales."""
    units, scales = [], []
    for start in range(0, len(values), tile):
        scales.append(np.abs(values[start : start + tile]).max() * np.float32(1 / largest))
        for value in values[start : start + tile]:
            unit = value * (np.float32(1) / scales[-1]) if scales[-1] else np.float32(0)
            units.append(min(codebook, key=lambda known, unit=unit: abs(float(unit) - known)))
    return np.array(units), np.array(scales)
