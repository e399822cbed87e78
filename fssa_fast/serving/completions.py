"""/v1/models, /v1/chat/completions, /v1/completions."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fssa_fast.data.history import BASE_VERSION, Made
from fssa_fast.generation import Grammar, Handle, Result
from fssa_fast.generation.prompts import has_template
from fssa_fast.generation.sampler import TokenLogprobs
from fssa_fast.generation.text import StopFinder, TextStream
from fssa_fast.serving import traces
from fssa_fast.serving.errors import ApiError, failure, json_response, shutting_down, translated, unknown_user
from fssa_fast.serving.forms import ChatForm, CompletionOptions, ResponseFormat, TextForm
from fssa_fast.serving.keys import Client
from fssa_fast.serving.remembered import Completion
from fssa_fast.serving.service import Asking, Service, Serving
from fssa_fast.serving.versions import Version
from fssa_fast.users import BASE, PRIOR, UnknownUser

router = APIRouter(prefix="/v1", tags=["completions"])

SAMPLING = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed")
_REASONS = {"end": "stop", "stop": "stop", "length": "length"}


@router.get("/models")
async def models(service: Serving, client: Asking) -> Response:
    """The policy, its base model, and each of several versions."""
    return json_response({"object": "list", "data": [_model(name) for name in _names(service)]})


@router.get("/models/{name:path}")
async def model(name: str, service: Serving, client: Asking) -> Response:
    """One of them."""
    if name not in _names(service):
        raise _unknown_model(service, name)
    return json_response(_model(name))


@router.post("/chat/completions")
async def chat(form: ChatForm, request: Request, service: Serving, client: Asking) -> Response:
    """Answers a chat."""
    messages = [{"role": _role(message.role), "content": message.text()} for message in form.messages]
    asked = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    prompt: Any = messages if tells_chats(service) else "\n".join(message["content"] for message in messages) + "\n"
    limit = form.max_tokens or form.max_completion_tokens
    logprobs = (form.top_logprobs or 0) if form.logprobs else None
    return await _answer(_Chat, form, [prompt], [asked], limit, logprobs, request, service, client)


@router.post("/completions")
async def complete(form: TextForm, request: Request, service: Serving, client: Asking) -> Response:
    """Continues texts."""
    prompts = form.prompts()
    asked = [one if isinstance(one, str) else service.policy.tokenizer.decode(one) for one in prompts]
    return await _answer(
        _Text, form, prompts, asked, form.max_tokens, form.logprobs, request, service, client
    )  # fmt: skip


def _names(service: Service) -> list[str]:
    """The policy, the base model, and, where there are several, the policy's versions."""
    name, versions = service.settings.name, service.versions
    return [name, f"{name}:base", *(f"{name}@{one.name}" for one in versions if len(versions) > 1)]


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "fssa"}


def _unknown_model(service: Service, name: str) -> ApiError:
    names = " or ".join(_names(service))
    return ApiError(404, "model_not_found", f"model: expected {names}, got {name!r:.200}", "model")


def tells_chats(service: Service) -> bool:
    """Whether chats are told by the tokenizer's template: where the policy was trained so, or does not say."""
    chat = service.policy.chat
    return has_template(service.policy.tokenizer) if chat is None else chat


def _role(role: str) -> str:
    return "system" if role == "developer" else role


# ------------------------------------------------------------ from a form to the engine


@dataclass(frozen=True)
class Whom:
    """Whose rows steer, by stored names, how strongly, in which version, and, for feedback, for which one user."""

    user: str | Mapping[str, float]
    strength: float
    version: Version
    one: str | None

    def made(self, latent: int | None, sampling: Mapping[str, Any]) -> Made:
        """What its answers carry."""
        name = BASE_VERSION if self.user == BASE else self.version.name
        return Made(name, latent, self.strength, {key: v for key, v in sampling.items() if v is not None})


def whom(form: CompletionOptions, service: Service, client: Client) -> Whom:
    """Whom a request is for. Raises ApiError for an unknown model or name; users are looked up by the engine."""
    names = _names(service)
    if form.model not in names:
        raise _unknown_model(service, form.model)
    policy, base, *_ = names
    one = None if form.user is None else client.stored(form.user)
    version = service.versions.get(form.model.removeprefix(f"{policy}@")) or service.versions.of(one)
    steering = form.steering
    if form.model == base:
        if steering is not None:
            raise ApiError(
                400, "invalid_value", f"steering: expected none with {base}, which nobody steers", "steering"
            )
        return Whom(BASE, 1.0, version, one)
    if steering is not None and steering.users is not None:
        blend = {name if name in (BASE, PRIOR) else client.stored(name): w for name, w in steering.users.items()}
        return Whom(blend, steering.strength, version, None)
    return Whom(PRIOR if one is None else one, 1.0 if steering is None else steering.strength, version, one)


