"""A server under many clients at once, some of them rude: is every answer the right one, is every error an error, does its memory stay?

`python -m hildalib.stress --url http://127.0.0.1:8000 --clients 64 --minutes 5` prints a table and ends with 1 if an answer was crossed or an
error was not JSON of the one shape. What is right is asked of the same server first, one prompt at a time. Needs the extra `serve`.
Entry points: `stress`, `Tally`.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

PROMPTS = [f"{n}+{(7 * n) % 50}={' ' * (n % 3)}".strip() for n in range(10, 34)]
ACTS = {"generate": 40, "stream": 12, "completion": 12, "chat": 6, "leave": 12, "leave a stream": 6, "malformed": 5, "oversize prompt": 3,
        "oversize body": 2, "wrong field": 2}  # of a hundred requests
MALFORMED = (b"", b"{", b"[1, 2", b'{"prompt": NaN}', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 5000, b'"text"', b"null", b'{"prompt": {"a": 1}}')


@dataclass
class Tally:
    """What happened. statuses: (act, status) -> requests; wrong: answers that were not those of the row alone; bad: errors of another shape or
    statuses that the act does not call for; memory: (seconds, MiB resident) of the server."""

    statuses: Counter = field(default_factory=Counter)
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Crowd:
    """Clients of one server. headers: with the token, if there is one."""

    def __init__(self, url: str, headers: dict, new: int):
        self.url, self.headers, self.new, self.tally = url, headers, new, Tally()
        self.expected: dict[tuple[str, str], str] = {}

    async def learn(self, client: httpx.AsyncClient) -> None:
        """Asks for the answer to every prompt alone."""
        turns = [{"role": role, "content": "1"} for role in ("user", "assistant", "user")]
        templated = (await client.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 1})).status_code == 200
        self.acts = {kind: share for kind, share in ACTS.items() if kind != "chat" or not templated}  # a chat template makes another prompt of it
        for prompt in PROMPTS:
            for mode in "SQ":
                reply = await client.post("/generate", json={"prompt": prompt, "mode": mode, "max_new_tokens": self.new})
                reply.raise_for_status()
                self.expected[prompt, mode] = reply.json()["text"]

    async def act(self, client: httpx.AsyncClient, dice: random.Random) -> None:
        """One request of a kind drawn by `dice`, and the judgement of its reply."""
        kind, prompt, mode = dice.choices(list(self.acts), self.acts.values())[0], dice.choice(PROMPTS), dice.choice("SQ")
        asked = {"prompt": prompt, "mode": mode, "max_new_tokens": self.new}
        begun, text, status = time.monotonic(), None, None
        if kind in ("leave", "leave a stream"):
            task = asyncio.ensure_future(client.post("/generate", json=asked | {"stream": kind != "leave"}))
            await asyncio.sleep(dice.expovariate(20))
            if not task.done():
                task.cancel()
                self.tally.statuses[kind, "left"] += 1
                await asyncio.gather(task, return_exceptions=True)
                return
            reply = task.result()
            text = json.loads(reply.text.splitlines()[-1]).get("text")
        elif kind == "generate":
            reply = await client.post("/generate", json=asked)
            text = reply.json().get("text")
        elif kind == "stream":
            reply = await client.post("/generate", json=asked | {"stream": True})
            last = json.loads(reply.text.splitlines()[-1])
            text = last.get("text")
        elif kind == "completion":
            reply = await client.post("/v1/completions", json={"prompt": prompt, "mode": mode, "max_tokens": self.new})
            text = reply.json()["choices"][0]["text"] if reply.status_code == 200 else None
        elif kind == "chat":
            turns = [{"role": "user", "content": prompt}]
            reply = await client.post("/v1/chat/completions", json={"messages": turns, "mode": mode, "max_tokens": self.new})
            text = reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else None
        else:
            content, path = {"malformed": (dice.choice(MALFORMED), dice.choice(["/generate", "/v1/completions", "/jobs"])),
                             "oversize prompt": (json.dumps({"prompt": "1 " * 20000}).encode(), "/generate"),
                             "oversize body": (b" " * (1 << 21), "/generate"),
                             "wrong field": (json.dumps({"prompt": prompt, "n": 3, "max_tokens": -1}).encode(), "/v1/completions")}[kind]
            reply = await client.post(path, content=content, headers={"content-type": "application/json"})
        status = reply.status_code
        self._judge(kind, status, reply, text, self.expected[prompt, mode])
        if status == 200:
            self.tally.seconds.append(time.monotonic() - begun)

    def _judge(self, kind: str, status: int, reply: httpx.Response, text: str | None, expected: str) -> None:
        tally, honest = self.tally, kind in ("generate", "stream", "completion", "chat", "leave", "leave a stream")
        tally.statuses[kind, str(status)] += 1
        if status == 200 and honest:
            tally.right += text == expected
            if text != expected:
                tally.wrong.append(f"{kind}: {text!r} instead of {expected!r}")
            return
        allowed = {429} if honest else {413} if kind == "oversize body" else {400, 413, 422}
        try:
            shaped = isinstance(reply.json()["error"]["message"], str)
        except (ValueError, KeyError, TypeError):
            shaped = False
        if status not in allowed or not shaped or "Traceback" in reply.text:
            tally.bad.append(f"{kind}: {status} {reply.text[:200]}")

    async def client(self, number: int, end: float) -> None:
        dice = random.Random(number)
        async with httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=120) as client:
            while time.monotonic() < end:
                try:
                    await self.act(client, dice)
                except httpx.HTTPError as error:  # a 413 closes the connection while the body is still on its way
                    self.tally.statuses["any", type(error).__name__] += 1

    async def watch(self, client: httpx.AsyncClient, begun: float, end: float) -> None:
        while time.monotonic() < end:
            reply = await client.get("/health")
            self.tally.memory.append((time.monotonic() - begun, reply.json()["rss_mb"]))
            await asyncio.sleep(min(5.0, max(0.1, end - time.monotonic())))

    async def run(self, clients: int, seconds: float) -> Tally:
        async with httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=120) as calm:
            await self.learn(calm)
            begun = time.monotonic()
            end = begun + seconds
            await asyncio.gather(self.watch(calm, begun, end), *(self.client(number, end) for number in range(clients)))
            for _ in range(100):  # what the last clients left behind
                health = (await calm.get("/health")).json()
                if not health["waiting"] and not health["running"]:
                    break
                await asyncio.sleep(0.1)
            self.tally.memory.append((time.monotonic() - begun, health["rss_mb"]))
            self.health = health
        return self.tally


def stress(url: str, clients: int = 64, minutes: float = 5.0, token: str | None = None, new: int = 32) -> int:
    """Runs the crowd against `url`, prints the table, returns 0 if nothing was wrong, 2 if nobody answers."""
    crowd = Crowd(url, {"authorization": f"Bearer {token}"} if token else {}, new)
    try:
        tally = asyncio.run(crowd.run(clients, 60 * minutes))
    except httpx.ConnectError:
        print(f"error: nobody answers at {url}; start `hilda serve` first, or give another --url", file=sys.stderr)
        return 2
    print(f"{clients} clients, {60 * minutes:.0f} s, {sum(tally.statuses.values())} requests\n")
    print(f"{'request':<18}{'status':<22}{'count':>8}")
    for (kind, status), count in sorted(tally.statuses.items()):
        print(f"{kind:<18}{status:<22}{count:>8}")
    waits = sorted(tally.seconds) or [0.0]
    print(f"\nanswers as alone  {tally.right}\nother answers     {len(tally.wrong)}\nbad errors        {len(tally.bad)}")
    print(f"seconds to answer {waits[len(waits) // 2]:.3f} median, {waits[int(0.99 * (len(waits) - 1))]:.3f} of 99 %, {waits[-1]:.3f} most")
    warm = tally.memory[len(tally.memory) // 5]
    print(f"memory (MiB)      {tally.memory[0][1]} at the start, {warm[1]} after {warm[0]:.0f} s, {max(m for _, m in tally.memory)} most, "
          f"{tally.memory[-1][1]} at the end")
    print("over time         " + " ".join(f"{size:.0f}" for _, size in tally.memory[::max(1, len(tally.memory) // 20)]))
    print(f"server            {json.dumps(crowd.health['counts'])}, waiting {crowd.health['waiting']}, running {crowd.health['running']}")
    for line in (tally.wrong + tally.bad)[:10]:
        print(line)
    return 1 if tally.wrong or tally.bad else 0


if __name__ == "__main__":
    reader = argparse.ArgumentParser(prog="python -m hildalib.stress", description="Many clients, some rude, against a running `hilda serve`.")
    reader.add_argument("--url", default="http://127.0.0.1:8000", help="(default: %(default)s)")
    reader.add_argument("--clients", type=int, default=64, help="(default: %(default)s)")
    reader.add_argument("--minutes", type=float, default=5.0, help="(default: %(default)s)")
    reader.add_argument("--new-tokens", type=int, default=32, help="tokens of an answer (default: %(default)s)")
    reader.add_argument("--token", default=os.environ.get("HILDA_TOKEN"), help="of the server (default: that of HILDA_TOKEN)")
    chosen = reader.parse_args()
    sys.exit(stress(chosen.url, chosen.clients, chosen.minutes, chosen.token, chosen.new_tokens))
