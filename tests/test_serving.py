"""The server: every route, every error in one shape, batched = alone, clients that leave, names of hosts, tokens, hostile bodies, jobs."""

import asyncio
import gc
import itertools
import json
import socket
import sys
import threading
import time
import weakref
from dataclasses import replace

import pytest
from tiny import tiny

pytest.importorskip("fastapi")
import httpx  # noqa: E402
import uvicorn  # noqa: E402

import hildalib  # noqa: E402
from hildalib import HildaError  # noqa: E402
from hildalib.__main__ import main  # noqa: E402
from hildalib.engine import Choices, Engine  # noqa: E402
from hildalib import stress  # noqa: E402
from hildalib.serving import Limits, app as application, create_app, jobs, serve  # noqa: E402
from hildalib.serving.batching import Batcher, Ticket  # noqa: E402
from hildalib.serving.completions import settled  # noqa: E402

LIMITS = Limits(prompt=40, new=64, body=4000, queue=8, batch=4)
CHAT = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no systems') }}{% endif %}{{ m.content }}{% endfor %}="


@pytest.fixture(scope="module")
def engine():
    return Engine(*tiny(1, sharpen=7.0))


class Client:
    """Requests to an application in this process."""

    def __init__(self, app, host="127.0.0.1:8000", headers=None):
        self.app, self.base, self.headers = app, f"http://{host}", headers or {}

    def __call__(self, method, path, **options):
        async def ask():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app, raise_app_exceptions=False), base_url=self.base) as client:
                return await client.request(method, path, headers=self.headers | options.pop("headers", {}), **options)
        return asyncio.run(ask())

    def post(self, path, **body):
        return self("POST", path, json=body)


@pytest.fixture(scope="module")
def app(engine):
    app = create_app(engine, LIMITS)
    yield app
    app.app.state.desk.batcher.stop()


@pytest.fixture
def client(app):
    return Client(app)


@pytest.fixture
def live(engine):
    """(url, desk) of a server on a free port."""
    app = create_app(engine, LIMITS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    _until(lambda: server.started)
    yield f"http://127.0.0.1:{port}", app.app.state.desk
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive() and not app.app.state.desk.batcher.worker.is_alive()


def _until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def _slow(engine, monkeypatch, pause=threading.Event):
    """The decoder waits for the returned event before each forward."""
    gate, stream = pause(), engine.stream

    def slowly(prompts, choices, stops, steps, gone):
        def asked(row):
            gate.wait(30)
            return gone(row)
        return stream(prompts, choices, stops, steps=steps, gone=asked)
    monkeypatch.setattr(engine, "stream", slowly)
    return gate


def _fails(reply, status, message="", code=None):
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert {*error} >= {"message", "type", "code", "param"} and message in error["message"] and "Traceback" not in reply.text
    assert reply.headers["content-type"] == "application/json" and (code is None or error["code"] == code)


# ---- what is asked for ----------------------------------------------------------------------------------------------------------

def test_health_and_models_say_who_answers(client, engine):
    health = client("GET", "/health").json()
    assert health["status"] == "ok" and health["context"] == 512 and health["waiting"] == 0 and health["rss_mb"] > 1
    assert [entry["id"] for entry in client("GET", "/v1/models").json()["data"]] == [engine.name] == [health["model"]]


def test_generate_answers_as_the_engine(client, engine):
    expected, = engine.answers([engine.encode("1+2=")], Choices("S", 0.4, 0.2, 20))
    reply = client.post("/generate", prompt="1+2=", mode="S", tau_mask=0.4, tau_edit=0.2, max_new_tokens=20)
    assert reply.status_code == 200 and reply.json() == {"text": expected.text, "finish_reason": expected.finish, "usage": {
        "prompt_tokens": 4, "completion_tokens": expected.tokens, "total_tokens": 4 + expected.tokens, "forwards": expected.forwards}}


def test_a_stream_of_generate_replays_to_its_answer(client, engine):
    reply = client.post("/generate", prompt="1+2=", mode="S", max_new_tokens=20, stream=True)
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    *steps, final = map(json.loads, reply.text.splitlines())
    canvas = {}
    for number, step in enumerate(steps, 1):
        assert step["forward"] == number
        canvas |= {token["position"]: token["text"] for token in step["written"]}
        for token in step["edited"]:
            assert canvas[token["position"]] == token["before"]["text"] != token["text"]
            canvas[token["position"]] = token["text"]
    assert final["done"] and "".join(canvas[place] for place in sorted(canvas))[:len(final["text"])] == final["text"]
    assert final["usage"]["forwards"] == len(steps) and final["text"] == engine.generate("1+2=", "S", max_new_tokens=20)


def test_completions_have_openais_shape_and_a_stream_adds_up_to_the_whole(client, engine):
    whole = client.post("/v1/completions", prompt=["1+2="], max_tokens=20, user="me", n=1, logprobs=None, unknown={"a": 1}).json()
    text = engine.generate("1+2=", max_new_tokens=20)
    assert whole["object"] == "text_completion" and whole["choices"][0]["text"] == text and whole["id"].startswith("cmpl-")
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]
    stop = text[5]
    for options, expected, reason in (({}, text, whole["choices"][0]["finish_reason"]), ({"stop": [stop, "zz"]}, text.split(stop)[0], "stop")):
        reply = client.post("/v1/completions", prompt="1+2=", max_tokens=20, stream=True, stream_options={"include_usage": True}, **options)
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        *chunks, last, counted = map(json.loads, lines)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected and last["choices"][0]["finish_reason"] == reason
        assert counted["choices"] == [] and (options or counted["usage"] == whole["usage"])
    assert client.post("/v1/completions", prompt="1+2=", max_tokens=20, stop=stop).json()["choices"][0]["text"] == text.split(stop)[0]


