"""How a template ends an answer, and what a generation config needs so that generation ends there: `endings_of`."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.text.tokenizer import Tokenizer

from .templates import open_template

_ANSWER: Final = "3141592653 2718281828"  # no template writes it, and no filter such as upper changes it
_log = logging.getLogger(__name__)


def endings_of(template: str | Path, tokenizer: Tokenizer, eos_token_ids: Collection[int] = ()) -> dict[str, Any]:
    """Return the fields that a generation config lacks for models trained with this template to stop.

    Args:
      template: As in `open_template`.
      tokenizer: That of the examples.
      eos_token_ids: The ids that end generation, beside the tokenizer's EOS.

    Returns:
      Nothing where the template ends an answer with one of these. Otherwise `eos_token_id`, if another
      special token stands there, or else `stop_strings` with the text that stands there.
    """
    name = str(template)
    try:
        pieces = open_template(template)(
            [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}], tokenizer
        )
    except ValueError:  # says so for the examples, if any of them needs it
        return {}
    text = tokenizer.decode([token for piece in pieces for token in piece.ids], skip_special_tokens=False)
    _, found, ending = text.rpartition(_ANSWER)
    ids = tokenizer.encode(ending, add_special_tokens=False, split_special_tokens=False)
    if not found or any(token == tokenizer.eos_token_id or token in eos_token_ids for token in ids):
        return {}
    for token in ids:
        if (content := tokenizer.decode([token], skip_special_tokens=False)) and not tokenizer.decode([token]):
            _log.info("Template %s: answers end with %s, generation_config.json gets its id %d", name, content, token)
            return {"eos_token_id": token}
    if ending.strip():
        reason = f"{ending.strip()!r}, which is not an EOS token: generation_config.json gets it as a stop string"
        _log.info("Template %s: answers end with the text %s", name, reason)
        return {"stop_strings": [ending.strip()]}
    _log.warning("Template %s: nothing stands at the end of an answer, so the model does not learn to stop", name)
    return {}