def submit(
    service: Service, client: Client, whom: Whom, prompts: Sequence[Any], count: int, limit: int | None,
    options: Mapping[str, Any],
) -> tuple[list[Handle], Made]:  # fmt: skip
    """Begins `count` answers to each prompt, and says how they are made. Raises ApiError, or what the engine raises;
    none is begun then."""
    if options["seed"] is None and len(prompts) == 1:
        options = {**options, "seed": secrets.randbits(63)}  # so that it can be told
    sampling = {"max_tokens": limit, **{name: options.get(name) for name in SAMPLING}}
    while True:
        latent = _latent(whom)
        handles = _submit(service, client, whom, prompts, count, limit, options)
        if _latent(whom) == latent:
            return handles, whom.made(latent, sampling)
        for handle in handles:  # of which version the row is, that was given meanwhile, cannot be told
            handle.cancel()


def _latent(whom: Whom) -> int | None:
    """The version of the user who steers, or None: of nobody, of several, of one who is not there."""
    try:
        return None if whom.user != whom.one else whom.version.policy.users[str(whom.one)].version
    except UnknownUser:
        return None


def _submit(
    service: Service, client: Client, whom: Whom, prompts: Sequence[Any], count: int, limit: int | None,
    options: Mapping[str, Any],
) -> list[Handle]:  # fmt: skip
    handles: list[Handle] = []
    user: str | Mapping[str, float] = whom.user
    if service.settings.create_users and isinstance(user, str) and user == whom.one and user not in service.users:
        user = PRIOR  # made by the first choice: nothing is known of this user until then
    try:
        for prompt in prompts:
            handles += whom.version.engine.submit_many(
                prompt, user, count, max_new_tokens=limit, strength=whom.strength, namespace=client.namespace, **options
            )
    except BaseException as error:
        for handle in handles:
            handle.cancel()
        if isinstance(error, UnknownUser):
            names = [user] if isinstance(user, str) else list(user)
            missing = [name for name in names if name not in (BASE, PRIOR) and name not in service.users]
            raise unknown_user(client.public((missing or names)[0])) from error
        raise
    return handles


def sampling(form: CompletionOptions, logprobs: int | None) -> dict[str, Any]:
    """The engine's arguments for how tokens are chosen. Raises ApiError for a form of answers that is none."""
    stop = [form.stop] if isinstance(form.stop, str) else form.stop or []
    if not all(stop):
        raise ApiError(400, "invalid_value", "stop: expected texts that are not empty", "stop")
    return {
        "temperature": form.temperature,
        "top_p": form.top_p,
        "top_k": form.top_k,
        "min_p": form.min_p,
        "seed": None if form.seed is None else form.seed % (1 << 63),
        "repetition_penalty": form.repetition_penalty,
        "presence_penalty": form.presence_penalty,
        "frequency_penalty": form.frequency_penalty,
        "logit_bias": {int(token): value for token, value in (form.logit_bias or {}).items()} or None,
        "allowed_tokens": form.allowed_token_ids,
        "logprobs": logprobs,
        "stop": stop,
        "grammar": _grammar(form.response_format),
    }


def _grammar(form: ResponseFormat | None) -> Grammar | None:
    if form is None or form.type == "text":
        return None
    try:
        if form.type == "regex":
            return Grammar.regex(form.pattern or "")
        return Grammar.json_schema({"type": "object"} if form.json_schema is None else form.json_schema.given)
    except ImportError as error:
        raise ApiError(400, "unsupported_parameter", "response_format: not supported by this server, which has no "
                       "llguidance", "response_format") from error  # fmt: skip


async def _answer(
    kind: type[_Kind], form: CompletionOptions, prompts: Sequence[Any], asked: Sequence[str], limit: int | None,
    logprobs: int | None, request: Request, service: Service, client: Client,
) -> Response:  # fmt: skip
    began = time.perf_counter()
    for_whom = whom(form, service, client)
    with ExitStack() as held:
        held.enter_context(service.using(for_whom.version))
        held.enter_context(client.open())
        try:
            options = sampling(form, logprobs)
            begun = service.call(submit, service, client, for_whom, prompts, form.n, limit, options)
            handles, made = await begun
        except Exception as error:
            raise translated(error) from error
        for handle in handles:
            held.callback(handle.cancel)
        answers = Answers(service, client, handles, began)
        completion = kind(form.model, answers, made)
        traces.current().set_attribute("gen_ai.request.model", form.model)

        def remember(results: Sequence[Result]) -> None:
            if service.history is not None:
                service.history.completion(completion.id, for_whom.one, made)
            if len(prompts) == 1:  # feedback is on answers to one prompt
                texts = tuple(result.text or "" for result in results)
                one = Completion(for_whom.one, asked[0], texts, made)
                service.completions.put((client.namespace, completion.id), one, one.size())

        if not form.stream:
            try:
                results = await _unless_gone(request, answers.all())
            except Exception as error:
                raise failure(error) from error
            if results is None:
                return Response(status_code=499)  # nobody is there to read it
            remember(results)
            return json_response(completion.whole(results, form.n))
        with_usage = form.stream_options is not None and form.stream_options.include_usage
        return _Events(completion.events(with_usage, form.n, remember), held.pop_all())


