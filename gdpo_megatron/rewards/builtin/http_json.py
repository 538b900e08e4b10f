"""JSON over HTTP, to one address and within bounds: what a reward needs of a server.

Nothing is followed, neither a redirect nor a proxy of the environment. Time, tries and the size of
a reply are bounded. The API key is read from the environment where it is used; no message has it.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import re
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator

from gdpo_megatron.rewards.base import count_event
from gdpo_megatron.rewards.builtin import bounded_json

if TYPE_CHECKING:  # loaded when a server is asked: looking a reward up needs none
    import ssl

    import httpx2

MAX_REPLY_BYTES = 1_000_000

_RETRIED_STATUS = {408, 429, 500, 502, 503, 504}
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 10.0


class ServerError(Exception):
    """There is no usable reply.

    Args:
        reason: few words, to be counted.
        detail: what is known about this case; never the key.
        retry_after: seconds after which another try may help; None where it would not.
    """

    def __init__(self, reason: str, detail: str = "", retry_after: float | None = None):
        self.reason, self.detail, self.retry_after = reason, detail, retry_after
        super().__init__(f"{reason}: {detail}" if detail else reason)


def check_url(url: str) -> str:
    """Return a http(s) URL with a host and no password in it, or raise ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be http://host[:port]/path or https://host[:port]/path")
    _ = parts.port  # raises ValueError for one that is no port
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user or password; name a variable in api_key_env")
    if parts.fragment or re.search(r"\s", url):
        raise ValueError("must hold neither blanks nor a fragment")
    return url


def check_key_variable(name: str) -> str:
    """Return the name of an environment variable that holds a key, or raise ValueError."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError("must be the name of an environment variable, not the key itself")
    _read_key(name)
    return name


Url: TypeAlias = Annotated[str, AfterValidator(check_url)]
KeyVariable: TypeAlias = Annotated[str, AfterValidator(check_key_variable)]


def _read_key(name: str) -> str:
    key = os.environ.get(name, "")
    # An HTTP library shows the header that it cannot send.
    if not re.fullmatch(r"[!-~]+", key):
        fault = "holds blanks or other characters that a header cannot" if key else "is not set"
        raise ValueError(f"environment variable {name} {fault}")
    return key


class JsonServer:
    """One address to post JSON to; use it in `async with`.

    Args:
        url: where every request goes.
        timeout: seconds for all requests together, from `async with` on.
        request_timeout: seconds for one try.
        num_retries: further tries of a request that failed in a way that may pass.
        api_key_env: variable with the key, sent as a bearer token.

    Raises:
        ValueError: an address or a key that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        request_timeout: float,
        num_retries: int,
        api_key_env: str | None = None,
    ):
        import httpx2

        self._url = check_url(url)
        self._timeout, self._request_timeout = timeout, request_timeout
        self._num_retries = num_retries
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        headers |= {"Content-Type": "application/json", "User-Agent": "gdpo-megatron"}
        if api_key_env is not None:
            headers["Authorization"] = f"Bearer {_read_key(api_key_env)}"
        self._client = httpx2.AsyncClient(
            headers=headers,
            trust_env=False,
            follow_redirects=False,
            timeout=None,
            verify=_tls_context(),
        )

    async def __aenter__(self) -> JsonServer:
        self._deadline = asyncio.get_running_loop().time() + self._timeout
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        await self._client.__aexit__(kind, error, where)

    async def post(self, body: object) -> Any:
        """Send JSON, return the JSON that comes back.

        Raises:
            ServerError: whatever else comes back, or nothing in time.
        """
        loop = asyncio.get_running_loop()
        content = json.dumps(body).encode()
        pause, error = _FIRST_PAUSE_SECONDS, ServerError("server timeout")
        for tries_left in range(self._num_retries, -1, -1):
            left = self._deadline - loop.time()
            try:
                async with asyncio.timeout(max(min(self._request_timeout, left), 0.0)):
                    return await self._post_once(content)
            except TimeoutError:
                error = ServerError("server timeout", retry_after=0.0)
            except ServerError as server_error:
                error = server_error
            if error.retry_after is None or not tries_left:
                break
            # At random within the second half, so that those who failed together come apart.
            wait = max(error.retry_after, pause * random.uniform(0.5, 1.0))
            if loop.time() + wait >= self._deadline:
                break
            count_event("retries")
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise error

    async def _post_once(self, content: bytes) -> Any:
        import httpx2

        try:
            async with self._client.stream("POST", self._url, content=content) as response:
                _check_status(response)
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise ServerError("server reply compressed")
                reply = bytearray()
                async for chunk in response.aiter_raw():
                    reply += chunk
                    if len(reply) > MAX_REPLY_BYTES:
                        raise ServerError("server reply too large", f"over {MAX_REPLY_BYTES} bytes")
        except httpx2.HTTPError as error:
            # By its type alone: the text of some holds the address, and that may hold a token.
            detail = type(error).__name__
            raise ServerError("server unreachable", detail, retry_after=0.0) from None
        try:
            return bounded_json.loads(reply.decode())
        except ValueError:
            raise ServerError("server reply not JSON") from None


def _check_status(response: httpx2.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    if 300 <= status < 400:
        raise ServerError("server redirects", "which is not followed; name the final address")
    retry_after = None
    if status in _RETRIED_STATUS:
        shown = response.headers.get("Retry-After", "")
        retry_after = float(shown) if re.fullmatch(r"\d{1,6}", shown, re.ASCII) else 0.0
    raise ServerError(f"server status {status}", retry_after=retry_after)


@functools.cache
def _tls_context() -> ssl.SSLContext:
    import httpx2

    # Takes longer than a request.
    return httpx2.create_ssl_context(trust_env=False)
