"""Sampling parameters of a request, validated: `SamplingParams`. `sampling.py` implements them."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np

from dsmoe_jax.convert.hub import resolve_file
from dsmoe_jax.errors import DSMoEError, suggest
from dsmoe_jax.progress import plural
from dsmoe_jax.text.generation_config import GENERATION_CONFIG, read_generation_config

MAX_LOGIT_BIASES: Final = 300
MAX_STOP_STRINGS: Final = 64
_DEFAULT_MAX_NEW_TOKENS: Final = 128
_LENGTHS: Final = ("max_new_tokens", "max_tokens")  # the field and its alias


class Bound(NamedTuple):
    """The closed interval of a number."""

    low: float
    high: float
    integer: bool = False
    optional: bool = False


_TOKEN_ID: Final = Bound(0, (1 << 31) - 1, integer=True)
_LENGTH: Final = Bound(1, 1 << 24, integer=True)
_BIAS: Final = Bound(-100, 100)
BOUNDS: Final[dict[str, Bound]] = {
    **dict.fromkeys(_LENGTHS, _LENGTH),
    "temperature": Bound(0, 1000),
    "top_k": Bound(1, 1 << 24, integer=True, optional=True),
    "top_p": Bound(0, 1),
    "min_p": Bound(0, 1),
    "repetition_penalty": Bound(0.01, 100),
    "presence_penalty": Bound(-2, 2),
    "frequency_penalty": Bound(-2, 2),
    "seed": Bound(0, (1 << 32) - 1, integer=True, optional=True),
    "n": Bound(1, 1024, integer=True),
    "logprobs": Bound(0, 20, integer=True, optional=True),
}
# Fields of generation_config.json: with `do_sample` only, and in any case.
_SAMPLED: Final = ("temperature", "top_k", "top_p", "min_p")
_ALWAYS: Final = ("repetition_penalty", "max_new_tokens")
# Other values that mean None, as in vLLM.
_DISABLED: Final[dict[str, tuple[int, ...]]] = {"top_k": (-1, 0), "seed": (-1,)}


_T = TypeVar("_T")


class _Stored(int):
    """A length stored in an instance; `dataclasses.replace` passes it beside a new value of its alias, which wins."""

    __repr__ = int.__repr__
    __str__ = int.__repr__


def _reject_unknown_fields(cls: type[_T]) -> type[_T]:
    """Make a dataclass raise `DSMoEError` for unknown fields."""
    init, names = cls.__init__, list(inspect.signature(cls).parameters)

    @functools.wraps(init)
    def checked(self: _T, **fields: Any) -> None:
        for name in fields:
            if name not in names:
                raise DSMoEError(f"unknown sampling parameter {_short_repr(name)}; {suggest(name, names)}")
        init(self, **fields)

    cls.__init__ = checked
    return cls


@_reject_unknown_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of a request; None selects the default of any of them.

    They apply in this order, that of transformers (vLLM applies `min_p` before `top_k`): `logit_bias`,
    `repetition_penalty`, presence and frequency penalties, `temperature`, `top_k`, `top_p`, `min_p`. Tokens tied with
    the least likely one that `top_k` or `top_p` keeps are kept, too.

    Attributes:
        max_new_tokens: Maximum length of the output in tokens, default 128.
        temperature: Divides the logits; 0, the default, is greedy decoding.
        top_k: Sample from the K most likely tokens; None, 0 or -1 disables it.
        top_p: Sample from the smallest set of most likely tokens with at least this probability in total
            (arXiv:1904.09751, section 3.1); 1 disables it, 0 leaves the most likely token.
        min_p: Drop tokens less likely than `min_p` times the most likely one (arXiv:2407.01082, section 3).
        repetition_penalty: Multiplicative penalty on tokens of prompt and output: positive logits are divided by it,
            negative ones multiplied (arXiv:1909.05858, section 4.1, in the form of transformers); 1 disables it.
        presence_penalty: Subtracted from the logit of every token in the output; 0 disables it.
        frequency_penalty: Subtracted once per occurrence of the token in the output; 0 disables it.
        logit_bias: Numbers in [-100, 100] added to logits, by token id; stored as sorted pairs.
        seed: Seed of this request; None or -1: the number of earlier requests to the generator. A sample depends on the
            seed, on the index among the `n` outputs and on the position, never on other requests.
        stop: Stop strings; the text ends before the first one. Stored as a tuple.
        stop_token_ids: Token ids that end the output. Stored as a tuple.
        n: Outputs per prompt.
        ignore_eos: Continue past EOS tokens and the stop strings of the model.
        logprobs: Return the log-probability of every token and of this many most likely ones, from the logits of the
            model; None: none.
        max_tokens: Alias of `max_new_tokens`, as in vLLM and the OpenAI API.

    Raises:
        DSMoEError: A value is out of range or of the wrong type.
    """

    # None until `__post_init__`, to distinguish an explicit value from the default.
    max_new_tokens: int = None  # type: ignore[assignment]
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    n: int = 1
    ignore_eos: bool = False
    logprobs: int | None = None
    max_tokens: int = dataclasses.field(default=None, compare=False, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Validate every value and store it in its canonical form."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {f.name: f.default for f in dataclasses.fields(self) if _is_default(f.name, values[f.name])}
        lengths = {name: values[name] for name in _LENGTHS}
        checked = {name: _number(name, value, _LENGTH) for name, value in lengths.items() if value is not None}
        new = {value for name, value in checked.items() if not isinstance(lengths[name], _Stored)}
        passed = new or set(checked.values())
        if len(passed) > 1:
            both = "{} and {}".format(*lengths.values())
            raise DSMoEError(f"max_new_tokens and its alias max_tokens must be equal, got {both}")
        values |= dict.fromkeys(_LENGTHS, passed.pop() if passed else _DEFAULT_MAX_NEW_TOKENS)
        values |= {name: _number(name, values[name], bound) for name, bound in BOUNDS.items()}
        values |= {name: _Stored(values[name]) for name in _LENGTHS}
        values["logit_bias"] = _logit_bias(values["logit_bias"])
        values["stop"] = _stop_strings(values["stop"])
        values["stop_token_ids"] = _stop_token_ids(values["stop_token_ids"])
        if not isinstance(values["ignore_eos"], bool):
            raise DSMoEError(f"ignore_eos must be True or False, got {_short_repr(values['ignore_eos'])}")
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, *, revision: str | None = None, **overrides: Any
    ) -> "SamplingParams":
        """Return the sampling defaults in the `generation_config.json` of a model.

        These are temperature, top_k, top_p and min_p (greedy decoding unless `do_sample` is true),
        `repetition_penalty` and `max_new_tokens`. As in vLLM, fields that the file lacks have the defaults of this
        class; transformers has `top_k=50`.

        Args:
            path_or_hub_id: Native checkpoint, Hugging Face folder or hub id, of which only this file is downloaded.
            revision: Branch, tag or commit of a hub id; default: `main`.
            **overrides: Fields that replace those of the file.

        Returns:
            The parameters.

        Raises:
            DSMoEError: The path or hub id does not exist, or a value is out of range.
        """
        file = resolve_file(path_or_hub_id, GENERATION_CONFIG, revision)
        return cls(**merge_fields({} if file is None else read_sampling_defaults(file.parent), overrides))

    @property
    def adjusts_logits(self) -> bool:
        """Whether biases or penalties are set."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias) or penalties != (1, 0, 0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `DSMoEError` if `logit_bias` or `stop_token_ids` has a token outside the vocabulary."""
        for name, ids in (("logit_bias", dict(self.logit_bias or ())), ("stop_token_ids", self.stop_token_ids)):
            if (highest := max(ids, default=-1)) >= vocab_size:
                raise DSMoEError(f"{name}: token {highest} is outside the vocabulary of {vocab_size}")


