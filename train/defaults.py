"""Defaults that depend on other settings of a run: `with_defaults`."""

import dataclasses
import logging
from collections.abc import Callable, Mapping

from .config import RunConfig
from .finetune import FinetuneConfig
from .recipes import FINETUNING, RECIPES
from .resume import settings_of_run

_log = logging.getLogger(__name__)


def with_defaults(config: RunConfig) -> RunConfig:
    """Set the learning rate of fine-tuning, and shorten a recipe's sequences to the model's context length."""
    if isinstance(config, FinetuneConfig) and config.optimizer.learning_rate is None:
        rate = 2e-5 if config.lora is None else 2e-4
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate))
    return _within_context(config)


def _within_context(config: RunConfig) -> RunConfig:
    recipes: Mapping[str, Callable[[], RunConfig]] = FINETUNING if isinstance(config, FinetuneConfig) else RECIPES
    recipe, length = recipes.get(config.recipe or ""), config.data.sequence_length
    if length is None or recipe is None or length != recipe().data.sequence_length:
        return config
    limit = config.model_config().context_length
    if length <= limit or settings_of_run(config.output_dir):  # a run to resume keeps its length
        return config
    _log.info("Sequence length: %d tokens, the model's context length (recipe %s: %d)", limit, config.recipe, length)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=limit))
