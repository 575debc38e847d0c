"""Which experts serve which texts: `routes`."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.experiments.charts import draw_routes, figures_folder
from dsmoe_jax.experiments.texts import check_limits, read_documents, sequences, source_names
from dsmoe_jax.generate.loading import upcast_for_cpu
from dsmoe_jax.model import DeepSeekMoE, merge, split
from dsmoe_jax.progress import Meter, silent
from dsmoe_jax.sharding import mesh_of
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.text.tokenizer import Tokenizer

JSON: Final = "routes.json"
CHART: Final = "routes.png"
_TOP: Final = 10  # tokens per expert
_RARE: Final = 8  # occurrences; the shares of rarer tokens are chance
_BATCH: Final = 4096  # tokens per call of the model


class LayerRoutes(NamedTuple):
    """The routing of a layer.

    Attributes:
        load: Share of the selections of a domain that an expert has, [domains, E]; 1/E is even.
        mutual_information: Between domain and expert, in bits, for domains of equal weight; 0: the load does not depend
            on the domain.
        load_entropy: Entropy of the load over all domains, in bits; log2 E if even.
        coactivation: Probability that a token that selects the first expert selects the second one too, [E, E].
        top_tokens: For each expert, token ids that select it in the largest share of their occurrences, and the shares;
            of tokens with at least 8 occurrences, and at least as many as half of all tokens have.
    """

    load: np.ndarray
    mutual_information: float
    load_entropy: float
    coactivation: np.ndarray
    top_tokens: list[list[tuple[int, float]]]


def routes(
    model: DeepSeekMoE,
    tokenizer: Tokenizer | None,
    data: str | Path | Sequence[str | Path],
    *,
    max_tokens: int = 65_536,
    window: int | None = None,
    out: str | Path | None = None,
    progress: Meter = silent,
) -> dict[int, LayerRoutes]:
    """Record the routing of texts, each a domain.

    Args:
        model: The model, on any devices.
        tokenizer: Required for texts.
        data: Texts or token shards.
        max_tokens: Tokens of each source.
        window: Tokens per sequence. Default: the trained context length.
        out: Folder for `routes.json` and `routes.png`.
        progress: Shows the tokens read.

    Returns:
        The routing of each MoE layer by index.

    Raises:
        DSMoEError: The model is dense, or the data cannot be read.
    """
    config = model.config
    if config.n_routed_experts is None:
        raise DSMoEError("routes needs a model with routed experts")
    check_limits(max_tokens, window, config)
    names = source_names(data)
    read = functools.partial(read_documents, vocab_size=config.vocab_size)
    texts = [read(source, tokenizer, max_tokens) for source in names]
    sizes = [sum(map(len, documents)) for documents in texts]
    folder = None if out is None else figures_folder(out)
    counts: dict[int, _Counts] = {}
    graph, params = split(model)
    params = upcast_for_cpu(params)
    with progress("routing", sum(sizes)) as advance:
        for domain, documents in enumerate(texts):
            packed = sequences(documents, window or config.context_length)
            for tokens, selected in _selections(graph, params, packed):
                for layer, experts in selected.items():
                    counter = counts.setdefault(layer, _Counts(len(names), config.n_routed_experts))
                    counter.add(domain, tokens, experts)
                advance(len(tokens))
    found = {layer: counter.summarize() for layer, counter in counts.items()}
    if folder is not None:
        write_json(folder / JSON, to_dict(found, names, sizes, tokenizer))
        stems = [Path(name).stem for name in names]
        labels = stems if len(set(stems)) == len(stems) else names
        draw_routes(folder / CHART, {layer: one.load for layer, one in found.items()}, labels)
    return found


def _selections(graph: Any, params: Mapping[str, Any], packed: np.ndarray) -> Iterator[tuple[Any, Any]]:
    """Yield the token ids of packed sequences, [n], and the selected experts of each by layer, [n, K]."""
    rows = max(1, min(len(packed), _BATCH // packed.shape[2]))
    for start in range(0, len(packed), rows):
        batch = packed[start : start + rows]
        padded = np.concatenate([batch, np.zeros((rows - len(batch), *batch.shape[1:]), np.int32)])
        token_ids, _, segment_ids, positions = padded.swapaxes(0, 1)
        with mesh_of(params):
            selected = jax.device_get(_select(graph, params, token_ids, segment_ids, positions))
        used = segment_ids > 0
        yield token_ids[used], {layer: one[used] for layer, one in selected.items()}


@functools.partial(jax.jit, static_argnums=0)
def _select(graph: Any, params: Mapping[str, Any], token_ids: Any, segment_ids: Any, positions: Any) -> dict[int, Any]:
    model = merge(graph, params)
    found = model.hidden(token_ids, segment_ids > 0, positions, segment_ids=segment_ids)
    return {layer: one.ids for layer, one in found.routing.items()}


class _Counts:
    """Counts of a layer: by domain and expert, by pair of experts, by token and expert."""

    def __init__(self, domains: int, experts: int):
        self.by_domain = np.zeros((domains, experts), np.int64)
        self.coactivation = np.zeros((experts, experts), np.int64)
        self.by_token: dict[int, np.ndarray] = {}
        self.top_k = 1

    def add(self, domain: int, tokens: np.ndarray, experts: np.ndarray) -> None:
        """Count the experts [n, K] of tokens [n]."""
        E = len(self.coactivation)
        chosen = np.zeros((len(tokens), E), np.int64)
        np.put_along_axis(chosen, experts, 1, axis=1)
        self.by_domain[domain] += chosen.sum(axis=0)
        self.coactivation += chosen.T @ chosen
        self.top_k = experts.shape[1]
        distinct, places = np.unique(tokens, return_inverse=True)
        sums = np.zeros((len(distinct), E), np.int64)
        np.add.at(sums, places, chosen)
        for token, row in zip(distinct.tolist(), sums, strict=True):
            self.by_token[token] = self.by_token.get(token, 0) + row

    def summarize(self) -> LayerRoutes:
        """Return the shares and what follows from them."""
        load = self.by_domain / self.by_domain.sum(axis=1, keepdims=True)
        mean = load.mean(axis=0)
        selected = np.diag(self.coactivation)
        coactivation = self.coactivation / np.maximum(selected, 1)[:, None]
        information = _entropy(mean) - np.mean([_entropy(row) for row in load])
        return LayerRoutes(load, float(max(0.0, information)), _entropy(mean), coactivation, self._top_tokens())

    def _top_tokens(self) -> list[list[tuple[int, float]]]:
        """Return the tokens that select each expert most often; rare ones, whose share is chance, are left out."""
        tokens, counts = np.array(list(self.by_token)), np.array(list(self.by_token.values()))
        occurrences = counts.sum(axis=1) // self.top_k
        frequent = occurrences >= max(_RARE, np.quantile(occurrences, 0.5))
        tokens, shares = tokens[frequent], counts[frequent] / occurrences[frequent, None]
        best = np.argsort(-shares, axis=0, kind="stable")[:_TOP]
        return [
            [(int(tokens[row]), float(shares[row, expert])) for row in best[:, expert] if shares[row, expert] > 0]
            for expert in range(counts.shape[1])
        ]


def _entropy(shares: np.ndarray) -> float:
    """Return the entropy of a distribution in bits."""
    positive = shares[shares > 0]
    return float(-(positive * np.log2(positive)).sum())


def to_dict(
    found: Mapping[int, LayerRoutes], domains: Sequence[str], tokens: Sequence[int], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return the routing as JSON; tokens as texts if there is a tokenizer.

    Args:
        found: The result of `routes`.
        domains: Names of the data.
        tokens: Tokens of each.
        tokenizer: To decode tokens.
    """
    name = (lambda token: token) if tokenizer is None else lambda token: tokenizer.decode([token])

    def layer(one: LayerRoutes) -> dict[str, Any]:
        others = one.coactivation * (1 - np.eye(len(one.coactivation)))
        partners = [(int(row.argmax()), round(float(row.max()), 4)) for row in others]
        return {
            "mutual_information_bits": one.mutual_information,
            "load_entropy_bits": one.load_entropy,
            "load": one.load.round(6).tolist(),
            "most_coactivated": [list(pair) if pair[1] else None for pair in partners],
            "top_tokens": [[[name(token), round(share, 4)] for token, share in row] for row in one.top_tokens],
        }

    return {
        "domains": list(domains),
        "tokens": list(tokens),
        "layers": {str(i): layer(one) for i, one in found.items()},
    }


def table(found: Mapping[int, LayerRoutes]) -> str:
    """Format the specialization of the layers for a terminal.

    Args:
        found: The result of `routes`.
    """
    lines = [f"{'layer':>5}  {'domain-expert information':>25}  {'load entropy':>12}  {'largest load':>12}"]
    for layer, one in found.items():
        largest = one.load.mean(axis=0).max() * one.load.shape[1]
        information = f"{one.mutual_information:.4f} bits" if len(one.load) > 1 else "-"  # of one domain
        lines.append(f"{layer:>5}  {information:>25}  {f'{one.load_entropy:.3f} bits':>12}  {f'{largest:.2f}x':>12}")
    return "\n".join(lines)