class _Events(StreamingResponse):
    """Server-sent events; whatever becomes of the client, what they stand on is let go at their end."""

    def __init__(self, events: AsyncIterator[str], held: ExitStack) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


async def _unless_gone(request: Request, work: Any) -> Any:
    """What the work gives, or None where the client has gone before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


# ------------------------------------------------------------ answers as they come


@dataclass(frozen=True)
class Piece:
    """What has come of one request: text, the log-probabilities of its tokens if asked for, at its end the result."""

    index: int
    text: str
    logprobs: Sequence[TokenLogprobs] | None
    result: Result | None


class Answers:
    """The texts of some requests as they come, with the server's figures about them."""

    def __init__(self, service: Service, client: Client, handles: Sequence[Handle], began: float) -> None:
        self.handles, self._span = handles, traces.current()
        self._service, self._client, self._last = service, client, [began] * len(handles)
        self._begun = [False] * len(handles)

    async def pieces(self) -> AsyncIterator[Piece]:
        """What comes, with the last piece of a request its result."""
        texts = [PiecewiseText(self._service.policy.tokenizer, handle) for handle in self.handles]
        given = [0] * len(self.handles)
        async for index, tokens, ended in self._service.bridge.follow(self.handles):
            self._time(index, len(tokens))
            text, logprobs = texts[index].add(tokens), self.handles[index].logprobs
            if logprobs is not None:
                begin, given[index] = given[index], given[index] + len(tokens)
                logprobs = logprobs[begin : given[index]]
            if ended:
                result = self._ended(index)
                yield Piece(index, text + texts[index].rest(result), logprobs, result)
            elif text or logprobs:
                yield Piece(index, text, logprobs, None)

    def token_text(self, token: int) -> str:
        """One token by itself."""
        return self._service.policy.tokenizer.decode([token])

    async def all(self) -> list[Result]:
        """All results, in order."""
        results: list[Any] = [None] * len(self.handles)
        async for index, tokens, ended in self._service.bridge.follow(self.handles):
            self._time(index, len(tokens))
            if ended:
                results[index] = self._ended(index)
        return results

    def _ended(self, index: int) -> Result:
        """A request's result. Raises what it failed of; ApiError where the server's end has cut it short."""
        result = self.handles[index].result()
        metrics = self._service.metrics
        metrics.prompt_tokens.inc(result.prompt_tokens)
        metrics.cached_tokens.inc(result.cached_tokens)
        metrics.answer_tokens.inc(len(result.tokens))
        self._client.charge(result.prompt_tokens + len(result.tokens))
        self._span.add_event("answered", {
            "index": index, "reason": result.reason, "gen_ai.usage.input_tokens": result.prompt_tokens,
            "cached_tokens": result.cached_tokens, "gen_ai.usage.output_tokens": len(result.tokens),
        })  # fmt: skip
        if result.reason == "cancelled":
            raise shutting_down()
        return result

    def _time(self, index: int, tokens: int) -> None:
        if tokens:
            now = time.perf_counter()
            seconds, self._last[index] = now - self._last[index], now
            metrics = self._service.metrics
            (metrics.between if self._begun[index] else metrics.first).observe(seconds)
            if not self._begun[index]:
                self._span.add_event("first token", {"index": index})
            self._begun[index] = True


def usage(results: Sequence[Result], count: int) -> dict[str, Any]:
    """Tokens of some answers, `count` to a prompt: a prompt counts once."""
    prompt = sum(result.prompt_tokens for result in results[::count])
    answer = sum(len(result.tokens) for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(result.cached_tokens for result in results[::count])},
    }


class PiecewiseText:
    """The text of one request as it comes, in pieces of whole characters that end before a stop string."""

    def __init__(self, tokenizer: Any, handle: Handle) -> None:
        self._stream, self._stop, self._given = TextStream(tokenizer), StopFinder(handle.stop), 0

    def add(self, tokens: Sequence[int]) -> str:
        """What is certain of the text with these tokens, and was not before."""
        piece = ""
        for token in tokens:
            if not self._stop.found:
                piece += self._stop.add(self._stream.add(token))
        self._given += len(piece)
        return piece

    def rest(self, result: Result) -> str:
        """What of the result's text has not been given."""
        return (result.text or "")[self._given :]