def test_chat_takes_one_turn_without_a_template_and_all_of_them_with_one(client, engine, monkeypatch):
    one = [{"role": "user", "content": [{"type": "text", "text": "1+2="}]}]
    whole = client.post("/v1/chat/completions", messages=one, max_completion_tokens=20).json()
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": engine.generate("1+2=", max_new_tokens=20)}
    two = [{"role": "user", "content": "1+"}, {"role": "assistant", "content": "2"}]
    _fails(client.post("/v1/chat/completions", messages=two), 400, "no chat template")
    monkeypatch.setattr(engine.tokenizer, "chat_template", CHAT)
    reply = client.post("/v1/chat/completions", messages=two, max_tokens=20, stream=True)
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in reply.text.split("\n\n")[:-2]]
    assert chunks[0]["delta"] == {"role": "assistant", "content": ""} and chunks[-1]["delta"] == {}
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["choices"][0]["message"]["content"]
    _fails(client.post("/v1/chat/completions", messages=[{"role": "system", "content": "1"}]), 400, "refuses these messages: no systems")


def test_a_stream_holds_back_what_may_become_a_stop_string():
    assert settled("12#", ("##", "4")) == "12" and settled("12##", ("###",)) == "12" and settled("12#3", ("##",)) == "12#3"
    assert settled("12\ufffd", ()) == "12" and settled("12 ", ()) == "12"


def test_noise_belongs_to_a_request_and_its_seed(client, engine):
    texts = {seed: client.post("/generate", prompt="1", temperature=1.0, seed=seed, max_new_tokens=24).json()["text"] for seed in range(4)}
    assert len({*texts.values()}) > 1
    assert all(text == engine.generate("1", seed=seed, temperature=1.0, max_new_tokens=24) for seed, text in texts.items())


def test_requests_that_wait_together_are_one_batch_and_answered_as_alone(live, engine, monkeypatch):
    url, desk = live
    bodies = [{"prompt": f"{n}+{n * n}=", "max_new_tokens": 20, "mode": "QS"[n == 5], "seed": n} for n in range(6)]
    gate = _slow(engine, monkeypatch)

    async def all_of_them():
        async with httpx.AsyncClient(timeout=60) as client:
            first = asyncio.ensure_future(client.post(f"{url}/generate", json={"prompt": "9", "max_new_tokens": 5}))
            await asyncio.to_thread(_until, lambda: desk.batcher.running)
            rest = [asyncio.ensure_future(client.post(f"{url}/generate", json=body)) for body in bodies]
            await asyncio.to_thread(_until, lambda: len(desk.batcher.waiting) == 6)
            gate.set()
            return [reply.json() for reply in await asyncio.gather(first, *rest)]

    replies = asyncio.run(all_of_them())[1:]
    assert desk.batcher.counts["batches"] == 4 and desk.batcher.counts["rows"] == 7  # the first; four of the five in Q mode; S mode's; the fifth
    monkeypatch.undo()
    for body, reply in zip(bodies, replies):
        alone, = engine.answers([engine.encode(body["prompt"])], Choices(body["mode"], max_new_tokens=20))
        assert (reply["text"], reply["usage"]["forwards"]) == (alone.text, alone.forwards)


