"""PyTorch on the same GPU: transformers' nearest native MoE at the 16B's sizes, and the grouped matmul.

Start at `transformers`. No jax, which would allocate GPU memory. The model is Qwen2-MoE (`peer_transformers`) with
random weights and `DynamicCache`, not compiled.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Final

from tests.benchmarks import plan
from tests.benchmarks.gpu import work
from tests.benchmarks.gpu.cases import Case, UnableError, turns
from tests.benchmarks.gpu.sizes import Sizes

IMPLEMENTATIONS: Final = ("grouped_mm", "batched_mm")


def transformers(sizes: Sizes) -> Iterator[Case]:
    """Yield decode and prefill, for each expert implementation of transformers."""
    torch, device = _torch(sizes)
    model = _model(sizes, torch, device)
    for implementation in IMPLEMENTATIONS:
        own = functools.partial(_decode, sizes, model, implementation)
        for rows in sizes.batches:
            name = f"decode b={rows}, {implementation}, {sizes.context} tokens cached"
            yield Case(f"transformers.decode.{implementation}.{rows}", name, functools.partial(own, rows))
        run = functools.partial(_prefill, sizes, model, implementation)
        yield Case(f"transformers.prefill.{implementation}", f"prefill 1 x {sizes.prompt}, {implementation}", run)


def torch_experts(sizes: Sizes) -> Iterator[Case]:
    """Yield the expert MLP on sorted rows by `torch.nn.functional.grouped_mm`, as in `experts`."""
    torch, device = _torch(sizes)
    tokens = sizes.expert_tokens[0]
    for skewed in (False, True):
        for name in ("forward", "both"):
            run = functools.partial(_experts, sizes, torch, device, tokens, skewed, name)
            routing, title = "skewed" if skewed else "balanced", {"both": "forward and backward"}.get(name, name)
            yield Case(f"torch_experts.{tokens}.{routing}.{name}", f"{tokens} tokens, {routing}, torch, {title}", run)


def _torch(sizes: Sizes) -> tuple[Any, str]:
    """Return PyTorch and the device; raise `UnableError` without a GPU, except in a trial."""
    import torch  # pyright: ignore[reportMissingImports]

    if torch.cuda.is_available():
        return torch, "cuda"
    if not sizes.trial:
        raise UnableError(f"torch {torch.__version__} finds no GPU")
    return torch, "cpu"


def _timed(torch: Any, run: Callable[[], Any], sizes: Sizes, **known: Any) -> dict[str, Any]:
    """Time synchronized repetitions, and return the peak memory of PyTorch."""
    on_gpu = torch.cuda.is_available()

    def waited() -> None:
        run()
        if on_gpu:
            torch.cuda.synchronize()

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = turns(waited, sizes.turn_seconds)
    return {"seconds": seconds, "peak": torch.cuda.max_memory_allocated() if on_gpu else None, **known}


def _model(sizes: Sizes, torch: Any, device: str) -> Any:
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    from tests.benchmarks.peer_transformers import qwen2_moe_config

    torch.manual_seed(plan.SEED)
    options = {"attn_implementation": "sdpa", "experts_implementation": IMPLEMENTATIONS[0]}
    with torch.device(device):
        config = qwen2_moe_config(sizes.model)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, sizes.dtype), **options).eval()


def _logits(model: Any, ids: Any, cache: Any) -> Any:
    names = inspect.signature(model.forward).parameters
    keyword = next(name for name in ("cache", "past_key_values") if name in names)  # renamed in transformers 5
    return model(ids, use_cache=True, logits_to_keep=1, **{keyword: cache}).logits[:, -1]


def _read(sizes: Sizes, model: Any, rows: int, tokens: int) -> tuple[Any, Any, Any]:
    """Return PyTorch, random ids on the model's device, and an empty cache."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import DynamicCache  # pyright: ignore[reportMissingImports]

    ids = torch.randint(sizes.model.vocab_size, (rows, tokens), device=model.device)
    return torch, ids, DynamicCache(config=model.config)


