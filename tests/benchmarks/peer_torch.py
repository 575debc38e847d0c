"""A plain PyTorch DeepSeekMoE in the style of the original code: the baseline of the benchmarks.

Start at `Twin.forward`. Modules have Hugging Face's names, so a checkpoint loads strictly. Like the original it loops
over experts: in training over all of them with masks, in inference over those with tokens, sorted.
"""

from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]

from dsmoe_jax.config import ModelConfig
from tests.benchmarks.children import Actions
from tests.benchmarks.torch_tasks import Peer, torch_actions


def actions(task: str, folder: Path) -> Actions:
    """Load a checkpoint strictly into a twin."""
    return torch_actions(task, twin_peer(load_twin(folder)), ModelConfig.from_file(folder))


def load_twin(folder: Path) -> "Twin":
    """Create a twin from a Hugging Face folder."""
    twin = Twin(ModelConfig.from_file(folder))
    twin.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return twin


def twin_peer(twin: "Twin") -> Peer:
    """Wrap the twin for `torch_tasks`."""
    return Peer(
        model=twin,
        empty_cache=lambda rows, slots: KeysValues(twin.config, rows, slots),
        last_logits=lambda ids, cache: twin(ids, cache, last_only=True)[:, -1],
        logits=twin,
    )


class KeysValues:
    """A preallocated KV cache of `slots` tokens per layer."""

    def __init__(self, config: ModelConfig, rows: int, slots: int):
        shape = (config.num_hidden_layers, 2, rows, config.num_kv_heads, slots, config.head_dim)
        self.length, self._store = 0, torch.zeros(shape)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, K, T, H]; return all keys and values so far."""
        end = self.length + k.shape[2]
        keys, values = self._store[layer]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, self.head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.groups = config.num_attention_heads // config.num_kv_heads
        self.q_proj = nn.Linear(D, D, bias=bias)
        self.k_proj = nn.Linear(D, D // self.groups, bias=bias)
        self.v_proj = nn.Linear(D, D // self.groups, bias=bias)
        self.o_proj = nn.Linear(D, D, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeysValues | None, layer: int) -> Tensor:
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        if self.groups > 1:
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        # A single token attends to all keys; several tokens are always a prefill.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.n_routed_experts is not None
        assert config.num_experts_per_tok is not None
        self.kept = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob and self.kept > 1
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and ids of the top-k experts, [M, K] each."""
        weights, ids = F.linear(x, self.weight).softmax(dim=-1).topk(self.kept, dim=-1, sorted=False)
        return (weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) if self.normalise else weights), ids


class MoE(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, width = config.hidden_size, config.moe_intermediate_size
        self.gate = Gate(config)
        self.experts = nn.ModuleList([MLP(D, width) for _ in range(config.n_routed_experts or 0)])
        shared = config.n_shared_experts
        self.shared_experts = MLP(D, shared * width) if shared else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = x_BTD.flatten(0, 1)
        weights, ids = self.gate(x)
        y = (self._all_experts if self.training else self._hit_experts)(x, weights, ids)
        y = y if self.shared_experts is None else y + self.shared_experts(x)
        return y.view_as(x_BTD)

    def _all_experts(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Training: tokens are repeated per expert; an expert without tokens gets a zero gradient."""
        repeated, flat = x.repeat_interleave(ids.shape[1], dim=0), ids.flatten()
        y = torch.empty_like(repeated)
        for e, expert in enumerate(self.experts):
            mine = flat == e
            y[mine] = expert(repeated[mine])
        return (y.unflatten(0, ids.shape) * weights[..., None]).sum(dim=1)

    @torch.no_grad()
    def _hit_experts(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Inference: pairs sorted by expert; weighted outputs are added to their tokens."""
        order = ids.flatten().argsort()
        tokens, flat_weights = order // ids.shape[1], weights.flatten()
        y, start = torch.zeros_like(x), 0
        for e, count in enumerate(ids.flatten().bincount(minlength=len(self.experts)).tolist()):
            if count:
                mine = order[start : start + count]
                token = tokens[start : start + count]
                y.index_add_(0, token, self.experts[e](x[token]).mul_(flat_weights[mine, None]))
            start += count
        return y


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.layer = layer
        self.self_attn = Attention(config)
        self.mlp = MoE(config) if config.is_moe_layer(layer) else MLP(D, config.intermediate_size)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, eps), RMSNorm(D, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeysValues | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, self.layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Twin(nn.Module):
    """The model; RoPE scaling, other activations and tied heads are not supported."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.rope_scaling is None
        assert config.hidden_act == "silu"
        assert not config.tie_word_embeddings
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, cache: KeysValues | None = None, *, last_only: bool = False) -> Tensor:
        """Compute logits [B, T, V], or [B, 1, V] of the last position.

        With a cache, T is 1, or the cache is empty.
        """
        start = 0 if cache is None else cache.length
        x = self.model.embed_tokens(ids)
        cos, sin = self._rotation(start, ids.shape[1])
        for block in self.model.layers:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.lm_head(self.model.norm(x[:, -1:] if last_only else x))

    def _rotation(self, start: int, tokens: int) -> tuple[Tensor, Tensor]:
        H = self.config.head_dim
        frequency = self.config.rope_theta ** (-torch.arange(0, H, 2, dtype=torch.float32) / H)
        angle = torch.arange(start, start + tokens, dtype=torch.float32)[:, None] * frequency[None, :]
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()
