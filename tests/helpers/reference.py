"""The slow obvious twin: the whole model in float64 NumPy, one token, one head and one expert at a time.

Start at `forward`, then `moe`. Nothing here is shared with the model but its parameters' names and layout, [out, in].
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.model import DeepSeekMoE, abstract, assemble, split

Params = Mapping[str, np.ndarray]


@dataclasses.dataclass
class Output:
    logits: np.ndarray  # [B, T, V]
    hidden_states: list[np.ndarray]  # L + 1 of [B, T, D], the last one after the final norm
    last_before_norm: np.ndarray
    chosen: dict[int, np.ndarray]  # [B, T, A] expert ids by MoE layer


def forward(model: DeepSeekMoE, token_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Output:
    """What `model(token_ids, attention_mask, position_ids)` should return."""
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
            y, chosen[i] = moe(config, under(layer, "moe"), normal)
        else:
            y = swiglu(normal, *projections(under(layer, "mlp")), activation=config.hidden_act)
        x = x + y
        states.append(x)
    final = rms_norm(x, params["norm.weight"], config.rms_norm_eps)
    head = params["embed"] if config.tie_word_embeddings else params["head.weight"]
    return Output(final @ head.T, [*states[:-1], final], x, chosen)


def moe(config: ModelConfig, params: Params, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The MoE layer: every token alone, through each of its experts in turn."""
    experts = params["experts.gate"], params["experts.up"], params["experts.down"]
    y, chosen = np.zeros_like(x), np.zeros((*x.shape[:-1], config.num_experts_per_tok or 0), int)
    for token in np.ndindex(x.shape[:-1]):
        scores = softmax(params["router.weight"] @ x[token])
        chosen[token] = np.argsort(-scores, kind="stable")[: config.num_experts_per_tok]
        kept = scores[chosen[token]]
        if config.norm_topk_prob and len(kept) > 1:
            kept = kept / kept.sum()
        for e, weight in zip(chosen[token], kept, strict=True):
            y[token] += weight * swiglu(x[token], *(w[e] for w in experts), activation=config.hidden_act)
    if config.n_shared_experts is not None:
        y += swiglu(x, *projections(under(params, "shared")), activation=config.hidden_act)
    return y, chosen


def expert_ffn(
    rows: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray, group_sizes: Any, activation: str
) -> np.ndarray:
    """The routed experts on sorted rows: each expert takes the next `group_sizes[e]` of them, the rest are zeros."""
    out, start = np.zeros(rows.shape), 0
    for e, size in enumerate(group_sizes):
        out[start : start + size] = swiglu(rows[start : start + size], gate[e], up[e], down[e], activation)
        start += size
    return out


def expert_ffn_grads(
    rows: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    group_sizes: Any,
    activation: str,
    grad_out: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of `expert_ffn` by hand; only the activation's slope is taken numerically."""
    act, h = ACTIVATIONS[activation], 1e-6
    d_rows, d_gate, d_up, d_down = (np.zeros(array.shape) for array in (rows, gate, up, down))
    start = 0
    for e, size in enumerate(group_sizes):
        mine = slice(start, start + size)
        x, dy = rows[mine], grad_out[mine]
        g, u = x @ gate[e].T, x @ up[e].T
        d_down[e] = dy.T @ (act(g) * u)
        dg = dy @ down[e] * u * (act(g + h) - act(g - h)) / (2 * h)
        du = dy @ down[e] * act(g)
        d_gate[e], d_up[e] = dg.T @ x, du.T @ x
        d_rows[mine] = dg @ gate[e] + du @ up[e]
        start += size
    return d_rows, d_gate, d_up, d_down


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
    """q [B, T, N, H], k and v [B, S, K, H], mask [B, T, S]; each query head alone with its key-value head."""
    B, _, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros(q.shape)
    for b, head in np.ndindex(B, N):
        scores = q[b, :, head] @ k[b, :, head // group].T / math.sqrt(H)
        # The original's way to mask: a query that may read nothing reads everything alike.
        scores = np.where(mask[b], scores, np.finfo(np.float32).min)
        out[b, :, head] = softmax(scores) @ v[b, :, head // group]
    return out


def frequencies(config: ModelConfig, length: int) -> np.ndarray:
    """Angle per position of every pair, with position interpolation (linear) or NTK-aware scaling (dynamic)."""
    H, base, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    if scaling is not None and scaling.type == "dynamic" and length > config.max_position_embeddings:
        stretch = scaling.factor * length / config.max_position_embeddings - (scaling.factor - 1)
        base = base * stretch ** (H / (H - 2))
    speed = np.array([base ** (-2 * j / H) for j in range(H // 2)])
    return speed / scaling.factor if scaling is not None and scaling.type == "linear" else speed


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """x [B, T, N, H] by angles [B, T, H/2]: entry j and entry j + H/2 are a complex number, turned."""
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
    """The parameters below `prefix`, by the rest of their path."""
    return {name.removeprefix(f"{prefix}."): value for name, value in params.items() if name.startswith(f"{prefix}.")}


def projections(params: Params) -> list[np.ndarray]:
    return [params[f"{part}.weight"] for part in ("gate", "up", "down")]


def random_model(config: ModelConfig, seed: int = 0, dtype=jnp.float32) -> DeepSeekMoE:
    """A model whose every parameter matters: weights that keep the size of their input, no bias 0, no norm 1."""
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