# ---- what is refused ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path, body, status, message", [
    ("/generate", {"prompt": ""}, 400, "at least one token"),
    ("/generate", {"prompt": "1" * 41}, 400, "41 tokens, more than the 40 allowed here"),
    ("/generate", {"prompt": "1", "max_new_tokens": 65}, 400, "65 new tokens are more than the 64 allowed here"),
    ("/generate", {"prompt": "1[MASK]"}, 400, "contains [MASK]"),
    ("/generate", {}, 422, "prompt: Field required"), ("/generate", {"prompt": 7}, 422, "prompt: "), ("/generate", {"prompt": None}, 422, "prompt: "),
    ("/generate", {"prompt": "1", "max_new_tokens": 0}, 422, "max_new_tokens: "),
    ("/generate", {"prompt": "1", "max_new_tokens": True}, 422, "max_new_tokens"),
    ("/generate", {"prompt": "1", "max_new_tokens": 10**30}, 400, "more than the 64 allowed here"),
    ("/generate", {"prompt": "1", "tau_mask": 1.5}, 422, "tau_mask"),
    ("/generate", {"prompt": "1", "mode": "X"}, 422, "mode: "), ("/generate", {"prompt": "1", "seed": -1}, 422, "seed: "),
    ("/generate", [1], 422, "body"),
    ("/generate", {"prompt": "1", "stop": ["a"] * 5}, 400, "at most four"), ("/generate", {"prompt": "1", "stop": ""}, 400, "none of them empty"),
    ("/v1/completions", {"prompt": ["1", "2"]}, 400, "one string"), ("/v1/completions", {"prompt": [1, 2]}, 400, "one string"),
    ("/v1/completions", {"prompt": "1", "n": 2}, 400, "n is not supported: one choice"),
    ("/v1/completions", {"prompt": "1", "logprobs": 5}, 400, "logprobs is not"),
    ("/v1/completions", {"prompt": "1", "echo": True}, 400, "echo is not"),
    ("/v1/completions", {"prompt": "1", "top_p": 0.9}, 400, "use temperature"),
    ("/v1/completions", {"prompt": "1", "model": "gpt-9"}, 404, "no model 'gpt-9' here"),
    ("/v1/completions", {"prompt": "1", "temperature": 3}, 422, "temperature"),
    ("/v1/chat/completions", {"messages": []}, 422, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "x", "content": "1"}]}, 422, "messages.0.role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 422, "messages.0.content"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "1"}], "tools": [{}]}, 400, "tools is not supported"),
    ("/nothing", {}, 404, "no such route"), ("/health", {}, 405, "does not know this method")])
def test_a_mistake_gets_its_status_and_a_reason(client, path, body, status, message):
    _fails(client("POST", path, json=body), status, message)
    assert not client.app.app.state.desk.batcher.waiting


@pytest.mark.parametrize("content, message", [
    (b"", "not JSON"), (b"{", "not JSON"), (b'{"prompt": "1", "tau_mask": NaN}', "not JSON"),
    (b'{"prompt": "1", "max_new_tokens": Infinity}', "not JSON"),
    (b"\xff\xfe{}", "not JSON"), (b"[" * 1900, "not JSON"), (b'{"a":' * 500 + b"1" + b"}" * 500, None), (b'{"prompt": ' + b"1" * 3000 + b"e9}", None),
    (b'{"prompt": "\\ud800", "max_new_tokens": 3}', "not valid Unicode"), (b'{"prompt": "1", "\\ud800": 1, "model": "\\ud800"}', None),
    (b'{"prompt": "\\u0000\\u0001", "max_new_tokens": 4}', None)])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/jobs"])
