"""A served model as its clients see it: a URL, a name, a token. Only the standard library."""

from __future__ import annotations

import json
import os
import stat
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from gdpo_megatron.errors import InputError

TOKEN_VARIABLE = "GDPO_SERVE_TOKEN"
_SECONDS = 10.0  # for a question that needs no model
# A proxy of the environment has no business between two programs of one machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NoAnswer(Exception):
    """The server is not reached, or answers with an error.

    Args:
        text: what is the matter.
        status: HTTP's, where it got so far.
    """

    def __init__(self, text: str, status: int | None = None):
        super().__init__(text)
        self.status = status


def read_token(file: Path | None) -> str | None:
    """The token of a file, else of the variable; None where there is neither.

    Raises:
        InputError: the file cannot be read or is open to others, or the token is no token.
    """
    if file is None:
        token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token is None:
            return None
    else:
        where = f"--token-file {file}"
        try:
            mode, token = file.stat().st_mode, file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{where}: cannot be read: {error}") from error
        if stat.S_IMODE(mode) & 0o077:
            raise InputError(f"{where}: others may read or write it; chmod 600 {file}")
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            f"{where}: must be 16 or more printable ASCII characters without spaces; "
            "`openssl rand -hex 32` makes some"
        )
    return token


@dataclass(frozen=True)
class Endpoint:
    """A served model.

    Args:
        url: with `/v1` at its end.
        model: its name in requests.
        token: that requests bear.
    """

    url: str
    model: str
    token: str = field(repr=False)

    def ask(self, path: str, body: Any = None, seconds: float = _SECONDS) -> Any:
        """GET, or POST where there is a body; the answer's JSON.

        Raises:
            NoAnswer: of any kind.
        """
        request = urllib.request.Request(
            f"{self.url}/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
        )
        try:
            with _OPENER.open(request, timeout=seconds) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace").strip()[:300]
            raise NoAnswer(f"status {error.code}: {text}", error.code) from error
        except (OSError, HTTPException, ValueError) as error:
            raise NoAnswer(str(getattr(error, "reason", error)) or type(error).__name__) from error

    def context_length(self) -> int:
        """Tokens of prompt and completion together that the server takes.

        Raises:
            NoAnswer: or it serves other models.
        """
        models = {it["id"]: it for it in self.ask("models")["data"]}
        if self.model not in models:
            raise NoAnswer(f"it serves {', '.join(models)} and not {self.model}")
        return int(models[self.model]["max_model_len"])

    def complete(self, prompt: str, max_tokens: int, seconds: float) -> str:
        """The greedy completion of a prompt."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return str(self.ask("completions", body, seconds)["choices"][0]["text"])
