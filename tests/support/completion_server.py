"""An OpenAI-like completions server in this process whose answers a test chooses."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "a-token-of-the-tests-0123456789"
MODEL = "served"


@dataclass
class CompletionServer:
    """What it was asked, and where.

    Args:
        answer: the prompt (text or token ids) -> the completion; None is an error of the server.
        context_length: what it says that it takes.
        prompts: it was asked for, in their order.
        refused: requests without the token.
    """

    answer: Callable[[Any], str | None]
    context_length: int = 4096
    prompts: list[Any] = field(default_factory=list)
    refused: int = 0
    url: str = ""


@contextlib.contextmanager
def completion_server(
    answer: Callable[[Any], str | None], context_length: int = 4096
) -> Iterator[CompletionServer]:
    """Answer on a free port of 127.0.0.1 until the block is left."""
    state = CompletionServer(answer, context_length)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def allowed(self) -> bool:
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return True
            state.refused += 1
            self.reply(401, {"error": "Unauthorized"})
            return False

        def do_GET(self) -> None:
            if self.allowed():
                model = {"id": MODEL, "max_model_len": state.context_length}
                self.reply(200, {"object": "list", "data": [model]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.allowed():
                return
            prompts = request["prompt"]
            # A batch of one, where ids are sent.
            prompt = prompts[0] if isinstance(prompts[0], list) else prompts
            state.prompts.append(prompt)
            text = state.answer(prompt)
            if text is None:
                self.reply(500, {"error": {"message": "the model fell over"}})
                return
            choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
            usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
            self.reply(
                200,
                {
                    "id": "1",
                    "object": "text_completion",
                    "created": 0,
                    "model": MODEL,
                    "choices": [choice],
                    "usage": usage,
                },
            )

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
