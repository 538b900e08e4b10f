"""Asks for the token at every path of vLLM's server but /health.

vLLM itself guards /v1 and a few more; /invocations, among others, generates without a token.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]
OPEN = "/health"


class TokenEverywhere:
    """ASGI middleware, named to vLLM by `--middleware`; the token is the variable VLLM_API_KEY."""

    def __init__(self, app: App):
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"] == OPEN:
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return None
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        body = json.dumps({"error": "a token is needed, and this is not it"}).encode()
        await send({"type": "http.response.body", "body": body})
        return None
