"""Stop tokens and strings of a chat template: `infer_stop_config`."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.text.tokenizer import Tokenizer

from .templates import open_template

_COMPLETION: Final = "3141592653 2718281828"  # not in any template, and unchanged by filters such as upper
_log = logging.getLogger(__name__)


def infer_stop_config(
    template: str | Path, tokenizer: Tokenizer, eos_token_ids: Collection[int] = ()
) -> dict[str, Any]:
    """Infer the generation config that a model trained with the template needs.

    Args:
        template: See `open_template`.
        tokenizer: That of the examples.
        eos_token_ids: Ids that end generation in addition to the tokenizer's EOS.

    Returns:
        `eos_token_id` if assistant turns end with another special token, or else `stop_strings`; empty if they end with
        one of these ids.
    """
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _COMPLETION}]
    try:
        pieces = open_template(template)(messages, tokenizer)
    except ValueError:  # raised again for the first conversation
        return {}
    text = tokenizer.decode([token for piece in pieces for token in piece.ids], skip_special_tokens=False)
    _, found, ending = text.rpartition(_COMPLETION)
    ids = tokenizer.encode(ending, add_special_tokens=False, split_special_tokens=False)
    if not found or any(token == tokenizer.eos_token_id or token in eos_token_ids for token in ids):
        return {}
    for token in ids:
        if (content := tokenizer.decode([token], skip_special_tokens=False)) and not tokenizer.decode([token]):
            added = f"adding eos_token_id {token} to generation_config.json"
            _log.info("Template %s: assistant turns end with %s; %s", template, content, added)
            return {"eos_token_id": token}
    if ending.strip():
        added = "which is not an EOS token; adding it to stop_strings in generation_config.json"
        _log.info("Template %s: assistant turns end with the text %r, %s", template, ending.strip(), added)
        return {"stop_strings": [ending.strip()]}
    _log.warning("Template %s: assistant turns have no end marker, so the model does not learn to stop", template)
    return {}