def test_a_hostile_body_gets_a_400_or_422_or_an_answer_and_never_a_500(client, content, message, path):
    reply = client("POST", path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code in ((200, 400, 404, 422) if message is None or path == "/jobs" else (400,)), reply.text
    assert reply.status_code == 200 or reply.json()["error"]["message"]
    assert path == "/jobs" or message is None or message in reply.json()["error"]["message"]


def test_a_body_beyond_the_limit_is_refused_whatever_its_length_claims(client):
    big = json.dumps({"prompt": "1" * 5000}).encode()
    headers = {"content-type": "application/json"}
    _fails(client("POST", "/generate", content=big, headers=headers), 413, "larger than 4000 bytes")
    _fails(client("POST", "/generate", content=b"{}", headers=headers | {"content-length": "9" * 30}), 413)

    async def pieces():
        for start in range(0, len(big), 500):
            yield big[start:start + 500]
    _fails(client("POST", "/generate", content=pieces(), headers=headers), 413, "larger than 4000 bytes")
    _fails(client("POST", "/generate", content=b"prompt=1", headers={"content-type": "application/x-www-form-urlencoded"}), 415, "must be JSON")


@pytest.mark.parametrize("host, listening, status", [
    ("127.0.0.1:8000", "127.0.0.1", 200), ("localhost", "127.0.0.1", 200), ("[::1]:8000", "127.0.0.1", 200), ("LOCALHOST:1", "127.0.0.1", 200),
    ("evil.example", "127.0.0.1", 403), ("127.0.0.1.evil.example", "127.0.0.1", 403), ("192.168.0.7", "127.0.0.1", 403),
    ("localhost.evil:8000", "127.0.0.1", 403),
    ("192.168.0.7:8000", "0.0.0.0", 200), ("lab.example:8000", "0.0.0.0", 200), ("evil.example", "0.0.0.0", 403)])
def test_only_known_names_are_served(engine, host, listening, status):
    app = create_app(engine, LIMITS, listening, "secret", ("Lab.example",))
    reply = Client(app, headers={"authorization": "Bearer secret"})("GET", "/health", headers={"host": host})
    app.app.state.desk.batcher.stop()
    assert reply.status_code == status
    if status == 403:
        _fails(reply, 403, "names another machine", "unknown_host")


@pytest.mark.parametrize("origin, status", [
    ("http://127.0.0.1:8000", 200), ("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:9999", 403), ("", 403)])
def test_a_page_of_another_site_is_refused(client, origin, status):
    assert client("GET", "/health", headers={"origin": origin}).status_code == status


def test_a_token_is_needed_on_every_route_where_there_is_one(engine):
    client = Client(create_app(engine, LIMITS, token="s3cret"))
    for wrong in (None, "Bearer s3cre", "Bearer s3cret5", "Basic s3cret", "Bearer é".encode()):
        headers = {} if wrong is None else {"authorization": wrong}
        for method, path in (("GET", "/health"), ("POST", "/generate"), ("GET", "/jobs"), ("GET", "/nothing"), ("GET", "/openapi.json")):
            _fails(client(method, path, headers=headers), 401, "Authorization: Bearer TOKEN", "invalid_token")
    assert client("GET", "/health", headers={"authorization": "bearer s3cret"}).status_code == 200
    client.app.app.state.desk.batcher.stop()


def test_another_host_needs_a_token_and_a_token_is_plain(monkeypatch, capsys):
    monkeypatch.delenv("HILDA_TOKEN", raising=False)
    assert main(["serve", "--model", "nothing", "--host", "0.0.0.0"]) == 2
    assert "needs a token: set HILDA_TOKEN or give --token" in capsys.readouterr().err
    monkeypatch.setenv("HILDA_TOKEN", "two words")
    with pytest.raises(HildaError, match="printable ASCII without spaces"):
        serve("nothing", host="0.0.0.0")


def test_an_unexpected_error_is_a_500_with_an_id_that_is_in_the_log(client, engine, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("secret detail")
    for name, path in (("stream", "/generate"), ("encode", "/v1/completions")):
        with monkeypatch.context() as patch:
            patch.setattr(engine, name, broken)
            reply = client.post(path, prompt="1")
        _fails(reply, 500, "internal error", "internal_error")
        assert "secret" not in reply.text and f"error {reply.json()['error']['id']}" in caplog.text and "secret detail" in caplog.text
    with monkeypatch.context() as patch:  # a stream's status is sent already
        patch.setattr(engine, "stream", broken)
        reply = client.post("/generate", prompt="1", stream=True)
    assert reply.status_code == 200 and json.loads(reply.text)["error"]["code"] == "internal_error" and "secret" not in reply.text
    assert client.post("/generate", prompt="1", max_new_tokens=4).status_code == 200  # and the worker lives


def test_a_request_that_breaks_the_decoder_takes_no_other_along(live, engine, monkeypatch):
    url, desk = live
    stream, poison = engine.stream, engine.encode("666=")

    def brittle(prompts, *others, **options):
        if poison in prompts:
            raise RuntimeError("out of memory")
        return stream(prompts, *others, **options)
    gate = _slow(engine, monkeypatch)
    slowed = engine.stream
    monkeypatch.setattr(engine, "stream", lambda prompts, *others, **options: (brittle if poison in prompts else slowed)(prompts, *others, **options))

    async def scene():
        async with httpx.AsyncClient(timeout=60) as client:
            asked = [asyncio.ensure_future(client.post(f"{url}/generate", json={"prompt": "1", "max_new_tokens": 5}))]
            await asyncio.to_thread(_until, lambda: desk.batcher.running)
            asked += [asyncio.ensure_future(client.post(f"{url}/generate", json={"prompt": prompt, "max_new_tokens": 9})) for prompt in ("2+3=", "666=", "8-")]
            await asyncio.to_thread(_until, lambda: len(desk.batcher.waiting) == 3)
            gate.set()
            return await asyncio.gather(*asked)
    _, good, bad, fine = asyncio.run(scene())
    _fails(bad, 500, "internal error", "internal_error")
    monkeypatch.undo()
    assert [reply.json()["text"] for reply in (good, fine)] == [engine.generate(prompt, max_new_tokens=9) for prompt in ("2+3=", "8-")]


# ---- who leaves, and who must wait ----------------------------------------------------------------------------------------------

def test_a_full_queue_refuses_and_clients_that_leave_make_room(live, engine, monkeypatch):
    url, desk = live
    gate = _slow(engine, monkeypatch)

    async def scene():
        async with httpx.AsyncClient(timeout=60) as client:
            def ask(**more):
                return asyncio.ensure_future(client.post(f"{url}/generate", json={"prompt": "1+2=", "max_new_tokens": 30} | more))
            running = ask()
            await asyncio.to_thread(_until, lambda: desk.batcher.running)
            waiting = [ask(stream=bool(n % 2)) for n in range(8)]
            await asyncio.to_thread(_until, lambda: len(desk.batcher.waiting) == 8)
            refused = await ask()
            _fails(refused, 429, "8 requests are waiting already", "queue_full")
            assert refused.headers["retry-after"] == "1"
            for task in waiting[:6]:
                task.cancel()
            await asyncio.to_thread(_until, lambda: len(desk.batcher.waiting) == 2)
            running.cancel()
            await asyncio.sleep(0.3)  # until the server has seen that it left
            gate.set()
            assert [reply.status_code for reply in await asyncio.gather(*waiting[6:])] == [200, 200]

    asyncio.run(scene())
    _until(lambda: not desk.batcher.running)
    assert desk.batcher.counts["cancelled"] == 7 and desk.batcher.counts["answers"] == 2 and not desk.batcher.waiting


def test_own_text_over_http_and_its_refusals(client):
    causal = Engine(*tiny(2, causal=True, sharpen=7.0))
    app = create_app(causal, LIMITS)
    try:
        own = Client(app)
        assert own.post("/generate", prompt="1+2=", mode="own", max_new_tokens=9).json()["text"] == causal.generate("1+2=", "own", max_new_tokens=9)
        _fails(own.post("/generate", prompt="1+2=", mode="own", tau_mask=0.5), 400, "leave tau_mask, tau_edit and temperature out")
    finally:
        app.app.state.desk.batcher.stop()
    _fails(client.post("/generate", prompt="1+2=", mode="own"), 400, "convert one with causal_context: true")


def test_more_open_requests_than_allowed_are_told_so(engine, monkeypatch):
    app = create_app(engine, replace(LIMITS, open=2))
    gate = _slow(engine, monkeypatch)

    async def scene():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000", timeout=60) as client:
            asked = [asyncio.ensure_future(client.post("/generate", json={"prompt": "1", "max_new_tokens": 5})) for _ in range(2)]
            await asyncio.to_thread(_until, lambda: app.open == 2)
            _fails(await client.get("/health"), 503, "2 requests are open already", "too_many_requests")
            gate.set()
            assert [reply.status_code for reply in await asyncio.gather(*asked)] == [200, 200]
            assert (await client.get("/health")).status_code == 200
    asyncio.run(scene())
    app.app.state.desk.batcher.stop()
    assert app.open == 0


def test_what_a_failed_batch_held_is_gone_before_its_rows_are_tried_alone(engine, monkeypatch):
    class Cache:
        pass

    held, alive, stream = [], [], engine.stream

    def brittle(prompts, *others, **options):
        alive.append(bool(held and held[0]()))
        if len(prompts) > 1:
            cache = Cache()
            held.append(weakref.ref(cache))
            raise RuntimeError("out of memory")
        return stream(prompts, *others, **options)

    monkeypatch.setattr(engine, "stream", brittle)
    batcher = Batcher(engine, 8, 4)

    async def scene():
        tickets = [Ticket(engine.encode(prompt), Choices(max_new_tokens=5), (), False) for prompt in ("1+2=", "8-")]
        batcher._decode(tickets)
        return [await ticket.mail.get() for ticket in tickets]
    answers = asyncio.run(scene())
    assert alive == [False, False, False] and held[0]() is None
    assert [answer.text for answer in answers] == [engine.generate(prompt, max_new_tokens=5) for prompt in ("1+2=", "8-")]


def test_a_reader_that_hangs_up_in_the_middle_of_a_stream_ends_its_row(live, engine, monkeypatch):
    url, desk = live
    gate = _slow(engine, monkeypatch, lambda: Turnstile(3))
    body = {"prompt": "1+2=", "max_new_tokens": 60, "stream": True}
    with httpx.Client(timeout=60) as client, client.stream("POST", f"{url}/generate", json=body) as reply:
        assert json.loads(next(reply.iter_lines()))["forward"] == 1
    time.sleep(0.3)
    gate.open()
    _until(lambda: not desk.batcher.running)
    assert desk.batcher.counts["cancelled"] == 1 and not desk.batcher.counts["answers"]


class Turnstile:
    """Lets so many through, then waits until it is opened."""

    def __init__(self, count):
        self.count, self.opened = count, threading.Event()

    def wait(self, seconds):
        self.count -= 1
        return self.count >= 0 or self.opened.wait(seconds)

    def open(self):
        self.opened.set()


# ---- jobs -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("order, status, message", [
    ({"notebooks": ["../../etc/passwd"], "profile": "nano"}, 422, "unknown notebook"), ({"notebooks": [], "profile": "nano"}, 422, "notebooks"),
    ({"notebooks": ["04_decode"], "profile": "../x"}, 422, "unknown profile"), ({"notebooks": ["04_decode"]}, 422, "profile: Field required"),
    ({"notebooks": ["04_decode"], "profile": "smoke", "set": {"no_such": 1}}, 422, "unknown parameter"),
    ({"notebooks": ["04_decode"], "profile": "smoke", "set": {"seed": -1}}, 422, "at least 0"),
    ({"notebooks": ["02_wsd"], "profile": "smoke", "set": {"model": "/some/model"}}, 422, "text is taken over HTTP only where"),
    ({"notebooks": ["02_wsd"], "profile": "smoke", "set": {"profile": "/tmp/x"}}, 422, "profile cannot be set"),
    ({"notebooks": ["04_decode"], "profile": "smoke", "command": "rm"}, 422, "command: Extra inputs"),
    ({"notebooks": ["--help"], "profile": "smoke"}, 422, "unknown notebook"),
    ({"notebooks": ["04_decode"], "profile": "smoke", "seeds": [-1]}, 422, "seeds")])
