"""What a user asks of a generation: `SamplingParams`, which checks itself. `choice.py` does what it says."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError

MOST_BIASES: Final = 300
_MOST_STOPS: Final = 64


class _Bound(NamedTuple):
    """What a number may be: within [low, high], a whole one or any, None or not."""

    low: float
    high: float
    whole: bool = False
    optional: bool = False


_ID: Final = _Bound(0, (1 << 31) - 1, whole=True)
_BIAS: Final = _Bound(-100, 100)
_NUMBERS: Final[dict[str, _Bound]] = {
    "max_new_tokens": _Bound(1, 1 << 24, whole=True),
    "temperature": _Bound(0, 1000),
    "top_k": _Bound(1, 1 << 24, whole=True, optional=True),
    "top_p": _Bound(0, 1),
    "min_p": _Bound(0, 1),
    "repetition_penalty": _Bound(0.01, 100),
    "presence_penalty": _Bound(-2, 2),
    "frequency_penalty": _Bound(-2, 2),
    "seed": _Bound(0, (1 << 32) - 1, whole=True, optional=True),
    "n": _Bound(1, 1024, whole=True),
    "logprobs": _Bound(0, 20, whole=True, optional=True),
}
# Further values that mean the same as None, as in vLLM.
_DISABLED: Final[dict[str, tuple[int, ...]]] = {"top_k": (-1, 0), "seed": (-1,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a user asks of a generation. Raises `ValueError` naming the parameter, its value and the bound.

    A token is chosen so, in this order (that of transformers; vLLM puts step 7 before step 5):

    1. `logit_bias`, a number for a token id, is added to that token's logit.
    2. The logit of every token in prompt or answer is divided by `repetition_penalty` where it is positive and
       multiplied by it where it is negative (CTRL, arXiv:1909.05858, section 4.1, in the form transformers gave it).
    3. `presence_penalty` is taken from the logit of every token in the answer, and `frequency_penalty` as often as
       the token stands there; the prompt does not count.
    4. With `temperature` 0 the likeliest token is taken, and that is all. Otherwise logits are divided by it.
    5. All but the `top_k` likeliest tokens are dropped;
    6. of what is left, all but the smallest set of likeliest tokens whose probabilities reach `top_p` of the whole
       (arXiv:1904.09751, section 3.1);
    7. of what is left, the tokens less likely than `min_p` times the likeliest one (arXiv:2407.01082, section 3).
    8. One of the rest is drawn. The draw depends on `seed`, on which of the `n` answers it is and on how many tokens
       that answer has, and on no other prompt. Without a seed the generator takes the number of the request.

    Steps 5 and 6 drop no token that is just as likely as one they keep.

    An answer ends after `max_new_tokens` tokens, with an end-of-sequence token unless `ignore_eos`, with one of
    `stop_token_ids`, or before the first of the strings of `stop`, wherever tokens part it. `logprobs` asks for the
    log-probability of every token and of that many likeliest ones, by the model's own logits before step 1.

    None stands for the default of any parameter, as null does in the JSON of an API. As in vLLM, `top_k` -1 or 0
    disables step 5 and `seed` -1 is no seed. `top_p` 0 leaves the likeliest token, as `temperature` 0 does.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None  # kept as sorted pairs, None as none
    seed: int | None = None
    stop: str | Sequence[str] = ()  # kept as a tuple
    stop_token_ids: Sequence[int] = ()  # kept as a tuple
    n: int = 1
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every bound, and bring every value into its one form."""
        for field in dataclasses.fields(self):
            if _is_default(field.name, getattr(self, field.name)):
                object.__setattr__(self, field.name, field.default)
        kept = {name: _number(name, getattr(self, name), bound) for name, bound in _NUMBERS.items()}
        kept |= {"logit_bias": _biases(self.logit_bias), "stop": _stops(self.stop)}
        kept["stop_token_ids"] = _stop_token_ids(self.stop_token_ids)
        if not isinstance(self.ignore_eos, bool):
            raise DSMoEError(f"ignore_eos must be True or False, not {_shown(self.ignore_eos)}")
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, **keywords: Any) -> "SamplingParams":
        """The parameters by name; a name that is none is a `ValueError` that says which one was meant."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in keywords:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
                raise DSMoEError(f"unknown sampling parameter {_shown(name)}; {hint}")
        return cls(**keywords)

    @property
    def adjusts_logits(self) -> bool:
        """Whether steps 1 to 3 do anything, so that a tally must be kept."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias) or penalties != (1, 0, 0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises `ValueError` where `logit_bias` or `stop_token_ids` names a token outside the vocabulary."""
        for name, ids in (("logit_bias", dict(self.logit_bias or ())), ("stop_token_ids", self.stop_token_ids)):
            if (highest := max(ids, default=-1)) >= vocab_size:
                raise DSMoEError(f"{name}: token {highest} is outside the vocabulary of {vocab_size}")


def _is_default(name: str, value: Any) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return value is None or (whole and value in _DISABLED.get(name, ()))


def _number(name: str, value: Any, bound: _Bound) -> Any:
    """The value as a Python number, if it is within its bound."""
    if value is None and bound.optional:
        return None
    kinds = (int, np.integer) if bound.whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = ("an int" if bound.whole else "a number") + (" or None" if bound.optional else "")
        raise DSMoEError(f"{name} must be {kind}, not {_shown(value)}")
    if not bound.low <= value <= bound.high:  # NaN is in no interval
        raise DSMoEError(f"{name} must be in [{bound.low}, {bound.high}], not {_shown(value)}")
    return int(value) if bound.whole else float(value)


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """Sorted pairs: unlike a dict they can be hashed."""
    try:
        pairs = dict(given or ()) if given is None or isinstance(given, Mapping | tuple | list) else None
    except (TypeError, ValueError):
        pairs = None
    if pairs is None:
        raise DSMoEError(f"logit_bias must map token ids to numbers, not {_shown(given)}")
    if len(pairs) > MOST_BIASES:
        raise DSMoEError(f"logit_bias must have at most {MOST_BIASES} entries, not {len(pairs)}")
    checked = {
        _number("a token id of logit_bias", token, _ID): _number(f"logit_bias of token {_shown(token)}", bias, _BIAS)
        for token, bias in pairs.items()
    }
    return tuple(sorted(checked.items()))


def _stops(given: Any) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else given
    if not isinstance(stops, tuple | list) or not all(isinstance(stop, str) for stop in stops):
        raise DSMoEError(f"stop must be a string or a list of strings, not {_shown(given)}")
    if "" in stops:
        raise DSMoEError(f"stop must not hold an empty string, which ends every answer, got {_shown(given)}")
    if len(stops) > _MOST_STOPS:
        raise DSMoEError(f"stop must have at most {_MOST_STOPS} strings, not {len(stops)}")
    return tuple(stops)


def _stop_token_ids(given: Any) -> tuple[int, ...]:
    if not isinstance(given, tuple | list):
        raise DSMoEError(f"stop_token_ids must be a list of token ids, not {_shown(given)}")
    return tuple(_number("a token id of stop_token_ids", token, _ID) for token in given)


def _shown(value: Any) -> str:
    """A value for an error message: on one line, and not endless."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
