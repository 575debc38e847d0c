"""`DSMoELM`: the model of lm-evaluation-harness over a `Generator`. Start at `loglikelihood`.

Tokenization and truncation equal those of the harness's `hf` model (`encoding`); neither torch nor transformers is
imported.
"""

import collections
import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.evaluate.encoding import Encoder, Pair
from dsmoe_jax.evaluate.generation_args import GenerationArgs, generation_args
from dsmoe_jax.evaluate.responses import Response, Responses
from dsmoe_jax.generate import Generator
from dsmoe_jax.generate.scoring import Score, rolling_windows
from dsmoe_jax.progress import Meter, count, plural
from dsmoe_jax.storage.manifest import hash_json

try:
    import lm_eval.models  # noqa: F401 # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise DSMoEError(f"evaluation needs lm_eval ({error}): pip install 'dsmoe_jax[eval]'") from None

_QUEUED: Final = 4  # times the batch size: prompts submitted to the engine at once
_MAX_GEN_TOKS: Final = 256  # as the harness's `hf` model
_log = logging.getLogger("dsmoe_jax")


class _Request(NamedTuple):
    arguments: tuple[Any, ...]
    name: str  # of its task and document, "" if unknown; for messages
    generation: GenerationArgs | None = None
    key: str = ""


Answers = Iterator[tuple[int, Response]]  # index among the requests, in the order of computation