def test_only_known_runs_with_checked_parameters_are_started(client, order, status, message):
    _fails(client("POST", "/jobs", json=order), status, message)
    assert client("GET", "/jobs").json() == []


def test_a_job_is_the_command_of_hilda_run():
    order = jobs.Order(notebooks=["02_wsd"], profile="smoke", seeds=[0, 2], force=True,
                       set={"parent_steps": 3, "optimizer": "adamw_torch", "probe_masks": [0.5, 1]})
    assert order.command()[1:] == ["-m", "hildalib", "run", "02_wsd", "--profile", "smoke", "--seeds", "0", "2", "--set", "parent_steps=3",
                                   "--set", 'optimizer="adamw_torch"', "--set", "probe_masks=[0.5, 1]", "--force"]


def test_a_job_takes_an_overlay_of_the_list():
    assert "nano+pascal" in jobs.Order(notebooks=["04_decode"], profile="nano+pascal").command()
    with pytest.raises(HildaError, match="unknown overlay 'pascall'; did you mean 'pascal'"):
        jobs.Order(notebooks=["04_decode"], profile="nano+pascall").command()


def test_a_job_is_watched_refused_beside_another_and_stopped(live, monkeypatch):
    url, desk = live
    script = "import time\nfor n in range(3): print('line', n, flush=True)\ntime.sleep({})\n"
    monkeypatch.setattr(jobs.Order, "command", lambda order: [sys.executable, "-c", script.format(0.5 if not order.force else 600)])
    order = {"notebooks": ["04_decode"], "profile": "smoke"}
    with httpx.Client(timeout=60) as client:
        started = client.post(f"{url}/jobs", json=order)
        assert started.status_code == 201 and started.json()["state"] == "running" and started.json()["id"] == 1
        lines = [json.loads(line) for line in client.get(f"{url}/jobs/1/watch").text.splitlines()]
        assert [line["line"] for line in lines[:-1]] == ["line 0", "line 1", "line 2"] and lines[-1]["state"] == "done"
        assert client.get(f"{url}/jobs/1").json()["output"] == ["line 0", "line 1", "line 2"]
        assert client.post(f"{url}/jobs", json=order | {"force": True}).json()["id"] == 2
        _fails(client.post(f"{url}/jobs", json=order), 409, "job 2 is running")
        client.delete(f"{url}/jobs/2")
        _until(lambda: client.get(f"{url}/jobs/2").json()["state"] != "running")
        assert client.get(f"{url}/jobs/2").json()["state"] == "stopped" and [job["id"] for job in client.get(f"{url}/jobs").json()] == [1, 2]
        _fails(client.get(f"{url}/jobs/3"), 404, "no job 3")
        _fails(client.get(f"{url}/jobs/x"), 422, "number")


