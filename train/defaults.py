"""Defaults that depend on other settings of a run: `with_defaults`."""

import dataclasses
import logging
from collections.abc import Callable, Mapping

from dsmoe_jax.config import ModelConfig

from .config import RunConfig
from .finetune import FinetuneConfig
from .recipes import FINETUNING, RECIPES
from .resume import settings_of_run

_log = logging.getLogger(__name__)


def with_defaults(config: RunConfig, model: ModelConfig | None = None) -> RunConfig:
    """Set the learning rate of fine-tuning, and shorten a recipe's sequences to the model's context length.

    Args:
        config: The run.
        model: Its model, if it is known; by default it is read if needed.
    """
    return _within_context(with_learning_rate(config), model)


def with_learning_rate(config: RunConfig) -> RunConfig:
    """Set the learning rate of fine-tuning."""
    if not isinstance(config, FinetuneConfig) or config.optimizer.learning_rate is not None:
        return config
    rate = 2e-5 if config.lora is None else 2e-4
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate))


def _within_context(config: RunConfig, model: ModelConfig | None) -> RunConfig:
    recipes: Mapping[str, Callable[[], RunConfig]] = FINETUNING if isinstance(config, FinetuneConfig) else RECIPES
    recipe, length = recipes.get(config.recipe or ""), config.data.sequence_length
    if length is None or recipe is None or length != recipe().data.sequence_length:
        return config
    limit = (model or config.model_config()).context_length
    if length <= limit or settings_of_run(config.output_dir):  # a run to resume keeps its length
        return config
    _log.info("Sequence length: %d tokens, the model's context length (recipe %s: %d)", limit, config.recipe, length)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=limit))