def _decode(sizes: Sizes, model: Any, implementation: str, rows: int) -> dict[str, Any]:
    """Time `steps` greedy steps from the same context, prefilled with grouped experts in all cases."""
    torch, ids, cache = _read(sizes, model, rows, sizes.context)
    config = sizes.model
    with torch.inference_mode():
        model.set_experts_implementation(IMPLEMENTATIONS[0])
        first = _logits(model, ids, cache).argmax(dim=-1)
        model.set_experts_implementation(implementation)

        def run() -> None:
            token = first
            for _ in range(sizes.steps):
                token = _logits(model, token[:, None], cache).argmax(dim=-1)
            cache.crop(-sizes.steps)

        figures = _timed(torch, run, sizes)
    held = sizes.context + (sizes.steps + 1) // 2
    bytes_of = {
        "embed" if name.endswith("embed_tokens.weight") else name: weight.numel() * weight.element_size()
        for name, weight in model.named_parameters()
    }
    moe = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    chance = work.hit_by_chance(config, rows)
    return figures | {
        "seconds": [taken / sizes.steps for taken in figures["seconds"]],
        "tokens": rows,
        "flops": work.decode_flops(config, rows, held),
        "bytes": work.decode_bytes(
            config, bytes_of, rows, held, [chance] * moe, next(model.parameters()).element_size()
        ),
        "note": f"{chance:.1f} of {config.n_routed_experts} experts a layer by chance",
    }


def _prefill(sizes: Sizes, model: Any, implementation: str) -> dict[str, Any]:
    torch, ids, _ = _read(sizes, model, 1, sizes.prompt)
    model.set_experts_implementation(implementation)
    flops = plan.flops(sizes.model, 1, sizes.prompt, head_tokens=1)
    with torch.inference_mode():
        run = lambda: _logits(model, ids, _read(sizes, model, 1, 1)[2])  # noqa: E731
        return _timed(torch, run, sizes, tokens=sizes.prompt, flops=flops)


def _experts(sizes: Sizes, torch: Any, device: str, tokens: int, skewed: bool, name: str) -> dict[str, Any]:
    from torch.nn import functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]

    if not hasattr(F, "grouped_mm"):
        raise UnableError(f"torch {torch.__version__} has no grouped_mm; needs 2.10")
    config = sizes.model
    E, D, A = config.n_routed_experts or 0, config.hidden_size, config.num_experts_per_tok or 0
    hidden, R = config.moe_intermediate_size, tokens * A
    torch.manual_seed(plan.SEED)
    draw = functools.partial(torch.randn, dtype=getattr(torch, sizes.dtype), device=device)
    x, grad = draw(R, D), draw(R, D)  # an explicit gradient: that of a sum has zero strides, which is not supported
    gate_up, down = draw(E, 2 * hidden, D) * D**-0.5, draw(E, D, hidden) * hidden**-0.5
    weights = torch.full((R,), 1 / A, device=device)
    counts = torch.from_numpy(work.group_sizes(tokens, E, A, skewed=skewed)).to(device)
    ends = torch.cumsum(counts, 0).to(torch.int32)
    inputs = [value.requires_grad_(name == "both") for value in (x, weights, gate_up, down)]

    def forward() -> Any:
        gate, up = F.grouped_mm(x, gate_up.transpose(-2, -1), offs=ends).chunk(2, dim=-1)
        middle = (F.silu(gate) * up * weights[:, None]).to(x.dtype)
        return F.grouped_mm(middle, down.transpose(-2, -1), offs=ends)

    run = (lambda: torch.autograd.grad(forward(), inputs, grad)) if name == "both" else forward
    flops = work.expert_flops(R, D, hidden, 3 if name == "both" else 1)
    return _timed(torch, run, sizes, tokens=tokens, flops=flops)
