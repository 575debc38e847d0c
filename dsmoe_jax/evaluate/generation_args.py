"""Translate the harness's generation arguments to sampling parameters: `sampling_params`."""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError, suggest
from dsmoe_jax.generate import SamplingParams

_MAX_TOKENS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # aliases, by precedence
_SAMPLING: Final = ("top_k", "top_p", "min_p")  # without effect on greedy decoding
_PENALTIES: Final = ("repetition_penalty", "presence_penalty", "frequency_penalty")
# Arguments of Hugging Face's `generate` that are accepted with the one value that changes nothing.
_FIXED: Final[Mapping[str, Any]] = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
_KNOWN: Final = ("until", "do_sample", "temperature", *_MAX_TOKENS, *_SAMPLING, *_PENALTIES, *_FIXED)


class GenerationArgs(NamedTuple):
    """Sampling parameters of a `generate_until` request.

    Attributes:
        params: Without a seed.
        sampled: Whether tokens are sampled rather than decoded greedily.
    """

    params: SamplingParams
    sampled: bool


def generation_args(arguments: Mapping[str, Any], *, max_gen_toks: int, stop: tuple[str, ...] = ()) -> GenerationArgs:
    """Translate the arguments of one request.

    As in the harness, `do_sample: false` is greedy whatever the temperature, and without `do_sample` a temperature
    above 0 samples. `do_sample: true` alone samples at temperature 1.

    Args:
        arguments: `generation_kwargs` of a task.
        max_gen_toks: Maximum tokens if the arguments have none.
        stop: Further stop strings.

    Returns:
        The parameters.

    Raises:
        DSMoEError: An argument is unknown, or its value is out of range.
    """
    for name, value in arguments.items():
        if name not in _KNOWN:
            raise DSMoEError(f"unknown generation argument {name!r}; {suggest(name, _KNOWN)}")
        if name in _FIXED and value not in (_FIXED[name], None):
            raise DSMoEError(f"generation argument {name} must be {_FIXED[name]}, got {value!r}")
    given = {name: value for name, value in arguments.items() if value is not None}
    sampled = given.get("do_sample", _number("temperature", given.get("temperature", 0), float) > 0)
    if sampled not in (True, False):  # 0 and 1 are equal to them
        raise DSMoEError(f"generation argument do_sample must be True or False, got {sampled!r:.80}")
    until = given.get("until", [])
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(text, str) for text in until):
        raise DSMoEError(f"generation argument until must be a string or a list of strings, got {until!r:.80}")
    lengths = [given[name] for name in _MAX_TOKENS if name in given]
    params = SamplingParams(
        max_new_tokens=_number("max_gen_toks", lengths[0] if lengths else max_gen_toks, int),
        temperature=_number("temperature", given.get("temperature", 1), float) if sampled else 0.0,
        stop=tuple(dict.fromkeys(text for text in (*until, *stop) if text)),
        **{name: given[name] for name in (*_PENALTIES, *(_SAMPLING if sampled else ())) if name in given},
    )
    return GenerationArgs(params, bool(sampled) and params.temperature > 0)


def _number(name: str, value: Any, kind: Callable[[Any], Any]) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise DSMoEError(f"generation argument {name} must be a number, got {value!r:.80}") from None