Params = SamplingParams | Sequence[SamplingParams] | None  # for all prompts, or one for each
FIELD_NAMES: Final = tuple(inspect.signature(SamplingParams).parameters)


def read_sampling_defaults(folder: str | Path) -> dict[str, Any]:
    """Return the fields of `SamplingParams` in a folder's `generation_config.json`, validated."""
    fields = read_generation_config(folder)
    defaults = {name: fields[name] for name in (*_SAMPLED, *_ALWAYS) if fields.get(name) is not None}
    if fields.get("do_sample") is True:
        defaults = {"temperature": 1.0} | defaults
    else:
        defaults = {name: value for name, value in defaults.items() if name in _ALWAYS}
    try:
        SamplingParams(**defaults)
    except DSMoEError as error:
        raise DSMoEError(f"{Path(folder) / GENERATION_CONFIG}: {error}") from None
    return defaults


def merge_fields(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `defaults` with `overrides`, in which `max_tokens` and `max_new_tokens` override each other."""
    hidden = _LENGTHS if overrides.keys() & {*_LENGTHS} else ()
    return {name: value for name, value in defaults.items() if name not in hidden} | dict(overrides)


def each_params(params: Params, keywords: Mapping[str, Any], prompts: int) -> list[SamplingParams]:
    """Return the sampling parameters of each prompt, from `params` or the fields in `keywords`."""
    if "sampling_params" in keywords:
        raise DSMoEError("unknown keyword 'sampling_params'; did you mean 'params'?")
    if params is not None and keywords:
        raise DSMoEError(f"params and keywords are exclusive, got both: {', '.join(keywords)}")
    if params is None:
        params = SamplingParams(**keywords)
    each = [params] * prompts if isinstance(params, SamplingParams) else params
    if not isinstance(each, tuple | list) or not all(isinstance(one, SamplingParams) for one in each):
        raise DSMoEError(f"params must be SamplingParams or a list of them, got {params!r:.80}")
    if len(each) != prompts:
        raise DSMoEError(
            f"params must be one for all or one per prompt, got {len(each)} for {plural(prompts, 'prompt')}"
        )
    return list(each)


def _is_default(name: str, value: Any) -> bool:
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return value is None or (integer and value in _DISABLED.get(name, ()))


def _number(name: str, value: Any, bound: Bound) -> Any:
    """Return `value` as a Python number within its bound."""
    if value is None and bound.optional:
        return None
    kinds = (int, np.integer) if bound.integer else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = ("an int" if bound.integer else "a number") + (" or None" if bound.optional else "")
        raise DSMoEError(f"{name} must be {kind}, got {_short_repr(value)}")
    if not bound.low <= value <= bound.high:  # false for NaN
        raise DSMoEError(f"{name} must be in [{bound.low}, {bound.high}], got {_short_repr(value)}")
    return int(value) if bound.integer else float(value)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Return sorted pairs, which unlike a dict are hashable."""
    try:
        pairs = dict(value or ()) if value is None or isinstance(value, Mapping | tuple | list) else None
    except (TypeError, ValueError):
        pairs = None
    if pairs is None:
        raise DSMoEError(f"logit_bias must map token ids to numbers, got {_short_repr(value)}")
    if len(pairs) > MAX_LOGIT_BIASES:
        raise DSMoEError(f"logit_bias must have at most {MAX_LOGIT_BIASES} entries, got {len(pairs)}")
    checked = {
        _number("token id in logit_bias", token, _TOKEN_ID): _number(f"logit_bias[{_short_repr(token)}]", bias, _BIAS)
        for token, bias in pairs.items()
    }
    return tuple(sorted(checked.items()))


def _stop_strings(value: Any) -> tuple[str, ...]:
    stop = (value,) if isinstance(value, str) else value
    if not isinstance(stop, tuple | list) or not all(isinstance(text, str) for text in stop):
        raise DSMoEError(f"stop must be a string or a list of strings, got {_short_repr(value)}")
    if "" in stop:
        raise DSMoEError(f"stop must not contain an empty string, got {_short_repr(value)}")
    if len(stop) > MAX_STOP_STRINGS:
        raise DSMoEError(f"stop must have at most {MAX_STOP_STRINGS} strings, got {len(stop)}")
    return tuple(stop)


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        raise DSMoEError(f"stop_token_ids must be a list of token ids, got {_short_repr(value)}")
    return tuple(_number("token id in stop_token_ids", token, _TOKEN_ID) for token in value)


def _short_repr(value: Any) -> str:
    """Return the repr on one line, at most 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
