"""What a LoRA config matches in a model, by the rules of peft. Start at `make_plan`.

peft's releases match differently in places (`RELEASES`). A file is read by the rules of the one that wrote it; what is
made here is only what all of them read alike.
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
from .torch_pickle import show

_EVERYTHING: Final = "all-linear"


class Rules(NamedTuple):
    """How a release of peft matches where releases differ."""

    separate: bool  # rank_pattern and alpha_pattern each have their own first match; before, one key decided for both
    grouped: bool  # a key K of theirs is (.*\.)?(K)$; before, .*\.K$
    first_number: bool  # a path's layer is its first number; before, its last, which on a routed expert is the expert's


# fmt: off
RELEASES: Final[dict[tuple[int, int], Rules]] = {
    #              separate  grouped  first_number
    (0, 13): Rules(False,    False,   False),
    (0, 14): Rules(True,     False,   False),
    (0, 15): Rules(True,     True,    False),
    (0, 20): Rules(True,     True,    True),
}
# fmt: on
def make_plan(config: LoraConfig, model: ModelConfig, *, rules: Rules | None = None, strict: bool = True) -> Plan:
    """Which parameters of a model the config adapts, and which it replaces.

    `rules`: those of one release of peft; by default all `RELEASES` must agree. `strict`: every name must match a
    module. Raises `ValueError` for one that does not, for what cannot be adapted, and where releases disagree.
    """
    paths_of = modules(model)
    plan, *others = (_plan(config, paths_of, rules, strict) for rules in ([rules] if rules else RELEASES.values()))
    for other in others:
        for name in (name for name in paths_of if plan.targets.get(name) != other.targets.get(name)):
            raise DSMoEError(
                f"releases of peft disagree on {paths_of[name][0]}, or on another expert's: give rank_pattern and "
                "alpha_pattern the same keys, each in parentheses, and layers_to_transform a layers_pattern"
            )
    return plan


def _plan(config: LoraConfig, paths_of: Mapping[str, Sequence[str]], rules: Rules, strict: bool) -> Plan:
    matched: set[str] = set()
    is_target, rank_and_alpha = _targets(config, rules, matched), _ranks_and_alphas(config, rules)
    saved = tuple(name for name, paths in paths_of.items() if _is_saved(name, paths, config, matched))
    targets = {}
    for name, paths in paths_of.items():
        ranks, scales = [], []
        for path in paths:
            hit = is_target(path)
            if hit and not _is_linear(path):
                raise DSMoEError(f"target_modules: {path} cannot be adapted, only {', '.join(PROJECTIONS)}")
            rank, alpha = rank_and_alpha(path) if hit else (0, 0.0)
            ranks.append(rank)
            scales.append(alpha / (math.sqrt(rank) if config.use_rslora else rank) if rank else 0.0)
        if any(ranks):
            if name in saved:
                raise DSMoEError(f"{paths[0]} is both in target_modules and in modules_to_save")
            targets[name] = Target(tuple(ranks), tuple(scales))
    wanted = config.target_modules if not isinstance(config.target_modules, str) else ()
    if strict and (idle := [entry for entry in (*wanted, *config.modules_to_save) if entry not in matched]):
        raise DSMoEError(f"{idle[0]!r:.80} matches no module of this model")
    if not targets:
        raise DSMoEError(f"target_modules {config.target_modules!r:.80} match no module of this model")
    return Plan(targets, saved, config.lora_dropout)


def unties_embeddings(plan: Plan, model: ModelConfig) -> bool:
    """Whether the adapter takes apart what the model ties: it replaces the embedding or the head alone."""
    return model.tie_word_embeddings and bool({"embed", "head.weight"} & set(plan.saved))


def untied_config(model: ModelConfig) -> ModelConfig:
    """The config with a head of its own."""
    return dataclasses.replace(model, tie_word_embeddings=False)


def modules(model: ModelConfig) -> dict[str, tuple[str, ...]]:
    """By our parameter, the paths of the modules it is the weight of; a tied head is one, too."""
    names = hf_names(untied_config(model) if model.tie_word_embeddings else model)
    return {
        name: tuple(part.removesuffix(".weight") for part in parts)
        for name, parts in names.items()
        if parts[0].endswith(".weight")
    }


def _is_linear(path: str) -> bool:
    return path.rpartition(".")[2] in PROJECTIONS


def _targets(config: LoraConfig, rules: Rules, matched: set[str]) -> Callable[[str], bool]:
    """Peft's `check_target_module_exists`; notes in `matched` which entries of a list matched anything."""
    target = config.target_modules
    if isinstance(target, str):
        if target.lower() == _EVERYTHING:
            return _is_linear
        whole = _compiled(target, "target_modules")
        return lambda path: whole.fullmatch(path) is not None
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
    """What follows each of its dots."""
    parts = path.split(".")
    return [".".join(parts[n:]) for n in range(1, len(parts))]


def _is_saved(name: str, paths: Sequence[str], config: LoraConfig, matched: set[str]) -> bool:
    """Whether a module, or one around it, ends in an entry of modules_to_save; without a dot before it, as in peft."""
    hits = [_saving(path, config.modules_to_save) for path in paths]
    matched.update(*hits)
    if any(hits) and not all(hits):
        raise DSMoEError(f"modules_to_save: some experts of {name} alone cannot be saved whole")
    return all(hits)


def _saving(path: str, entries: Iterable[str]) -> set[str]:
    parts = path.split(".")
    around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return {entry for entry in entries if any(module.endswith(entry) for module in around)}


def _ranks_and_alphas(config: LoraConfig, rules: Rules) -> Callable[[str], tuple[int, float]]:
    """What gives the r and lora_alpha of a module."""
    form = r"(.*\.)?({key})$" if rules.grouped else r".*\.{key}$"
    ranks, alphas = (
        {key: _compiled(form.replace("{key}", key), field) for key in pattern}
        for field, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
    )
    if not rules.separate:
        ranks = alphas = ranks | alphas

    def first(path: str, patterns: Mapping[str, re.Pattern[str]]) -> str:
        # A whole path may be a key, too; where a dot must come before it, the pattern alone does not match that.
        return next((key for key, pattern in patterns.items() if pattern.match(path)), path)

    def of(path: str) -> tuple[int, float]:
        rank, alpha = first(path, ranks), first(path, alphas)
        return config.rank_pattern.get(rank, config.r), config.alpha_pattern.get(alpha, config.lora_alpha)

    return of


def _compiled(pattern: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise DSMoEError(f"{field}: {pattern!r:.80} is no regular expression ({show(str(error))})") from None
