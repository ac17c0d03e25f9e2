"""The routes of `hilda serve`, and the server around them.

GET /health; POST /generate, whose stream shows every forward; /jobs to run the book; OpenAI's /v1/completions, /v1/chat/completions and /v1/models.
Entry points: `serve`, `create_app`.
"""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import AsyncIterator

import psutil
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from pydantic import Field
from starlette.exceptions import HTTPException

from hildalib import HildaError, __version__
from hildalib.engine import Answer, Choices, Engine, Step, open_engine
from hildalib.serving.batching import Batcher
from hildalib.serving.completions import Chat, Completion, Reply, Settings, as_refused, pieces, sent, supported, usage
from hildalib.serving.guard import LOOPBACK, Guard, Limits, Refused, error_body, internal_error
from hildalib.serving.jobs import Job, Jobs, Order, watch

LOG = logging.getLogger("hildalib.serving")
TOKEN_VARIABLE = "HILDA_TOKEN"


class Generation(Settings):
    """Body of /generate. stream: NDJSON, a line for each forward and one with the answer."""

    prompt: str
    max_new_tokens: int | None = Field(None, ge=1)


class Gone(Exception):
    """The client has left."""


class Desk:
    """What the routes share: the engine, its queue, the limits and the jobs."""

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits, self.jobs, self.begun = engine, limits, Jobs(), time.monotonic()
        self.batcher = Batcher(engine, limits.queue, limits.batch)

    async def events(self, request: Request, wish: Settings, text: str, new: int | None) -> AsyncIterator[Step | Answer]:
        """Checks a request, queues it and hands on its events; a client that leaves takes its request along. new None: as many as is usual."""
        supported(wish)
        new = min(Choices().max_new_tokens, self.limits.new) if new is None else new
        limits, choices, stops = self.limits, wish.choices(new), wish.stops()
        if new > limits.new:
            raise Refused(400, f"{new} new tokens are more than the {limits.new} allowed here; ask for fewer, or start the server with a larger "
                          "--max-new-tokens", "too_many_tokens")
        try:
            ids = await asyncio.to_thread(self.engine.encode, text)
            if len(ids) > limits.prompt:
                raise Refused(400, f"the prompt has {len(ids)} tokens, more than the {limits.prompt} allowed here; shorten it, or start the server "
                              "with a larger --max-prompt", "prompt_too_long", "prompt")
            self.engine.check(ids, choices)
        except HildaError as error:
            raise as_refused(error) from None
        return self._follow(request, self.batcher.submit(ids, choices, stops, bool(wish.stream)))

    async def _follow(self, request: Request, ticket) -> AsyncIterator[Step | Answer]:
        left, event, coming = asyncio.ensure_future(_disconnected(request)), None, None
        try:
            while not isinstance(event, Answer):
                coming = asyncio.ensure_future(ticket.mail.get())
                await asyncio.wait({coming, left}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    raise Gone
                if isinstance(event := coming.result(), Exception):
                    raise event
                yield event
        finally:
            for task in filter(None, (left, coming)):
                task.cancel()
            self.batcher.cancel(ticket)

    async def answer(self, events: AsyncIterator[Step | Answer]) -> Answer:
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, Answer):
                    return event
        raise Gone


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _guarded(lines: AsyncIterator[str], shape=lambda text: text + "\n") -> AsyncIterator[str]:
    """A stream whose status is sent already: an error becomes its last line."""
    try:
        async with contextlib.aclosing(lines):
            async for line in lines:
                yield line
    except Gone:
        return
    except Refused as refused:
        yield shape(error_body(refused.status, refused.message, refused.code, refused.param).decode())
    except Exception as error:
        yield shape(internal_error(error).decode())