class DSMoELM(TemplateLM):
    """A model for `lm_eval.simple_evaluate(model=DSMoELM(...))`.

    Attributes:
        generator: Runs the model.
        progress: Progress meter, in requests.
        truncated: Requests so far whose context was truncated to the window.
        prompt_tokens: Tokens read by the model so far.
        reused_tokens: Tokens so far whose keys and values came from a prompt with the same beginning.
    """

    def __init__(
        self,
        pretrained: Generator | str | Path,
        *,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int | None = None,
        seed: int = 0,
        responses: Responses | None = None,
        progress: Meter = count,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        """Create a model.

        Args:
            pretrained: A generator, or the path or hub id of a model.
            batch_size: Sequences of `max_length` scored at once, and outputs generated at once; None or "auto": the
                defaults of `Generator`.
            max_length: Window in tokens; default: that of the model.
            max_gen_toks: Maximum output length of tasks that state none; default: 256, at most half the window.
            seed: Seed of tasks that sample.
            responses: Responses kept from an earlier evaluation of the same model; new ones are added.
            progress: Progress meter, in requests.
            device: Must be None: JAX chooses the devices.
            max_batch_size: Ignored: an argument that the harness passes.
            **options: Options of `Generator.from_pretrained`: `quantize`, `adapter`, `mesh`, `dtype` ….

        Raises:
            DSMoEError: The model has no tokenizer, an argument is out of range, or as `Generator.from_pretrained`.
        """
        super().__init__()
        if device is not None:
            raise DSMoEError(f"device must be None, got {device!r}: set JAX_PLATFORMS instead")
        size = _batch_size(batch_size)
        if isinstance(pretrained, Generator):
            if options:
                raise DSMoEError(f"{next(iter(options))} needs the path of a model, got a Generator")
            self.generator = pretrained
        else:
            self.generator = Generator.from_pretrained(pretrained, **{"max_batch_size": size, **options})
        if self.generator.tokenizer is None:
            raise DSMoEError(f"evaluation needs a tokenizer, and {pretrained!s:.200} has none")
        self.tokenizer = self.generator.tokenizer
        window = min(self.generator.context_length, self.generator.config.context_length)
        if max_length is not None and not 2 <= max_length <= self.generator.context_length:
            raise DSMoEError(f"max_length must be in [2, {self.generator.context_length}], got {max_length}")
        self._encoder = Encoder(self.tokenizer, self.generator.prefix_token_id, max_length or window)
        if max_gen_toks is not None and not 1 <= max_gen_toks < self.max_length:
            raise DSMoEError(f"max_gen_toks must be in [1, {self.max_length - 1}], got {max_gen_toks}")
        self.max_gen_toks = max_gen_toks or min(_MAX_GEN_TOKS, self.max_length // 2)
        self._max_tokens = {} if size is None else {"max_tokens": size * self.max_length}
        self.progress, self._seed, self._responses = progress, seed, responses
        self.truncated = self.prompt_tokens = self.reused_tokens = 0

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self._encoder.max_length

    @property
    def eot_token_id(self) -> int:
        """EOS token of the tokenizer."""
        ids = [self.tokenizer.eos_token_id, *sorted(self.generator.eos_token_ids)]
        return next((token for token in ids if token is not None), self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Context of the first token of a text: BOS, else EOS."""
        return self._encoder.required_prefix()

    @property
    def tokenizer_name(self) -> str:
        """Hash of the chat template, which the harness caches rendered prompts under."""
        return f"dsmoe_jax-{hash_json(self.tokenizer.chat_templates)[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text, with BOS as configured unless the text starts with it."""
        return self._encoder.encode(string, add_special_tokens)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the Jinja source of a chat template: the default one for True, or the one of that name."""
        if chat_template is False or chat_template is None:
            return None
        if not self.tokenizer.chat_templates:
            raise DSMoEError("apply_chat_template needs a chat template, and the tokenizer has none")
        name = "default" if chat_template is True else chat_template
        if name not in self.tokenizer.chat_templates:
            allowed = ", ".join(sorted(self.tokenizer.chat_templates))
            raise DSMoEError(f"chat_template must be one of {allowed}, got {name!r}")
        return self.tokenizer.chat_templates[name]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat; without a generation prompt it ends within the last message, which a completion continues."""
        try:
            text = self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        except DSMoEError:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) in (0, len(chat_history)):
                raise
            _log.warning("Dropping the system message, which the chat template rejects")
            return self.apply_chat_template(without, add_generation_prompt)
        if add_generation_prompt:
            return text
        # As `continue_final_message` of transformers: what the template adds after the last message is cut off.
        last = chat_history[-1]["content"]
        if (start := text.rfind(last.strip())) < 0:
            raise DSMoEError("the chat template changes the last message, so it cannot be continued")
        whole = start + len(last.lstrip())
        return text[:whole] if text[start:whole] == last.lstrip() else text[: start + len(last.strip())]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each (context, continuation), and whether it is the greedy one."""

        def answers(todo: list[_Request]) -> Answers:
            pairs = self._encoder.pairs([(r.arguments[0], r.arguments[1]) for r in todo], [r.name for r in todo])
            for i, score in self._scores(pairs):
                yield i, Response([score.logprob, score.greedy], pairs[i].truncated)

        found = self._answer("loglikelihood", [_Request(one.args, _name(one)) for one in requests], answers)
        return [(float(value[0]), bool(value[1])) for value in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text over disjoint windows."""

        def answers(todo: list[_Request]) -> Answers:
            ids = self._encoder.encode_all(r.arguments[0] for r in todo)
            windows: list[Pair] = []
            owners: list[int] = []
            left: collections.Counter[int] = collections.Counter()
            for i, request in enumerate(todo):
                tokens = ids[request.arguments[0]]
                found = rolling_windows(tokens, prefix=self.prefix_token_id, window=self.max_length)
                windows += [Pair(*pair) for pair in found]
                owners += [i] * len(found)
                left[i] = len(found)
                if not found:
                    yield i, Response(0.0)
            parts: dict[int, list[float]] = collections.defaultdict(list)
            for j, score in self._scores(windows):
                i = owners[j]
                parts[i].append(score.logprob)
                left[i] -= 1
                if not left[i]:
                    yield i, Response(math.fsum(parts.pop(i)))

        return self._answer("loglikelihood_rolling", [_Request(one.args, _name(one)) for one in requests], answers)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the completion of each context, without the stop string that ended it."""
        known: dict[str, GenerationArgs] = {}
        checked = []
        for one in requests:
            key = repr(one.args[1])
            if key not in known:
                with _named(_name(one)):
                    known[key] = self._generation_args(one.args[1])
            checked.append(_Request(one.args, _name(one), known[key]))
        return self._answer("generate_until", checked, self._completions)

    def _generation_args(self, arguments: Mapping[str, Any]) -> GenerationArgs:
        """Translate generation arguments; a stop string that is a special token also stops at its id."""
        stop = (*self.generator.stop_strings, *([self.tokenizer.eos_token] if self.tokenizer.eos_token else []))
        found = generation_args(arguments, max_gen_toks=self.max_gen_toks, stop=stop)
        # The text of an output has no special tokens, so a stop string cannot match one.
        ids = [token for text in found.params.stop if (token := self._special_id(text)) is not None]
        return found._replace(params=dataclasses.replace(found.params, stop_token_ids=tuple(ids)))

    def _special_id(self, text: str) -> int | None:
        """Return the id of the special token with this text, if there is one."""
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False)]
        return ids[0] if len(ids) == 1 and texts == ["", text] else None

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score token ids; of each request (texts, context, continuation)."""
        scores = dict(self._scores([self._encoder.truncate(list(c), list(d)) for _, c, d in requests]))
        return [(scores[i].logprob, scores[i].greedy) for i in range(len(requests))]

    def _answer(self, kind: str, requests: list[_Request], answers: Callable[[list[_Request]], Answers]) -> list[Any]:
        """Return the value of each request: from an earlier response to an equal one, else computed now and kept."""
        requests = self._with_keys(kind, requests)
        kept = Responses() if self._responses is None else self._responses
        todo = list({r.key: r for r in requests if not kept.has(r.key, kind)}.values())
        if todo:
            with self.progress(kind, len(todo)) as advance:
                before = self.generator.stats
                for i, response in answers(todo):
                    kept.add(todo[i].key, response)
                    advance(1)
            if (stats := self.generator.stats) is not before:
                self.prompt_tokens += stats.prompt_tokens
                self.reused_tokens += stats.reused_tokens
        if truncated := sum(kept[r.key].truncated for r in requests):
            self.truncated += truncated
            total = plural(len(requests), "request")
            _log.warning("Truncated the context of %d of %s to max_length %d", truncated, total, self.max_length)
        return [kept[r.key].value for r in requests]

    def _with_keys(self, kind: str, requests: Sequence[_Request]) -> list[_Request]:
        """Hash each request; a sample also by the seed and by how many equal ones precede it."""
        seen: collections.Counter[str] = collections.Counter()
        keyed = []
        for request in requests:
            fields: dict[str, Any] = {"type": kind, "arguments": request.arguments}
            if request.generation is not None:
                fields["max_gen_toks"] = request.generation.params.max_new_tokens
            if request.generation is not None and request.generation.sampled:
                base = hash_json(fields)
                fields |= {"seed": self._seed, "repeat": seen[base]}
                seen[base] += 1
            keyed.append(request._replace(key=hash_json(fields)))
        return keyed

    def _scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        return self.generator.iter_scores([(c, d) for c, d, _ in pairs], **self._max_tokens)

    def _completions(self, todo: list[_Request]) -> Answers:
        prompts = [self._prompt(request) for request in todo]
        engine, active = self.generator.engine(), {}
        waiting = iter(range(len(todo)))
        while True:
            while len(active) < _QUEUED * self.generator.max_batch_size and (i := next(waiting, None)) is not None:
                # A sample depends on its request alone, so that it survives a resume.
                seed = int(todo[i].key[:8], 16)
                (active[i],) = engine.submit(prompts[i].context, _args(todo[i]).params, seed=seed, detokenize=True)
            if not active:
                return
            engine.step()
            for i in [i for i, output in active.items() if output.finished]:
                yield i, Response(active.pop(i).text, prompts[i].truncated)

    def _prompt(self, request: _Request) -> Pair:
        with _named(request.name):
            return self._encoder.prompt(request.arguments[0], _args(request).params.max_new_tokens)


# The harness registers its own models only while its registry is empty: `lm_eval.models` must be imported first.
register_model("dsmoe_jax")(DSMoELM)


def _name(request: Any) -> str:
    """Return task and document of a request of the harness."""
    return "" if request.task_name is None else f"{request.task_name}, document {request.doc_id}"


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Prefix the message of an invalid request with its name."""
    try:
        yield
    except DSMoEError as error:
        raise DSMoEError(f"{name}: {error}" if name else str(error)) from None


def _args(request: _Request) -> GenerationArgs:
    assert request.generation is not None
    return request.generation


def _batch_size(value: int | str | None) -> int | None:
    if value is None or str(value).partition(":")[0] == "auto":  # "auto:N" asks torch to try N times
        return None
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise DSMoEError(f"batch_size must be a positive int or 'auto', got {value!r}")
    return size
