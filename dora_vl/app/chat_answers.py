"""Answers as OpenAI's objects: whole, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from dora_vl.app.answering import Answering, Event, Failed, Finished, Piece
from dora_vl.app.chat_request import ChatRequest
from dora_vl.app.http_errors import error_content


def _head(asked: ChatRequest, kind: str) -> dict[str, Any]:
    made = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
    return {**made, "model": asked.model}


def _usage(finished: Finished) -> dict[str, int]:
    prompt, new = finished.prompt_tokens, finished.new_tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def completion(asked: ChatRequest, finished: Finished) -> dict[str, Any]:
    """A whole answer."""
    message = {"role": "assistant", "content": finished.text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finished.reason, "logprobs": None}
    return {**_head(asked, "chat.completion"), "choices": [choice], "usage": _usage(finished)}


async def chunks(
    asked: ChatRequest, first: Event, answering: Answering, events: asyncio.Queue[Event]
) -> AsyncIterator[str]:
    """The events of one answer as OpenAI's chunks; whoever closes this ends the answer."""
    head = _head(asked, "chat.completion.chunk")
    told = asked.stream_options is not None and asked.stream_options.include_usage

    def chunk(delta: Mapping[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _sent({**head, "choices": [choice], **({"usage": None} if told else {})})

    try:
        yield chunk({"role": "assistant", "content": ""})
        event = first
        while isinstance(event, Piece):
            yield chunk({"content": event.text})
            event = await events.get()
        if isinstance(event, Failed):
            yield _sent(error_content(event.error))
            return
        yield chunk({}, event.reason)
        if told:
            yield _sent({**head, "choices": [], "usage": _usage(event)})
        yield "data: [DONE]\n\n"
    finally:
        answering.cancel()


def _sent(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
