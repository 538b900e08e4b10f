"""Stands in for vLLM's server where only its start and end are looked at; run as a program.

It takes vLLM's options and its token, and does what the variable STUB_SERVER says: `ok` answers;
`refuses` ends with an error; `silent` never listens; `breaks` answers three times and ends;
`stubborn` answers and has a child that no SIGTERM ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


class Handler(BaseHTTPRequestHandler):
    answers_left = 3 if os.environ["STUB_SERVER"] == "breaks" else 10**6

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({"data": [{"id": option("--served-model-name"), "max_model_len": 99}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"choices": [{"text": "2"}]})

    def answer(self, body: Any) -> None:
        allowed = self.headers.get("Authorization") == f"Bearer {os.environ['VLLM_API_KEY']}"
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
        Handler.answers_left -= 1


def main(what: str) -> None:
    Path(os.environ["STUB_PIDS"]).write_text(str(os.getpid()))
    if what == "refuses":
        print("(EngineCore pid=7) ERROR 11-22 17:03:11 [core.py:1] ValueError: heads of size 8")
        print("Traceback (most recent call last):\nRuntimeError: Engine core failed")
        sys.exit(3)
    if what == "silent":
        time.sleep(600)
    if what == "stubborn":
        child = subprocess.Popen([sys.executable, "-c", STUBBORN])
        Path(os.environ["STUB_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with HTTPServer((option("--host"), int(option("--port"))), Handler) as server:
        while Handler.answers_left > 0:
            server.handle_request()
    print("RuntimeError: the engine died")
    sys.exit(1)


if __name__ == "__main__":
    main(os.environ["STUB_SERVER"])