def create_app(engine: Engine, limits: Limits = Limits(), host: str = "127.0.0.1", token: str | None = None, names: tuple[str, ...] = ()) -> Guard:
    """The ASGI application. host, token, names: as in `Guard`. Its worker ends with the application's lifespan."""
    desk = Desk(engine, limits)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        await asyncio.to_thread(desk.jobs.stop)
        await asyncio.to_thread(desk.batcher.stop)

    app = FastAPI(title="HILDA", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere
    app.state.desk = desk
    _errors(app)

    @app.get("/health")
    async def health() -> dict:
        """Alive, with what, how busy and how large."""
        batcher = desk.batcher
        return {"status": "ok", "version": __version__, "model": engine.name, "context": engine.context, "waiting": len(batcher.waiting),
                "running": batcher.running, "counts": dict(batcher.counts), "seconds": round(time.monotonic() - desk.begun, 1),
                "rss_mb": round(psutil.Process().memory_info().rss / 2**20, 1)}

    @app.post("/generate")
    async def generate(wish: Generation, request: Request):
        """Text after a prompt; as a stream, what each forward wrote and edited."""
        events = await desk.events(request, wish, wish.prompt, wish.max_new_tokens)
        if wish.stream:
            return StreamingResponse(_guarded(_canvas(engine, events)), media_type="application/x-ndjson")
        return _final(await desk.answer(events))

    async def complete(wish: Completion | Chat, request: Request, chat: bool):
        if wish.model not in (None, engine.name):
            raise Refused(404, f"there is no model {wish.model[:200]!r} here, only {engine.name!r}", "model_not_found", "model")
        events, reply = await desk.events(request, wish, wish.text(engine.tokenizer), wish.new()), Reply(engine.name, chat)
        if wish.stream:
            counted = bool(wish.stream_options and wish.stream_options.include_usage)
            return StreamingResponse(_guarded(pieces(reply, events, wish.stops(), counted), sent), media_type="text/event-stream")
        return reply.whole(await desk.answer(events))

    @app.post("/v1/completions")
    async def completions(wish: Completion, request: Request):
        return await complete(wish, request, False)

    @app.post("/v1/chat/completions")
    async def chat(wish: Chat, request: Request):
        return await complete(wish, request, True)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": engine.name, "object": "model", "created": 0, "owned_by": "hilda"}]}

    @app.post("/jobs", status_code=201)
    async def start(order: Order) -> dict:
        """Starts `hilda run`."""
        return (await asyncio.to_thread(desk.jobs.start, order)).facts()

    @app.get("/jobs")
    async def jobs() -> list[dict]:
        return [job.facts() for job in desk.jobs.jobs.values()]

    @app.get("/jobs/{number}")
    async def job(number: int) -> dict:
        found: Job = desk.jobs.find(number)
        return found.facts() | {"output": [line for _, line in list(found.lines)]}

    @app.get("/jobs/{number}/watch")
    async def follow(number: int):
        """Its output as NDJSON, to its end."""
        return StreamingResponse(_guarded(watch(desk.jobs.find(number))), media_type="application/x-ndjson")

    @app.delete("/jobs/{number}")
    async def stop(number: int) -> dict:
        found: Job = desk.jobs.find(number)
        found.stop()
        return found.facts()

    return Guard(app, limits, host, token, names)


def _final(answer: Answer) -> dict:
    return {"text": answer.text, "finish_reason": answer.finish, "usage": usage(answer)}


async def _canvas(engine: Engine, events: AsyncIterator[Step | Answer]) -> AsyncIterator[str]:
    """NDJSON of a decode: what each forward wrote and edited, then the answer."""
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, Answer):
                yield json.dumps({"done": True, **_final(event)}) + "\n"
                continue
            def shown(place, token, sure, **more):
                return {"position": place, **more, "id": token, "text": engine.decode([token]), "confidence": round(sure, 4)}
            written = [shown(*one) for one in event.written]
            edited = [shown(place, token, sure, before={"id": old, "text": engine.decode([old])}) for place, old, token, sure in event.edited]
            yield json.dumps({"forward": event.forward, "written": written, "edited": edited, "closed": event.text}) + "\n"


def _errors(app: FastAPI) -> None:
    """Every error in one shape."""
    def reply(status: int, body: bytes, headers=None) -> Response:
        return Response(body, status, headers, "application/json")

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        later = {"retry-after": "1"} if error.status == 429 else None
        return reply(error.status, error_body(error.status, error.message, error.code, error.param), later)

    @app.exception_handler(HildaError)
    async def mistaken(request: Request, error: HildaError) -> Response:
        return reply(422, error_body(422, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:]))[:200]
        return reply(422, error_body(422, f"{where or 'body'}: {first['msg']}"[:500], "invalid_field", where or None))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        known = {404: "there is no such route; GET /openapi.json lists them", 405: "this route does not know this method"}
        return reply(error.status_code, error_body(error.status_code, known.get(error.status_code, str(error.detail))), error.headers)

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return reply(500, internal_error(error))


def serve(model: str, *, host: str = "127.0.0.1", port: int = 8000, token: str | None = None, engine: str = "auto", names: tuple[str, ...] = (),
          limits: Limits = Limits()) -> int:
    """Loads `model` and serves it until Ctrl-C. token: else that of the variable HILDA_TOKEN; HildaError where a host beyond loopback has none."""
    import uvicorn

    token = token or os.environ.get(TOKEN_VARIABLE) or None
    if host not in LOOPBACK and token is None:
        raise HildaError(f"--host {host} is open to other machines and needs a token: set {TOKEN_VARIABLE} or give --token, or leave --host out")
    if token is not None and (not token.isascii() or not token.isprintable() or " " in token):
        raise HildaError("a token is printable ASCII without spaces; `python -c \"import secrets; print(secrets.token_urlsafe())\"` makes one")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    app = create_app(open_engine(model, engine), limits, host, token, names)
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=30,
                            timeout_graceful_shutdown=5, h11_max_incomplete_event_size=1 << 16, ws="none")
    shown = f"[{host}]" if ":" in host else host
    LOG.info("%s on http://%s:%d%s; Ctrl-C ends it", app.app.state.desk.engine.name, shown, port, ", token needed" if token else "")
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it once more when all is put away
        uvicorn.Server(config).run()
    return 0
