"""OpenAI's /v1/completions and /v1/chat/completions, as far as a block-diffusion model can be asked what they ask.

Fields that do not change a text are ignored; those that would and that cannot be honoured are refused with a reason (`UNSUPPORTED`). A stream carries
the text of closed blocks, which nothing edits any more. Entry points: `Completion`, `Chat`, `supported`, `Reply`, `pieces`, `usage`.
"""

import json
import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hildalib import HildaError
from hildalib.engine import Answer, Choices
from hildalib.serving.guard import Refused

# Field -> (values that ask for nothing, why another one is refused). null always asks for nothing.
UNSUPPORTED: dict[str, tuple[tuple, str]] = {
    "n": ((1,), "one choice a request; send several requests, they are decoded together"),
    "best_of": ((1,), "one candidate a request"),
    "logprobs": ((False, 0), "a block's tokens are written at different times under different contexts; /generate streams their confidences"),
    "top_logprobs": ((0,), "as logprobs"),
    "echo": ((False,), "the prompt is not repeated"),
    "suffix": (("",), "blocks are decoded from left to right"),
    "top_p": ((1,), "tokens are sampled from the whole distribution; use temperature"),
    "presence_penalty": ((0,), "no penalties: tokens of a block are written at once"),
    "frequency_penalty": ((0,), "no penalties: tokens of a block are written at once"),
    "logit_bias": (({},), "no biases"),
    "tools": (([],), "no tools"),
    "functions": (([],), "no functions"),
    "response_format": (({"type": "text"},), "plain text only"),
    "modalities": ((["text"],), "text only"),
    "audio": ((), "text only"),
}


class Settings(BaseModel):
    """Fields of every request that decodes. mode, tau_mask and tau_edit are hildalib's own; their defaults are those of `hilda generate`."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    mode: Literal["S", "Q", "own"] = "Q"
    tau_mask: float | None = Field(None, ge=0, le=1)
    tau_edit: float | None = Field(None, ge=0, le=1)
    temperature: float | None = Field(0.0, ge=0, le=2)
    seed: int | None = Field(0, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = False

    def stops(self) -> tuple[str, ...]:
        """The stop strings; Refused beyond OpenAI's four or where one is empty."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > 4 or not all(stops):
            raise Refused(400, "stop: at most four strings, none of them empty", param="stop")
        return stops

    def choices(self, new: int) -> Choices:
        """Of a request for `new` tokens."""
        return Choices(self.mode, self.tau_mask, self.tau_edit, new, self.temperature or 0.0, self.seed or 0)


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Completion(Settings):
    prompt: str | list[Any]
    max_tokens: int | None = Field(None, ge=1)
    stream_options: StreamOptions | None = None

    def text(self, tokenizer) -> str:
        """The one prompt."""
        prompt = self.prompt[0] if isinstance(self.prompt, list) and len(self.prompt) == 1 else self.prompt
        if not isinstance(prompt, str):
            raise Refused(400, "prompt: one string; send several requests for several prompts, and text for tokens", param="prompt")
        return prompt

    def new(self) -> int | None:
        return self.max_tokens


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(Settings):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream_options: StreamOptions | None = None

    def text(self, tokenizer) -> str:
        """The messages in the model's chat template; without one, the text of a single message of the user."""
        turns = [{"role": "system" if turn.role == "developer" else turn.role, "content": turn.text()} for turn in self.messages]
        if not tokenizer.chat_template:
            if [turn["role"] for turn in turns] != ["user"]:
                raise Refused(400, "this model has no chat template; send one message of the user, or use /v1/completions", param="messages")
            return turns[0]["content"]
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like about an order of roles
            raise Refused(400, f"the model's chat template refuses these messages: {error}", param="messages") from None

    def new(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def supported(request: Settings) -> None:
    """Refused (400) where a field asks for what there is not."""
    for name, value in (request.model_extra or {}).items():
        if name in UNSUPPORTED and value is not None:
            idle, reason = UNSUPPORTED[name]
            if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in idle):
                raise Refused(400, f"{name} is not supported: {reason}", "unsupported_field", name)


def usage(answer: Answer) -> dict:
    """Token counts of an answer; the forwards they took are hildalib's own addition."""
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens, "total_tokens": answer.prompt_tokens + answer.tokens,
            "forwards": answer.forwards}


class Reply:
    """The objects that answer one request. chat: of chat.completions."""

    def __init__(self, model: str, chat: bool):
        self.chat, self.kind = chat, "chat.completion" if chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict:
        body = {"message": {"role": "assistant", "content": answer.text}} if self.chat else {"text": answer.text}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": answer.finish}
        return {**self.head, "object": self.kind, "choices": [choice], "usage": usage(answer)}

    def chunk(self, text: str | None = None, finish: str | None = None, first: bool = False) -> str:
        """One server-sent event with a piece of text."""
        delta = ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})
        choice = {"index": 0, **({"delta": delta} if self.chat else {"text": text or ""}), "logprobs": None, "finish_reason": finish}
        return sent({**self.head, "object": self.kind + (".chunk" if self.chat else ""), "choices": [choice]})

    def counted(self, answer: Answer) -> str:
        return sent({**self.head, "object": self.kind + (".chunk" if self.chat else ""), "choices": [], "usage": usage(answer)})


def sent(value: dict | str) -> str:
    """A server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


def settled(text: str, stops: tuple[str, ...]) -> str:
    """The beginning of `text`, of closed blocks, that the final text has too: without what may be the head of a stop string, half a character, or a
    space that the tokenizer takes back in front of a full stop."""
    text = text.rstrip("\ufffd")
    held = max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
    return text[:len(text) - held].rstrip()


async def pieces(reply: Reply, events, stops: tuple[str, ...], with_usage: bool):
    """Server-sent events of a stream: pieces of text as blocks close, the reason of the end, usage if asked for, and [DONE]."""
    told = ""
    if reply.chat:
        yield reply.chunk("", first=True)
    async for event in events:
        text = event.text if isinstance(event, Answer) else settled(event.text, stops)
        if text.startswith(told) and len(text) > len(told):
            yield reply.chunk(text[len(told):])
            told = text
        if isinstance(event, Answer):
            yield reply.chunk(finish=event.finish)
            if with_usage:
                yield reply.counted(event)
    yield sent("[DONE]")


def as_refused(error: HildaError) -> Refused:
    """What the engine says about a prompt or a choice, as a 400."""
    code = "context_length_exceeded" if "context is" in str(error) else None
    return Refused(400, str(error), code)