# ------------------------------------------------------------ OpenAI's forms


class _Kind:
    """A completion in one of OpenAI's forms."""

    prefix: str
    object: str
    chunk: str

    def __init__(self, model: str, answers: Answers, made: Made) -> None:
        self.id = self.prefix + uuid.uuid4().hex
        self._model, self._answers, self._made, self._created = model, answers, made, int(time.time())

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def first(self, index: int) -> dict[str, Any] | None:
        """What a stream of an answer begins with."""
        raise NotImplementedError

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any]:
        """A piece of an answer."""
        raise NotImplementedError

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """What a stream of an answer ends with."""
        raise NotImplementedError

    def whole(self, results: Sequence[Result], count: int) -> dict[str, Any]:
        """The body of what is not streamed; count: answers to a prompt."""
        choices = [self.choice(index, result) for index, result in enumerate(results)]
        return {**self._head(self.object), "choices": choices, "usage": usage(results, count),
                "steering": asdict(self._made)}  # fmt: skip

    async def events(
        self, with_usage: bool, count: int, remember: Callable[[Sequence[Result]], None]
    ) -> AsyncIterator[str]:
        """The events of what is streamed; the completion is remembered before the client knows that it has ended."""
        head = self._head(self.chunk)
        if with_usage:
            head["usage"] = None

        def event(choice: dict[str, Any]) -> str:
            return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

        results: list[Any] = [None] * len(self._answers.handles)
        left = len(results)
        try:
            for index in range(left):
                if (first := self.first(index)) is not None:
                    yield event(first)
            async for piece in self._answers.pieces():
                if piece.text or piece.logprobs:
                    yield event(self.piece(piece.index, piece.text, piece.logprobs))
                if piece.result is not None:
                    results[piece.index], left = piece.result, left - 1
                    if not left:
                        remember(results)
                    yield event(self.last(piece.index, _REASONS[piece.result.reason]))
        except Exception as error:  # the status has been sent: what is left is to say it in the stream
            yield f"data: {json.dumps(failure(error).body())}\n\n"
            return
        if with_usage:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage(results, count)})}\n\n"
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model,
                "system_fingerprint": self._made.version}  # fmt: skip


class _Chat(_Kind):
    prefix, object, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        message = {"role": "assistant", "content": result.text, "refusal": None}
        logprobs = self._logprobs(result.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _REASONS[result.reason]}

    def _logprobs(self, found: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        def one(token: int, logprob: float) -> dict[str, Any]:
            text = self._answers.token_text(token)
            part = "\ufffd" in text  # of a character: its bytes are not known from the text
            return {"token": text, "logprob": logprob, "bytes": None if part else list(text.encode())}

        if found is None:
            return None
        content = [{**one(each.token, each.logprob), "top_logprobs": [one(*pair) for pair in each.top]}
                   for each in found]  # fmt: skip
        return {"content": content, "refusal": None}

    def first(self, index: int) -> dict[str, Any] | None:
        return self._delta(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any]:
        return {**self._delta(index, {"content": text}), "logprobs": self._logprobs(logprobs)}

    def last(self, index: int, reason: str) -> dict[str, Any]:
        return {**self._delta(index, {}), "finish_reason": reason}

    @staticmethod
    def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


class _Text(_Kind):
    prefix, object, chunk = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: str, answers: Answers, made: Made) -> None:
        super().__init__(model, answers, made)
        self._offsets = [0] * len(answers.handles)  # characters of an answer's tokens that have been given

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        return {**self.piece(index, result.text or "", result.logprobs), "finish_reason": _REASONS[result.reason]}

    def _logprobs(self, index: int, found: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        texts = [self._answers.token_text(each.token) for each in found]
        tops = [{self._answers.token_text(token): value for token, value in each.top} for each in found]
        *offsets, self._offsets[index] = itertools.accumulate(map(len, texts), initial=self._offsets[index])
        return {"tokens": texts, "token_logprobs": [each.logprob for each in found], "top_logprobs": tops,
                "text_offset": offsets}  # fmt: skip

    def first(self, index: int) -> dict[str, Any] | None:
        return None

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any]:
        found = self._logprobs(index, logprobs)
        return {"index": index, "text": text, "logprobs": found, "finish_reason": None}

    def last(self, index: int, reason: str) -> dict[str, Any]:
        return {**self.piece(index, "", None), "finish_reason": reason}
