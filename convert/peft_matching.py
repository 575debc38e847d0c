"""Match a LoRA config with the modules of a model, as PEFT does. Start at `make_plan`.

PEFT releases match differently in places (`RELEASES`). A file is read by the rules of the release that wrote it; new
adapters must mean the same in all releases.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.lora import PROJECTIONS, LoraConfig, Plan, Target

from .param_mapping import hf_names
from .tensor_info import quote

_EVERYTHING: Final = "all-linear"


class MatchingRules(NamedTuple):
    """How a PEFT release matches modules."""

    separate_patterns: bool  # rank_pattern and alpha_pattern match separately; before, one key decided for both
    grouped_keys: bool  # a pattern key K means (.*\.)?(K)$; before, .*\.K$
    first_number: bool  # the layer of a path is its first number; before, its last, an expert's index


# fmt: off
RELEASES: Final[dict[tuple[int, int], MatchingRules]] = {
    #                      separate  grouped  first_number
    (0, 13): MatchingRules(False,    False,   False),
    (0, 14): MatchingRules(True,     False,   False),
    (0, 15): MatchingRules(True,     True,    False),
    (0, 20): MatchingRules(True,     True,    True),
}
# fmt: on


def make_plan(
    config: LoraConfig, model: ModelConfig, *, rules: MatchingRules | None = None, strict: bool = True
) -> Plan:
    """Return which parameters of a model a LoRA config adapts or replaces.

    Args:
        config: The LoRA config.
        model: The base model's config.
        rules: Rules of one PEFT release; default: all `RELEASES` must agree.
        strict: Whether every name must match a module.

    Raises:
        DSMoEError: A name matches no module, a module cannot be adapted, or releases disagree.
    """
    paths_of = modules(model)
    plan, *others = (_plan(config, paths_of, rules, strict) for rules in ([rules] if rules else RELEASES.values()))
    for other in others:
        for name in (name for name in paths_of if plan.targets.get(name) != other.targets.get(name)):
            raise DSMoEError(
                f"PEFT releases disagree on {paths_of[name][0]} or its other experts: use the same keys, in "
                "parentheses, in rank_pattern and alpha_pattern, and layers_pattern with layers_to_transform"
            )
    return plan


def _plan(config: LoraConfig, paths_of: Mapping[str, Sequence[str]], rules: MatchingRules, strict: bool) -> Plan:
    matched: set[str] = set()
    is_target, rank_and_alpha = _targets(config, rules, matched), _ranks_and_alphas(config, rules)
    saved = tuple(name for name, paths in paths_of.items() if _is_saved(name, paths, config, matched))
    targets = {}
    for name, paths in paths_of.items():
        ranks, scales = [], []
        for path in paths:
            hit = is_target(path)
            if hit and not _is_linear(path):
                raise DSMoEError(f"target_modules must match only {', '.join(PROJECTIONS)}, got {path}")
            rank, alpha = rank_and_alpha(path) if hit else (0, 0.0)
            ranks.append(rank)
            scales.append(alpha / (math.sqrt(rank) if config.use_rslora else rank) if rank else 0.0)
        if any(ranks):
            if name in saved:
                raise DSMoEError(f"{paths[0]} is both in target_modules and in modules_to_save")
            targets[name] = Target(tuple(ranks), tuple(scales))
    entries = config.target_modules if not isinstance(config.target_modules, str) else ()
    if strict and (unmatched := [entry for entry in (*entries, *config.modules_to_save) if entry not in matched]):
        raise DSMoEError(f"{unmatched[0]!r:.80} matches no module of this model")
    if not targets:
        raise DSMoEError(f"target_modules {config.target_modules!r:.80} match no module of this model")
    return Plan(targets, saved, config.lora_dropout)


def unties_embeddings(plan: Plan, model: ModelConfig) -> bool:
    """Return whether the adapter replaces the embedding or the head of a model that ties them."""
    return model.tie_word_embeddings and bool({"embed", "head.weight"} & set(plan.saved))


def untied_config(model: ModelConfig) -> ModelConfig:
    """Return the config with a separate head."""
    return dataclasses.replace(model, tie_word_embeddings=False)


def modules(model: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return the module paths of each of our parameters, those of a tied head included."""
    names = hf_names(untied_config(model) if model.tie_word_embeddings else model)
    return {
        name: tuple(part.removesuffix(".weight") for part in parts)
        for name, parts in names.items()
        if parts[0].endswith(".weight")
    }


def _is_linear(path: str) -> bool:
    return path.rpartition(".")[2] in PROJECTIONS


def _targets(config: LoraConfig, rules: MatchingRules, matched: set[str]) -> Callable[[str], bool]:
    """PEFT's `check_target_module_exists`; adds the list entries that match to `matched`."""
    target = config.target_modules
    if isinstance(target, str):
        if target.lower() == _EVERYTHING:
            return _is_linear
        pattern = _compiled(target, "target_modules")
        return lambda path: pattern.fullmatch(path) is not None
    entries = frozenset(target)
    if rules.first_number:
        number = rf"(?:^|.*?\.){config.layers_pattern or '[^.]*'}\.(?P<number>\d+)\."
    else:
        number = rf".*\.{config.layers_pattern or '[^.]*'}\.(?P<number>\d+)\."
    layer_of = _compiled(number, "layers_pattern")

    def matches(path: str) -> bool:
        hits = entries & {path, *_ends(path)}
        matched.update(hits)
        if path in hits or not hits or not config.layers_to_transform:
            return bool(hits)
        layer = layer_of.match(path)
        return layer is not None and int(layer["number"]) in config.layers_to_transform

    return matches


def _ends(path: str) -> list[str]:
    """Return what follows each dot of a path."""
    parts = path.split(".")
    return [".".join(parts[n:]) for n in range(1, len(parts))]


def _is_saved(name: str, paths: Sequence[str], config: LoraConfig, matched: set[str]) -> bool:
    """Return whether a module or a parent ends in an entry of modules_to_save, dot or not, as in PEFT."""
    hits = [_saved_by(path, config.modules_to_save) for path in paths]
    matched.update(*hits)
    if any(hits) and not all(hits):
        raise DSMoEError(f"modules_to_save must match all experts of {name} or none")
    return all(hits)


def _saved_by(path: str, entries: Iterable[str]) -> set[str]:
    parts = path.split(".")
    modules = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return {entry for entry in entries if any(module.endswith(entry) for module in modules)}


def _ranks_and_alphas(config: LoraConfig, rules: MatchingRules) -> Callable[[str], tuple[int, float]]:
    """Return a function from a module path to its r and lora_alpha."""
    form = r"(.*\.)?({key})$" if rules.grouped_keys else r".*\.{key}$"
    ranks, alphas = (
        {key: _compiled(form.replace("{key}", key), field) for key in pattern}
        for field, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
    )
    if not rules.separate_patterns:
        ranks = alphas = ranks | alphas

    def first(path: str, patterns: Mapping[str, re.Pattern[str]]) -> str:
        # A full path may be a key too; a pattern that requires a dot before it does not match that.
        return next((key for key, pattern in patterns.items() if pattern.match(path)), path)

    def of(path: str) -> tuple[int, float]:
        rank, alpha = first(path, ranks), first(path, alphas)
        return config.rank_pattern.get(rank, config.r), config.alpha_pattern.get(alpha, config.lora_alpha)

    return of


def _compiled(pattern: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise DSMoEError(f"{field}: {pattern!r:.80} is not a regular expression ({quote(str(error))})") from None
