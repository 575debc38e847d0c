"""Match a LoRA config with the modules of a model, as PEFT does. Start at `make_plan`.

PEFT releases differ in places (`RELEASES`). A file is read by the rules of the release that wrote it; new adapters must
match the same modules in all releases.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.lora import PROJECTIONS, LoraConfig, Plan, Target

from .param_mapping import hf_names
from .tensor_info import quote


class MatchingRules(NamedTuple):
    """How a PEFT release matches modules."""

    separate_patterns: bool  # rank_pattern and alpha_pattern match separately; before, one key decided for both
    grouped_keys: bool  # a pattern key K means (.*\.)?(K)$; before, .*\.K$
    first_number: bool  # the layer is the first number of a path; before, the last, an expert's index


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

    Without `rules` all PEFT releases must agree; with `strict` every name in the config must match a module.
    """
    paths_of = modules(model)
    plan, *others = (_plan(config, paths_of, rules, strict) for rules in ([rules] if rules else RELEASES.values()))
    for other in others:
        for name in (name for name in paths_of if plan.targets.get(name) != other.targets.get(name)):
            keys = "the same keys, in parentheses, in rank_pattern and alpha_pattern"
            advice = f"use {keys}, and layers_pattern with layers_to_transform"
            raise DSMoEError(f"PEFT releases disagree on {paths_of[name][0]} or its other experts: {advice}")
    return plan


def _plan(config: LoraConfig, paths_of: Mapping[str, Sequence[str]], rules: MatchingRules, strict: bool) -> Plan:
    matched: set[str] = set()
    is_target, rank_and_alpha = _targets(config, rules, matched), _ranks_and_alphas(config, rules)
    saved = tuple(name for name, paths in paths_of.items() if _is_saved(name, paths, config, matched))
    targets = {}
    for name, paths in paths_of.items():
        ranks, scales = [], []
        for path in paths:
            matches = is_target(path)
            if matches and not _is_linear(path):
                raise DSMoEError(f"target_modules must match only {', '.join(PROJECTIONS)}, got {path}")
            rank, alpha = rank_and_alpha(path) if matches else (0, 0.0)
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


def base_config(plan: Plan, model: ModelConfig) -> ModelConfig:
    """Return the config of the base, with a separate head if the adapter replaces a tied embedding or head."""
    return untied_config(model) if {"embed", "head.weight"} & set(plan.saved) else model


def untied_config(model: ModelConfig) -> ModelConfig:
    """Return the config with a separate head."""
    return dataclasses.replace(model, tie_word_embeddings=False)


def modules(model: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return the module paths of each of our parameters, including a tied head."""
    weights = {name: parts for name, parts in hf_names(untied_config(model)).items() if parts[0].endswith(".weight")}
    return {name: tuple(part.removesuffix(".weight") for part in parts) for name, parts in weights.items()}


def _is_linear(path: str) -> bool:
    return path.rpartition(".")[2] in PROJECTIONS


def _targets(config: LoraConfig, rules: MatchingRules, matched: set[str]) -> Callable[[str], bool]:
    """Return PEFT's `check_target_module_exists`, which adds entries of target_modules that match to `matched`."""
    target = config.target_modules
    if isinstance(target, str):
        if target.lower() == "all-linear":
            return _is_linear
        pattern = _compiled(target, "target_modules")
        return lambda path: pattern.fullmatch(path) is not None
    entries = frozenset(target)
    start = r"(?:^|.*?\.)" if rules.first_number else r".*\."
    layer_of = _compiled(rf"{start}{config.layers_pattern or '[^.]*'}\.(?P<number>\d+)\.", "layers_pattern")

    def matches(path: str) -> bool:
        parts = path.split(".")
        hits = entries & {".".join(parts[n:]) for n in range(len(parts))}
        matched.update(hits)
        if path in hits or not hits or not config.layers_to_transform:
            return bool(hits)
        layer = layer_of.match(path)
        return layer is not None and int(layer["number"]) in config.layers_to_transform

    return matches


def _is_saved(name: str, paths: Sequence[str], config: LoraConfig, matched: set[str]) -> bool:
    """Return whether a module or a parent ends with an entry of modules_to_save, even within a name, as in PEFT."""

    def saved_by(path: str) -> set[str]:
        parts = path.split(".")
        parents = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        return {entry for entry in config.modules_to_save if any(parent.endswith(entry) for parent in parents)}

    hits = list(map(saved_by, paths))
    matched.update(*hits)
    if any(hits) and not all(hits):
        raise DSMoEError(f"modules_to_save must match all experts of {name} or none")
    return all(hits)


def _ranks_and_alphas(config: LoraConfig, rules: MatchingRules) -> Callable[[str], tuple[int, float]]:
    """Return a function from a module path to its r and lora_alpha."""
    form = r"(.*\.)?({key})$" if rules.grouped_keys else r".*\.{key}$"
    ranks = {key: _compiled(form.replace("{key}", key), "rank_pattern") for key in config.rank_pattern}
    alphas = {key: _compiled(form.replace("{key}", key), "alpha_pattern") for key in config.alpha_pattern}
    if not rules.separate_patterns:
        ranks = alphas = ranks | alphas

    def first(path: str, patterns: Mapping[str, re.Pattern[str]]) -> str:
        # A key may be a full path, which a pattern that requires a dot before it does not match.
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
