"""An OpenAI-compatible server: completions and chat, streaming or not, on starlette."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tierd.clock import monotonic_seconds, unix_milliseconds
from tierd.errors import Busy, Invalid, TierdError
from tierd_engine.api import Asked, NoModel, asked_of
from tierd_engine.async_llm import AsyncLLM, Piece
from tierd_engine.llm import LLM
from tierd_engine.metrics import Metrics
from tierd_engine.request import Hints, Sampling

T = TypeVar("T")

BODY_BYTES_MAX = 16 << 20
GONE = 499
"""The status, never seen by anybody, of an answer whose client has gone (nginx's number)."""


class Server:
    """The routes, around one LLM under the names `models`. `app` is the ASGI application, which closes the LLM at its end."""

    def __init__(self, llm: LLM, models: list[str]) -> None:
        self.models = models
        self._llm = llm
        self._engine: AsyncLLM
        self._metrics = Metrics(llm.engine)
        self._started = unix_milliseconds() // 1000
        routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._list_models),
            Route("/metrics", self._show_metrics),
            Route("/health", self._health),
        ]
        handlers = {TierdError: refuse, HTTPException: no_route, ClientDisconnect: nobody}
        self.app = Starlette(routes=routes, lifespan=self._life, exception_handlers=handlers)

    @asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        self._engine = AsyncLLM(self._llm)
        yield
        await self._engine.close()

    async def _completions(self, request: Request) -> Response:
        return await self._serve(request, chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._serve(request, chat=True)

    async def _list_models(self, _: Request) -> Response:
        entries = [{"id": name, "object": "model", "created": self._started, "owned_by": "tierd"} for name in self.models]
        return JSONResponse({"object": "list", "data": entries})

    async def _show_metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _health(self, _: Request) -> Response:
        failure = self._engine.failure
        return JSONResponse({"status": "failed" if failure else "ok"}, 503 if failure else 200)

    async def _serve(self, request: Request, chat: bool) -> Response:
        began = monotonic_seconds()
        asked, most = asked_of(await body_of(request), chat, set(self.models))
        prompts = await asyncio.to_thread(self._tokens, asked, chat)
        longest = max(map(len, prompts))
        room = self._llm.engine.room() - longest
        if room < 1:
            what = "messages" if chat else "prompt"
            raise Invalid(f"{what}: {longest} tokens are too long; the model and its pages hold {longest + room}")
        sampling = replace(asked.sampling, max_tokens=most or room)
        for tokens in prompts:
            self._llm.engine.check_request(tokens, sampling)
        answer = Answer(asked, chat, len(prompts) * sampling.n, sum(map(len, prompts)))
        pieces = self._pieces(prompts, sampling, asked.hints, began)
        if not asked.stream:
            return JSONResponse(await unless_gone(request, answer.whole(pieces)))
        first = await unless_gone(request, anext(pieces))  # what is refused now has a status of its own
        return StreamingResponse(answer.events(first, pieces), media_type="text/event-stream")

    def _tokens(self, asked: Asked, chat: bool) -> list[list[int]]:
        """Token ids of all prompts of a request."""
        tokenizer = self._llm.tokenizer
        if not chat:
            many = asked.content
            if isinstance(many, str) or (many and isinstance(many[0], int)):
                many = [many]
            if not many:
                raise Invalid("prompt: at least one is needed")
            return [tokenizer(one)["input_ids"] if isinstance(one, str) else token_ids(one) for one in many]
        if not tokenizer.chat_template:
            raise Invalid("messages: this model has no chat template; use /v1/completions")
        try:
            text = tokenizer.apply_chat_template(asked.content, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program by the model's authors, and may refuse anything
            raise Invalid(f"messages: the model's chat template refuses them: {error}") from error
        return [tokenizer(text, add_special_tokens=False)["input_ids"]]

    async def _pieces(
        self, prompts: list[list[int]], sampling: Sampling, hints: Hints, began: float
    ) -> AsyncGenerator[Piece, None]:
        """What the engine answers, observed."""
        seen: set[int] = set()
        async with aclosing(self._engine.stream(prompts, sampling, hints)) as pieces:
            async for piece in pieces:
                if piece.index not in seen:
                    self._metrics.first_token_seconds.observe(piece.first_token_seconds)
                    seen.add(piece.index)
                yield piece
        self._metrics.request_seconds.observe(monotonic_seconds() - began)


class Answer:
    """Makes OpenAI's objects of pieces."""

    def __init__(self, asked: Asked, chat: bool, count: int, prompt_tokens: int) -> None:
        self._chat = chat
        self._asked = asked
        self._prompt_tokens = prompt_tokens
        self._texts = [""] * count
        self._reasons = [""] * count
        self._tokens = [0] * count
        self._hits = [0] * count
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if chat and asked.stream else kind,
            "created": unix_milliseconds() // 1000,
            "model": asked.model,
        }

    async def whole(self, pieces: AsyncGenerator[Piece, None]) -> dict[str, Any]:
        """One object with all answers."""
        async with aclosing(pieces):
            async for piece in pieces:
                self._add(piece)
        choices = []
        for index, (text, reason) in enumerate(zip(self._texts, self._reasons, strict=True)):
            content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            choices.append({"index": index, **content, "logprobs": None, "finish_reason": reason})
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self, first: Piece, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[str, None]:
        """Server-sent events, one for each piece that shows something."""
        started: set[int] = set()
        async with aclosing(pieces):
            try:
                piece: Piece | None = first
                while piece is not None:
                    self._add(piece)
                    if piece.text or piece.reason or piece.index not in started:
                        yield event({**self._head, "choices": [self._delta(piece, piece.index not in started)]})
                    started.add(piece.index)
                    piece = await anext(pieces, None)
            except TierdError as error:
                yield event(error_body(error))
                return
        if self._asked.include_usage:
            yield event({**self._head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _add(self, piece: Piece) -> None:
        self._texts[piece.index] += piece.text
        self._reasons[piece.index] = piece.reason
        self._tokens[piece.index] = piece.tokens
        self._hits[piece.index] = piece.hit_tokens

    def _delta(self, piece: Piece, first: bool) -> dict[str, Any]:
        content: dict[str, Any] = {"text": piece.text}
        if self._chat:
            delta = {"role": "assistant"} if first else {}
            content = {"delta": delta | ({"content": piece.text} if piece.text or first else {})}
        return {"index": piece.index, **content, "logprobs": None, "finish_reason": piece.reason or None}

    def _usage(self) -> dict[str, Any]:
        """Token counts; a prompt counts once, and its hits are those of its first sample: the others share its work."""
        hits = sum(self._hits[:: self._asked.sampling.n])
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": sum(self._tokens),
            "total_tokens": self._prompt_tokens + sum(self._tokens),
            "prompt_tokens_details": {"cached_tokens": hits},
        }


async def body_of(request: Request) -> Any:
    """The parsed JSON body; raises Invalid when it is none or too large."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES_MAX:
            raise Invalid(f"body: over {BODY_BYTES_MAX} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"body: not valid JSON: {error}") from error


def token_ids(prompt: Any) -> list[int]:
    """A prompt of token ids; raises Invalid."""
    if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
        raise Invalid(f"prompt: {prompt!r:.80} is neither text nor a list of token ids")
    return prompt


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What the work returns; when the client goes away the work is cancelled, which aborts its request."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def disconnect(request: Request) -> None:
    """Wait until the client has gone; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def error_body(error: TierdError) -> dict[str, Any]:
    """An error as OpenAI's clients read it; `param` is the field that the message begins with."""
    param = str(error).split(":")[0] if isinstance(error, Invalid) else None
    kind = "invalid_request_error" if isinstance(error, Invalid) else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": param, "code": error.code}}


async def refuse(_: Request, error: Exception) -> Response:
    """What is wrong with a request, as JSON."""
    assert isinstance(error, TierdError)
    statuses: dict[type, int] = {NoModel: 404, Invalid: 400, Busy: 429}
    return JSONResponse(error_body(error), statuses.get(type(error), 503))


async def no_route(request: Request, error: Exception) -> Response:
    """A path or method that there is not."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, error.status_code)


async def nobody(_: Request, error: Exception) -> Response:
    """The client has gone: nobody reads this."""
    return Response(status_code=GONE)
