"""An independent DeepSeekMoE v1 in plain PyTorch, with the module names of Hugging Face checkpoints.

Start at `TorchModel.forward`. Eager, float32, inference only, built from the raw fields of `config.json`. It imports
nothing from `dsmoe_jax`, so it cannot share its mistakes.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]

Config = Mapping[str, Any]


class TorchModel(nn.Module):
    """`load_state_dict(tensors, strict=True)` takes exactly the tensors of a Hugging Face checkpoint of `config`.

    A field that is missing from `config` is a KeyError: a checkpoint must not lean on a reader's defaults.
    """

    def __init__(self, config: Config):
        super().__init__()
        if config["model_type"] != "deepseek" or config["scoring_func"] != "softmax":
            raise ValueError(f"not a DeepSeekMoE v1: {config['model_type']}, scoring_func {config['scoring_func']}")
        self.config = config
        self.model = Decoder(config)
        # A tied head is stored once, as the embedding.
        tied = config["tie_word_embeddings"]
        self.lm_head = None if tied else nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [B, T, V] of ids [B, T] without padding, from position 0."""
        cos, sin = rotation(self.config, length=ids.shape[1])
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        x = self.model.norm(x)
        return F.linear(x, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)


class Decoder(nn.Module):
    """The decoder without the head, `model` in a checkpoint."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config["num_hidden_layers"])])
        self.norm = RMSNorm(config)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        is_moe = (
            config["n_routed_experts"] is not None
            and index >= config["first_k_dense_replace"]
            and index % config["moe_layer_freq"] == 0
        )
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MoE(config) if is_moe else SwiGLU(config, config["intermediate_size"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class RMSNorm(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.eps = config["rms_norm_eps"]
        self.weight = nn.Parameter(torch.empty(config["hidden_size"]))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    """Causal attention; key-value head h serves query heads h * groups to (h + 1) * groups - 1."""

    def __init__(self, config: Config):
        super().__init__()
        D, heads, bias = config["hidden_size"], config["num_attention_heads"], config["attention_bias"]
        kv_heads = heads if config["num_key_value_heads"] is None else config["num_key_value_heads"]
        self.head_dim = D // heads
        self.groups = heads // kv_heads
        self.q_proj = nn.Linear(D, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(D, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(D, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, D, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = rotate(self.by_head(self.q_proj(x)), cos, sin)
        k = rotate(self.by_head(self.k_proj(x)), cos, sin).repeat_interleave(self.groups, dim=1)
        v = self.by_head(self.v_proj(x)).repeat_interleave(self.groups, dim=1)
        scores = q @ k.transpose(-1, -2) / self.head_dim**0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(diagonal=1)
        weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))

    def by_head(self, x: Tensor) -> Tensor:
        """Reshape [B, T, heads * head_dim] to [B, heads, T, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def rotation(config: Config, length: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [T, head_dim] of the angles; the second half repeats the first."""
    width = config["hidden_size"] // config["num_attention_heads"]
    base, positions = config["rope_theta"], torch.arange(length, dtype=torch.float32)
    if (scaling := config["rope_scaling"]) is not None:
        kind, factor, trained = scaling["type"], scaling["factor"], config["max_position_embeddings"]
        if kind == "linear":
            positions = positions / factor
        elif kind == "dynamic":
            if length > trained:
                base = base * (factor * length / trained - (factor - 1)) ** (width / (width - 2))
        else:
            raise ValueError(f"rope_scaling.type {kind!r} does not exist in v1")
    frequencies = 1 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate elements j and j + head_dim / 2 of a head as a pair."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# By transformers' names: "gelu" is exact, the other two are its tanh approximation.
ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class SwiGLU(nn.Module):
    """A dense feed-forward, a routed expert, or the fused shared experts."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        D = config["hidden_size"]
        self.activation = ACTIVATIONS[config["hidden_act"]]
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """The router; top-k weights are normalized only with `norm_topk_prob` and k > 1."""

    def __init__(self, config: Config):
        super().__init__()
        self.k = config["num_experts_per_tok"]
        self.normalize = config["norm_topk_prob"] and self.k > 1
        self.weight = nn.Parameter(torch.empty(config["n_routed_experts"], config["hidden_size"]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and ids [tokens, k] of the top-k experts."""
        weights, ids = F.linear(x, self.weight).softmax(dim=-1).topk(self.k, dim=-1)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights, ids


class MoE(nn.Module):
    """The weighted sum of the routed experts, plus the shared experts if any."""

    def __init__(self, config: Config):
        super().__init__()
        width, shared = config["moe_intermediate_size"], config["n_shared_experts"]
        self.gate = Gate(config)
        self.experts = nn.ModuleList([SwiGLU(config, width) for _ in range(config["n_routed_experts"])])
        self.shared_experts = None if shared is None else SwiGLU(config, shared * width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = x_BTD.flatten(0, 1)
        weights, ids = self.gate(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            y[token] += weights[token, choice, None] * expert(x[token])
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y.view_as(x_BTD)
