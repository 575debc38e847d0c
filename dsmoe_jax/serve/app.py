"""The routes of the server: `make_app`, then `Server.completions` and `Server.chat_completions`."""

import base64
import functools
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from importlib import resources
from typing import Any, Final, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dsmoe_jax.generate import Generator, SamplingParams
from dsmoe_jax.generate.prefix_cache import MIN_SHARED
from dsmoe_jax.serve.api_error import ApiError, from_validation, refusals
from dsmoe_jax.serve.config import ServeConfig
from dsmoe_jax.serve.generation import Generation
from dsmoe_jax.serve.limits import Guard
from dsmoe_jax.serve.metrics import Metrics
from dsmoe_jax.serve.openapi import document
from dsmoe_jax.serve.prompts import EncodedPrompt, chat_prompt, completion_prompts, sampling_params
from dsmoe_jax.serve.responses import ChatFormat, CompletionFormat, Echo
from dsmoe_jax.serve.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, SamplingRequest, TokenizeRequest
from dsmoe_jax.serve.streaming import EventStream, JSONResponse, collect, unless_disconnected
from dsmoe_jax.serve.token_text import TokenTexts
from dsmoe_jax.serve.worker import Worker, top_bucket
from dsmoe_jax.text.tokenizer import Tokenizer

_CLIENT_CLOSED_REQUEST: Final = 499  # as in nginx, for logs: the client is gone
_Body = TypeVar("_Body", bound=BaseModel)