def test_without_the_extra_there_is_one_clear_error(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("hildalib.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(hildalib, "serving")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--model", "nothing"]) == 2
    assert 'pip install -c constraints.txt -e ".[serve]"' in capsys.readouterr().err


def test_the_worker_and_its_queue_end_with_the_server(engine):
    desk = application.Desk(engine, LIMITS)
    desk.batcher.stop()
    assert not desk.batcher.worker.is_alive()


def test_nothing_is_kept_of_requests_that_are_over(live):
    url, desk = live

    async def some(count):
        async with httpx.AsyncClient(timeout=60) as client:
            for n in range(count):
                body = {"prompt": f"{n % 10}+2=", "max_new_tokens": 8}
                await asyncio.gather(client.post(f"{url}/generate", json=body), client.post(f"{url}/generate", json=body | {"stream": True}),
                                     client.post(f"{url}/v1/completions", json={"prompt": 7}), client.post(f"{url}/v1/completions", content=b"{"))
                leaving = asyncio.ensure_future(client.post(f"{url}/generate", json=body))
                await asyncio.sleep(0.002 * (n % 4))
                leaving.cancel()
        await asyncio.to_thread(_until, lambda: not desk.batcher.running and not desk.batcher.waiting)
        await asyncio.sleep(0.3)

    def held():
        gc.collect()
        return len(gc.get_objects())

    asyncio.run(some(10))
    counts = [held()]
    for _ in range(4):
        asyncio.run(some(20))
        counts.append(held())
    # What requests leave, every round of them leaves: dozens of objects for each of the 20 of a kind. A client's last task or a cache
    # that another thread fills is seen in one round and not in the next.
    assert min(after - before for before, after in itertools.pairwise(counts)) < 100, counts


def test_the_stress_command_finds_nothing_wrong_here_and_says_what_is_wrong_elsewhere(live, capsys):
    url, desk = live
    assert stress.stress(url, clients=6, minutes=0.04, new=8) == 0
    shown = capsys.readouterr().out
    assert "other answers     0" in shown and "bad errors        0" in shown and "memory (MiB)" in shown and not desk.batcher.waiting
    crowd, ask = stress.Crowd(url, {}, 8), httpx.Request("POST", url)
    crowd._judge("generate", 200, httpx.Response(200, request=ask), "4", "5")
    crowd._judge("generate", 500, httpx.Response(500, json={"error": {"message": "x"}}, request=ask), None, "5")
    crowd._judge("malformed", 400, httpx.Response(400, text="Traceback", request=ask), None, "5")
    crowd._judge("malformed", 200, httpx.Response(200, json={}, request=ask), None, "5")
    assert len(crowd.tally.wrong) == 1 and len(crowd.tally.bad) == 3
    assert stress.stress("http://127.0.0.1:9", clients=1, minutes=0.01) == 2 and "nobody answers" in capsys.readouterr().err
