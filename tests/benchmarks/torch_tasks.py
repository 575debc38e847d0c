"""The tasks for PyTorch models. Start at `torch_actions`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]

from dsmoe_jax.config import ModelConfig
from tests.benchmarks import plan
from tests.benchmarks.children import Actions
from tests.benchmarks.inputs import batch
from tests.benchmarks.timing import seconds


class Peer(NamedTuple):
    """A model and its functions."""

    model: nn.Module
    empty_cache: Callable[[int, int], Any]  # (rows, slots) -> a cache
    last_logits: Callable[[Tensor, Any], Tensor]  # (ids [B, T], cache, updated in place) -> [B, V]
    logits: Callable[[Tensor], Tensor]  # ids [B, T] -> [B, T, V]


def torch_actions(task: str, peer: Peer, config: ModelConfig) -> Actions:
    """Return the actions of a child with a PyTorch model."""
    tasks: dict[str, Callable[[Peer, ModelConfig], Actions]] = {
        "check": lambda peer, config: {
            "training logits": lambda ids: training_logits(peer, ids),
            "decoded logits": lambda ids: decoded_logits(peer, ids),
        },
        "prefill": _prefill_actions,
        "decode1": lambda peer, config: _decode_actions(peer, config, 1),
        "decode8": lambda peer, config: _decode_actions(peer, config, 8),
        "train": _train_actions,
    }
    return tasks[task](peer, config)


def training_logits(peer: Peer, ids: np.ndarray) -> np.ndarray:
    """Compute logits [B, T, V] by the training path."""
    peer.model.train()
    with torch.no_grad():
        return peer.logits(_tensor(ids)).numpy()


@torch.inference_mode()
def decoded_logits(peer: Peer, ids: np.ndarray) -> np.ndarray:
    """Compute logits [B, T/2 + 1, V], decoding the second half of the tokens one by one with a cache."""
    peer.model.eval()
    tokens, half = _tensor(ids), ids.shape[1] // 2
    cache = peer.empty_cache(*ids.shape)
    steps = [tokens[:, :half], *tokens[:, half:].split(1, dim=1)]
    return torch.stack([peer.last_logits(step, cache) for step in steps], dim=1).numpy()


def _prefill_actions(peer: Peer, config: ModelConfig) -> Actions:
    peer.model.eval()
    ids = _tensor(batch(config, 1, plan.PREFILL_TOKENS))

    @torch.inference_mode()
    def run() -> float:
        return seconds(lambda: peer.last_logits(ids, peer.empty_cache(1, plan.PREFILL_TOKENS)))

    return {"run": run}


def _decode_actions(peer: Peer, config: ModelConfig, rows: int) -> Actions:
    peer.model.eval()
    ids = _tensor(batch(config, rows, plan.PROMPT))

    def start() -> tuple[Tensor, Any]:
        cache = peer.empty_cache(rows, plan.PROMPT + plan.NEW_TOKENS)
        return peer.last_logits(ids, cache).argmax(dim=-1), cache

    def generate(token: Tensor, cache: Any) -> list[list[int]]:
        answer = [token.tolist()]
        for _ in range(plan.NEW_TOKENS):
            token = peer.last_logits(token[:, None], cache).argmax(dim=-1)
            answer.append(token.tolist())
        return answer

    @torch.inference_mode()
    def run() -> float:
        begun = start()
        return seconds(lambda: generate(*begun))

    @torch.inference_mode()
    def tokens() -> list[list[int]]:
        return generate(*start())

    return {"run": run, "tokens": tokens}


def _train_actions(peer: Peer, config: ModelConfig) -> Actions:
    peer.model.train()
    ids = _tensor(batch(config, *plan.TRAIN_SHAPE))
    optimizer = torch.optim.AdamW(
        peer.model.parameters(), lr=plan.LEARNING_RATE, weight_decay=plan.WEIGHT_DECAY, fused=True
    )
    losses: list[float] = []

    def work() -> None:
        loss = F.cross_entropy(peer.logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    return {"run": lambda: seconds(work), "losses": lambda: losses}


def _tensor(ids: np.ndarray) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64))