class Server:
    """Handlers of all routes.

    Attributes:
        worker: The engine.
        metrics: Its metrics.
    """

    def __init__(self, generator: Generator, config: ServeConfig, *, warm_up: bool = True):
        """Create the handlers; `warm_up` compiles the common programs before the server is ready."""
        self.generator, self.config, self.metrics = generator, config, Metrics()
        options = {"max_queue": config.max_queue, "timeout": config.request_timeout, "warm_up": warm_up}
        self.worker = Worker(generator, metrics=self.metrics, **options)
        self._texts = TokenTexts(generator.tokenizer)
        self._created = int(time.time())
        self._page, self._page_headers = _read_page()

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = await self._read(request, CompletionRequest)
        prompts = await run_in_threadpool(completion_prompts, self.generator, body)
        params = sampling_params(self.generator, body, prompts)
        if not body.echo:
            return await self._generate(request, body, prompts, params, CompletionFormat)
        echoes = await unless_disconnected(request, self._echoes(prompts, body.logprobs))
        if echoes is None:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        return await self._generate(request, body, prompts, params, CompletionFormat, echoes=echoes)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await self._read(request, ChatRequest)
        options = {"parse_special_tokens": self.config.parse_special_tokens}
        prompt = await run_in_threadpool(chat_prompt, self.generator, body.messages, **options)
        params = sampling_params(self.generator, body, [prompt])
        return await self._generate(request, body, [prompt], params, ChatFormat)

    async def _echoes(self, prompts: Sequence[EncodedPrompt], logprobs: int | None) -> list[Echo]:
        """Return the text and the scores of prompts."""
        decode = self.generator.tokenizer.decode if self.generator.tokenizer else lambda ids: ""
        texts = [decode(prompt.token_ids) if prompt.text is None else prompt.text for prompt in prompts]
        scored = [prompt.token_ids for prompt in prompts if len(prompt.token_ids) > 1 and logprobs is not None]
        top = top_bucket(logprobs, self.generator.config.vocab_size)
        scores = iter(await self.worker.score(scored, top) if scored else [])
        has_score = [len(prompt.token_ids) > 1 and logprobs is not None for prompt in prompts]
        return [Echo(text, next(scores) if scored else None) for text, scored in zip(texts, has_score, strict=True)]

    async def _generate(
        self,
        request: Request,
        body: SamplingRequest,
        prompts: Sequence[EncodedPrompt],
        params: SamplingParams,
        make_format: Callable[..., CompletionFormat | ChatFormat],
        **options: Any,
    ) -> Response:
        """Generate, and respond as a stream or at once."""
        token_ids = [prompt.token_ids for prompt in prompts]
        form = make_format(body, self.config.model_name, prompts, self._texts, **options)
        if getattr(body, "max_tokens", None) == 0:
            generation = Generation.empty(token_ids, params)
        else:
            shareable = isinstance(body, ChatRequest) or max(map(len, token_ids)) >= MIN_SHARED
            choices = {"stream": bool(body.stream), "routing": bool(body.routing), "retain_prefix": shareable}
            generation = self.worker.generate(token_ids, params, **choices)
        if body.stream:
            return EventStream(generation, form, timeout=self.config.request_timeout)
        try:
            deltas = await unless_disconnected(request, collect(generation))
        finally:
            generation.cancel()
        return Response(status_code=_CLIENT_CLOSED_REQUEST) if deltas is None else JSONResponse(form.whole(deltas))

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        config = self.generator.config
        layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
        return {
            "id": self.config.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "dsmoe_jax",
            "parent": self.config.base_name,
            "max_model_len": self.generator.context_length,
            "moe_layers": layers,
            "n_routed_experts": config.n_routed_experts,
        }

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        body = await self._read(request, TokenizeRequest)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "exactly one of prompt and messages is required", param="prompt")
        ids = await run_in_threadpool(self._tokenize, body)
        texts = await run_in_threadpool(lambda: [*map(self._texts.of, ids)]) if body.return_token_strs else None
        length = self.generator.context_length
        return JSONResponse({"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": texts})

    def _tokenize(self, body: TokenizeRequest) -> list[int]:
        if body.messages is not None:
            options = {"parse_special_tokens": self.config.parse_special_tokens}
            return chat_prompt(self.generator, body.messages, **options).token_ids
        with refusals("prompt"):
            return self._tokenizer().encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        body = await self._read(request, DetokenizeRequest)
        decode = functools.partial(self._tokenizer().decode, skip_special_tokens=False)
        if (highest := max(body.tokens, default=0)) >= (size := self.generator.config.vocab_size):
            raise ApiError(400, f"tokens: token id {highest} is outside the vocabulary of {size}", param="tokens")
        return JSONResponse({"prompt": await run_in_threadpool(decode, body.tokens)})

    async def tokenizer_info(self, request: Request) -> Response:
        """GET /tokenizer_info, for the remote tokenizer of lm-evaluation-harness."""
        tokenizer = self._tokenizer()
        names = {name: tokenizer.special_tokens_map.get(name) for name in ("bos_token", "eos_token", "pad_token")}
        template = tokenizer.chat_templates.get("default")
        return JSONResponse({"tokenizer_class": type(tokenizer).__name__, **names, "chat_template": template})

    def _tokenizer(self) -> Tokenizer:
        if self.generator.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer")
        return self.generator.tokenizer

    async def health(self, request: Request) -> Response:
        """GET /health: 200 unless the engine has failed."""
        failed = self.worker.failed
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    async def ready(self, request: Request) -> Response:
        """GET /ready: 200 once the common programs are compiled, until the server shuts down."""
        states = {"failed": self.worker.failed, "draining": self.worker.draining, "starting": not self.worker.ready}
        state = next((name for name, holds in states.items() if holds), None)
        return JSONResponse({"status": state or "ready"}, 503 if state else 200)

    async def prometheus(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def page(self, request: Request) -> Response:
        """GET /: the page to chat with the model."""
        return Response(self._page, media_type="text/html", headers=self._page_headers)

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return JSONResponse(document(_BODIES, _PAGES))

    async def _read(self, request: Request, schema: type[_Body]) -> _Body:
        """Read and validate the body of a request, and its model."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Pages of other sites may send other types without asking.
            raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type must be application/json")
        self.worker.check_open()
        try:
            body = schema.model_validate_json(await request.body())
        except ValidationError as error:
            raise from_validation(error, list(schema.model_fields)) from None
        if (name := getattr(body, "model", None)) is not None:
            self._check_model(name)
        return body

    def _check_model(self, name: str) -> None:
        if name != self.config.model_name:
            message = f"the model {name!r:.200} does not exist; this server has {self.config.model_name!r}"
            raise ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")


_BODIES: Final = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_PAGES: Final = {
    **dict.fromkeys(("/v1/models", "/tokenizer_info", "/health", "/ready", "/openapi.json"), "application/json"),
    "/metrics": "text/plain",
    "/": "text/html",
}


def make_app(server: Server) -> Starlette:
    """Return the ASGI app of a server, whose worker the caller starts and stops."""
    routes: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/v1/completions": server.completions,
        "/v1/chat/completions": server.chat_completions,
        "/tokenize": server.tokenize,
        "/detokenize": server.detokenize,
        "/v1/models": server.models,
        "/v1/models/{name:path}": server.model,
        "/tokenizer_info": server.tokenizer_info,
        "/health": server.health,
        "/ready": server.ready,
        "/metrics": server.prometheus,
        "/openapi.json": server.openapi,
        "/": server.page,
    }

    origins = [*server.config.allow_origins]
    cors: dict[str, Any] = {
        "allow_origins": origins,
        "allow_methods": ["*"],
        "allow_headers": ["Authorization", "Content-Type"],
    }
    guard = {"config": server.config, "metrics": server.metrics, "paths": frozenset(routes)}
    app = Starlette(
        routes=[Route(path, run, methods=["POST" if path in _BODIES else "GET"]) for path, run in routes.items()],
        middleware=[*([Middleware(CORSMiddleware, **cors)] if origins else []), Middleware(Guard, **guard)],
        exception_handlers={HTTPException: _http_error},  # type: ignore[dict-item]
    )
    app.router.redirect_slashes = False
    return app


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Respond to unknown paths and methods."""
    message = f"{error.detail}: {request.method} {request.url.path:.200}"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)


def _read_page() -> tuple[bytes, dict[str, str]]:
    """Return the page, and headers that allow its own script and style alone."""
    page = resources.files("dsmoe_jax.serve").joinpath("page/index.html").read_bytes()
    digests = {}
    for tag in ("script", "style"):
        (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        digests[tag] = f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(source).digest()).decode()}'"
    policy = "; ".join(["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'"])
    policy = "; ".join([policy, "frame-ancestors 'none'", *digests.values()])
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
