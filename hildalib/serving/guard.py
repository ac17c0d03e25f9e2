"""What stands before every route: whose request is let in, how large it may be, and the one shape of every error.

A web page in the user's browser can send requests to the loopback interface, under a name of its own choice (DNS rebinding); so the names in Host
and Origin count, not where a request comes from. Entry points: `Guard`, `Limits`, `Refused`, `error_body`.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import uuid
from dataclasses import dataclass

LOG = logging.getLogger("hildalib.serving")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error", 405: "invalid_request_error",
         408: "timeout_error", 409: "conflict_error", 413: "request_too_large", 415: "invalid_request_error", 422: "invalid_request_error",
         429: "overloaded_error", 503: "unavailable_error"}
DRAINED = 8  # body limits that are read and dropped, so that a client who is still sending gets to read its 413
BODY_SECONDS = 30  # a client that takes longer to send what fits into the body limit holds a connection for nothing


@dataclass(frozen=True)
class Limits:
    """prompt: tokens; new: max_new_tokens that may be asked for; body: bytes; queue: requests that may wait; batch: rows decoded together; open: requests that are
    read, waiting or answered at a time, those that watch a job among them."""

    prompt: int = 2048
    new: int = 1024
    body: int = 1 << 20
    queue: int = 128
    batch: int = 32
    open: int = 512


class Refused(Exception):
    """A request that gets `status` and a reason. code: a word that a program can act on; param: the field at fault."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


def error_body(status: int, message: str, code: str | None = None, param: str | None = None, **more) -> bytes:
    """JSON of an error, in the shape of OpenAI's; plain ASCII, whatever a client sent."""
    return json.dumps({"error": {"message": message, "type": KINDS.get(status, "server_error"), "code": code, "param": param, **more}}).encode()


def internal_error(error: Exception) -> bytes:
    """The body of a 500: an id under which the log has the traceback, and nothing of it."""
    number = uuid.uuid4().hex[:12]
    LOG.error("error %s", number, exc_info=error)
    return error_body(500, f"internal error {number}; the server's log has the details under this id", "internal_error", id=number)


class Guard:
    """ASGI: Host, Origin, token, content type and body size are checked before `app` sees a request; what escapes it becomes a 500.

    host: the address that is listened on. On a loopback address only loopback names are served. On another one any IP address is a fine Host
    (rebinding needs a name), and so are `names`; a token is needed there. The token counts for every route.
    """

    def __init__(self, app, limits: Limits, host: str = "127.0.0.1", token: str | None = None, names: tuple[str, ...] = ()):
        self.app, self.limits, self.token, self.open = app, limits, token, 0
        self.loopback, self.names = host in LOOPBACK, {*LOOPBACK, host.lower(), *(name.lower() for name in names)}

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await self.app(scope, receive, send)
        started = False

        async def watched(message):
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        self.open += 1
        try:
            if self.open > self.limits.open:
                raise Refused(503, f"{self.limits.open} requests are open already; try again later", "too_many_requests")
            headers = {}
            for name, value in scope["headers"]:
                headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
            self._admit(scope, headers)
            await self.app(scope, await self._body(scope, headers, receive), watched)
        except Refused as refused:
            await _send(watched, refused.status, error_body(refused.status, refused.message, refused.code, refused.param))
        except Exception as error:
            if not started:  # else the application has answered and logged it, and raises it once more
                await _send(send, 500, internal_error(error))
        finally:
            self.open -= 1

    def _known(self, host: str) -> bool:
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] if name.count(":") == 1 else name
        if name in self.names:
            return True
        try:
            return not self.loopback and bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _admit(self, scope, headers: dict[str, list[str]]) -> None:
        hosts = headers.get("host", [])
        if len(hosts) != 1 or not self._known(hosts[0]):
            raise Refused(403, "the Host header names another machine; use http://127.0.0.1:PORT, or start the server with --allow-host NAME",
                          "unknown_host")
        for origin in headers.get("origin", []):
            if origin.partition("://")[2].lower() != hosts[0].lower():
                raise Refused(403, "requests from pages of other sites are refused", "foreign_origin")
        if self.token is not None:
            given = headers.get("authorization", [""])[0]
            kind, _, secret = given.partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(secret.strip().encode(), self.token.encode()):
                raise Refused(401, "a token is needed: send the header `Authorization: Bearer TOKEN` with the server's --token", "invalid_token")
        if scope["method"] == "POST" and headers.get("content-type", [""])[0].partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body must be JSON: send the header `Content-Type: application/json`", "not_json")

    async def _body(self, scope, headers: dict[str, list[str]], receive):
        """`receive` of a request whose body, read here, is within the limit and JSON."""
        if scope["method"] in ("GET", "HEAD", "DELETE", "OPTIONS"):
            return receive
        try:
            body = await asyncio.wait_for(self._read(headers, receive), BODY_SECONDS)
        except TimeoutError:
            raise Refused(408, f"the body did not come within {BODY_SECONDS} seconds", "slow_body") from None
        try:
            json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, json.JSONDecodeError) else "numbers, nesting or characters that JSON has not"
            raise Refused(400, f"the body is not JSON: {reason}", "not_json") from None
        told = False

        async def again():
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return again

    async def _read(self, headers: dict[str, list[str]], receive) -> bytes:
        too_large = Refused(413, f"the body is larger than {self.limits.body} bytes; send less, or start the server with a larger --max-body",
                            "body_too_large")
        declared = headers.get("content-length", ["0"])[0]
        parts, size, over = [], 0, not declared.isdecimal() or len(declared) > 18 or int(declared) > self.limits.body
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the client left before its body was complete", "incomplete_body")
            size += len(message.get("body", b""))
            over = over or size > self.limits.body
            if over:
                parts = []
            if over and (size > DRAINED * self.limits.body or not message.get("more_body")):
                raise too_large
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(parts)


def _no_constant(name: str):
    raise ValueError(name)


async def _send(send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else [(b"connection", b"close")] if status in (408, 413) else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
