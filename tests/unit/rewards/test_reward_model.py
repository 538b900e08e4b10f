"""Reward models behind HTTP, against a real server on this machine that misbehaves as told.

Not covered: TLS, and a real vLLM or judge.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gdpo_megatron.config.schema import RewardConfig
from gdpo_megatron.errors import InputError
from gdpo_megatron.rewards import NOT_APPLICABLE, Invalid, RewardSample, resolve_rewards
from gdpo_megatron.rewards.base import collect_events
from gdpo_megatron.rewards.builtin import http_json
from gdpo_megatron.rewards.builtin.reward_model import (
    reward_model,
    reward_model_chat,
    reward_model_score,
)

Reply = tuple[int, dict[str, str], bytes]
GROUP = [
    RewardSample(completion="four", prompt="2+2?", answer="4"),
    RewardSample(completion="five \ud800", prompt="2+2?", answer="4"),
]


def reply(value: object, status: int = 200, **headers: str) -> Reply:
    return status, headers, json.dumps(value).encode()


class Server:
    """Answers what `behave(number of the request, its body)` returns; notes what it got."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.behave: Callable[[int, Any], Reply] = lambda number, body: reply(None)
        self.running = self.most_running = 0
        self.released = threading.Event()
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    server.requests.append((self.path, headers, body))
                    server.running += 1
                    server.most_running = max(server.most_running, server.running)
                try:
                    status, headers, content = server.behave(number, body)
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name.replace("_", "-"), value)
                    if "Content_Length" not in headers:
                        self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass
                finally:
                    with lock:
                        server.running -= 1

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/score"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http_json, "_FIRST_PAUSE_SECONDS", 0.01)
    running = Server()
    yield running
    running.close()


PATIENT: dict[str, Any] = {"timeout": 600.0, "request_timeout": 300.0}
"""Limits that nothing here reaches."""


def judged(server: Server, **args: Any) -> list[Any]:
    return asyncio.run(reward_model(GROUP, url=server.url, **(PATIENT | args)))


def test_plain_json(server: Server):
    server.behave = lambda number, body: reply({"scores": [1, -0.5], "more": "ignored"})
    assert judged(server) == [1.0, -0.5]
    ((path, headers, body),) = server.requests
    assert path == "/score"
    assert body == {
        "samples": [
            {"prompt": "2+2?", "completion": "four", "answer": "4"},
            {"prompt": "2+2?", "completion": "five \ud800", "answer": "4"},
        ]
    }
    assert "authorization" not in headers


def test_score_follows_the_index(server: Server):
    data = [{"index": 1, "score": 0.25, "object": "score"}, {"index": 0, "score": 0.75}]
    server.behave = lambda number, body: reply({"data": data})
    scored = asyncio.run(reward_model_score(GROUP, url=server.url, model="rm", **PATIENT))
    assert scored == [0.75, 0.25]
    assert server.requests[0][2] == {
        "model": "rm",
        "text_1": ["2+2?", "2+2?"],
        "text_2": ["four", "five \ud800"],
    }


WRONG_FORM = "server reply of the wrong form"
WRONG_COUNT = "server sent the wrong number of scores"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (reply({"scores": [1.0]}), [WRONG_COUNT] * 2),
        (reply({"scores": [1.0, 2.0, 3.0]}), [WRONG_COUNT] * 2),
        (reply({"scores": {"a": 1}}), [WRONG_FORM] * 2),
        (reply({"score": [1, 2]}), [WRONG_FORM] * 2),
        (reply([1, 2]), [WRONG_FORM] * 2),
        (reply({"scores": [None, 2]}), ["server gave no score", 2.0]),
        (reply({"scores": ["1", True]}), ["server sent a score that is no number"] * 2),
        (reply({"scores": [10**400, 2]}), ["server sent a score that is no number", 2.0]),
        ((200, {}, b'{"scores": [NaN, 1]}'), ["server reply not JSON"] * 2),
        ((200, {}, b'{"scores": [1, 1'), ["server reply not JSON"] * 2),
        ((200, {}, b"\xff\xfe"), ["server reply not JSON"] * 2),
        ((200, {}, b""), ["server reply not JSON"] * 2),
        ((200, {}, b"[" * 100_000), ["server reply not JSON"] * 2),
        ((200, {}, b" " * 1_000_001), ["server reply too large"] * 2),
        (
            (200, {"Content_Encoding": "gzip"}, gzip.compress(b" " * 50_000_000)),
            ["server reply compressed"] * 2,
        ),
        (reply({}, status=401), ["server status 401"] * 2),
        (reply({}, status=404), ["server status 404"] * 2),
        (reply({"scores": [1, 2]}, status=204), ["server status 204"] * 2),
    ],
)
def test_what_is_no_score_is_invalid_with_its_reason(
    server: Server, answer: Reply, expected: list[Any]
):
    server.behave = lambda number, body: answer
    with collect_events() as events:
        shown = [r.reason if isinstance(r, Invalid) else r for r in judged(server)]
    assert shown == expected
    assert len(server.requests) == 1 and not events  # asking again would not help


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(server: Server, status: int):
    elsewhere = Server()
    try:
        elsewhere.behave = lambda number, body: reply({"scores": [1, 1]})
        server.behave = lambda number, body: reply({}, status=status, Location=elsewhere.url)
        assert [r.reason for r in judged(server)] == ["server redirects"] * 2
        server.behave = lambda number, body: reply({}, status=status, Location="/other")
        assert [r.reason for r in judged(server)] == ["server redirects"] * 2
        assert elsewhere.requests == []
        assert [path for path, _, _ in server.requests] == ["/score"] * 2
    finally:
        elsewhere.close()


def test_proxies_of_the_environment_are_not_used(server: Server, monkeypatch: pytest.MonkeyPatch):
    proxy = Server()
    try:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        server.behave = lambda number, body: reply({"scores": [1, 2]})
        assert judged(server) == [1.0, 2.0]
        assert proxy.requests == []
    finally:
        proxy.close()


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_failures_that_may_pass_are_tried_again(server: Server, status: int):
    server.behave = lambda number, body: (
        reply({}, status=status) if number < 2 else reply({"scores": [1, 2]})
    )
    with collect_events() as events:
        assert judged(server, num_retries=2) == [1.0, 2.0]
    assert events == {"retries": 2}
    server.behave = lambda number, body: reply({}, status=status)
    assert [r.reason for r in judged(server, num_retries=1)] == [f"server status {status}"] * 2
    assert len(server.requests) == 3 + 2


def test_a_pause_that_is_asked_for_is_kept_or_too_long(server: Server):
    # 1000 s are beyond the time of the group: no use in waiting.
    server.behave = lambda number, body: reply({}, status=429, Retry_After="1000")
    assert judged(server)[0] == Invalid("server status 429")
    assert len(server.requests) == 1


def test_a_connection_that_breaks_is_tried_again(server: Server):
    def behave(number: int, body: Any) -> Reply:
        short = {"Content_Length": "1000"} if number == 0 else {}
        return 200, short | {"Connection": "close"}, b'{"scores": [1, 2]}'

    server.behave = behave
    assert judged(server) == [1.0, 2.0]
    assert len(server.requests) == 2


def test_no_server_at_all(server: Server):
    server.close()
    results = judged(server, num_retries=1)
    assert results == [Invalid("server unreachable", "ConnectError")] * 2


def test_a_slow_server_is_given_up(server: Server):
    def behave(number: int, body: Any) -> Reply:
        server.released.wait(600)
        return reply({"scores": [1, 2]})

    server.behave = behave
    with collect_events() as events:
        assert judged(server, request_timeout=0.1, num_retries=1) == [Invalid("server timeout")] * 2
        assert events == {"retries": 1}
        # However many retries are left: the time of the group bounds them.
        assert judged(server, timeout=0.2, num_retries=20)[0] == Invalid("server timeout")
        assert events == {"retries": 1}


def test_a_reply_that_never_ends_is_given_up(server: Server):
    server.behave = lambda number, body: (200, {"Content_Length": "1000"}, b" ")
    results = judged(server, request_timeout=0.1, num_retries=0)
    assert results == [Invalid("server timeout")] * 2


def test_the_key_is_sent_and_never_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("RM_KEY", "s3cret-key")
    caplog.set_level(logging.DEBUG)
    server.behave = lambda number, body: reply({}, status=500)
    results = judged(server, api_key_env="RM_KEY", num_retries=1)
    assert server.requests[0][1]["authorization"] == "Bearer s3cret-key"
    assert "s3cret" not in caplog.text + repr(results)
    monkeypatch.setenv("RM_KEY", "s3cret\nkey")  # from a file, with its end of line
    with pytest.raises(ValueError) as error:
        judged(server, api_key_env="RM_KEY")
    assert "s3cret" not in str(error.value) + caplog.text


def chat(server: Server, **args: Any) -> list[Any]:
    options = {"model": "judge", "template": "Q: {prompt} A: {completion}", "score_range": (0, 10)}
    return asyncio.run(reward_model_chat(GROUP, url=server.url, **PATIENT | options | args))


def said(text: object) -> Reply:
    return reply({"choices": [{"message": {"role": "assistant", "content": text}}]})


def test_chat(server: Server):
    server.behave = lambda number, body: said(
        "Score: 2. On reflection:\n**Score:** 7.5" if "four" in str(body) else "score = 0"
    )
    assert chat(server, system_prompt="Judge.") == [7.5, 0.0]
    bodies = {body["messages"][1]["content"]: body for _, _, body in server.requests}
    assert bodies["Q: 2+2? A: four"] == {
        "model": "judge",
        "messages": [
            {"role": "system", "content": "Judge."},
            {"role": "user", "content": "Q: 2+2? A: four"},
        ],
        "max_tokens": 1024,
        "temperature": 0.0,
    }


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (said("no idea"), "judge gave no score"),
        (said("Score: 11"), "judge's score out of range"),
        (said("Score: -1"), "judge's score out of range"),
        (said(None), WRONG_FORM),
        (reply({"choices": []}), WRONG_FORM),
        (reply({"error": "x"}), WRONG_FORM),
    ],
)
def test_a_judge_without_score(server: Server, answer: Reply, reason: str):
    # Each sample by itself: the second one is judged.
    server.behave = lambda number, body: answer if "four" in str(body) else said("Score: 3")
    first, second = chat(server)
    assert (first.reason, second) == (reason, 3.0)


def test_a_pattern_that_takes_too_long(server: Server):
    server.behave = lambda number, body: said("a" * 200 + "b")
    results = chat(server, score_pattern="(?:a|aa)+$()")
    assert [r.reason for r in results] == ["judge's reply takes the pattern too long"] * 2


def test_braces_in_a_completion_are_text(server: Server):
    server.behave = lambda number, body: said("Score: 1")
    sample = RewardSample(completion="{prompt} {0}", prompt="P", answer="A")
    scored = asyncio.run(
        reward_model_chat(
            [sample],
            url=server.url,
            **PATIENT,
            model="judge",
            template="{{}} {completion} {answer}",
            score_range=(0, 1),
        )
    )
    assert scored == [1.0]
    assert server.requests[0][2]["messages"] == [{"role": "user", "content": "{} {prompt} {0} A"}]


def test_a_template_with_answer_does_not_apply_without_one(server: Server):
    samples = [RewardSample(completion="x"), RewardSample(completion="y", answer="4")]
    server.behave = lambda number, body: said("Score: 1")
    scored = asyncio.run(
        reward_model_chat(
            samples,
            url=server.url,
            **PATIENT,
            model="judge",
            template="{completion} {answer}",
            score_range=(0, 1),
        )
    )
    assert scored == [NOT_APPLICABLE, 1.0]
    assert len(server.requests) == 1


def test_so_many_requests_at_a_time(server: Server):
    both = threading.Barrier(2)

    def behave(number: int, body: Any) -> Reply:
        both.wait(120)  # two are under way at once, or this fails
        return said("Score: 1")

    server.behave = behave
    samples = [RewardSample(completion=str(i)) for i in range(6)]
    scored = asyncio.run(
        reward_model_chat(
            samples,
            url=server.url,
            **PATIENT,
            model="judge",
            template="{completion}",
            score_range=(0, 1),
            max_concurrent=2,
        )
    )
    assert scored == [1.0] * 6
    assert server.most_running == 2


CHAT = {
    "url": "http://localhost/v1/chat/completions",
    "model": "m",
    "template": "{completion}",
    "score_range": [0, 10],
}


@pytest.mark.parametrize(
    ("type", "args", "message"),
    [
        ("reward_model", {}, "args.url is missing"),
        ("reward_model", {"url": "localhost:80"}, "must be http://host"),
        ("reward_model", {"url": "file:///etc/passwd"}, "must be http://host"),
        ("reward_model", {"url": "http://"}, "must be http://host"),
        ("reward_model", {"url": "http://u:p@host/"}, "must not hold a user or password"),
        ("reward_model", {"url": "http://host:99999/"}, "Port out of range"),
        ("reward_model", {"url": "http://host/#a"}, "neither blanks nor a fragment"),
        ("reward_model", {"url": "http://host/", "timeout": 0}, "greater than 0"),
        ("reward_model", {"url": "http://host/", "num_retries": 21}, "less than or equal to 20"),
        ("reward_model", {"url": "http://host/", "api_key_env": "NO_KEY"}, "NO_KEY is not set"),
        ("reward_model", {"url": "http://host/", "api_key_env": "a-b"}, "not the key itself"),
        ("reward_model_score", {"url": "http://host/"}, "args.model is missing"),
        ("reward_model_chat", CHAT | {"template": "{prompt}"}, "lacks the field {completion}"),
        ("reward_model_chat", CHAT | {"template": "{completion.x}"}, "the field {completion.x}"),
        ("reward_model_chat", CHAT | {"template": "{completion} {"}, "Value error"),
        ("reward_model_chat", CHAT | {"score_range": [1, 1]}, "first must be smaller"),
        ("reward_model_chat", CHAT | {"score_range": [1]}, "args.score_range is [1]"),
        ("reward_model_chat", CHAT | {"score_pattern": "x"}, "must have one group"),
        ("reward_model_chat", CHAT | {"score_pattern": "("}, "no regular expression"),
        ("reward_model_chat", CHAT | {"max_concurrent": 0}, "greater than 0"),
    ],
)
def test_wrong_arguments_fail_before_the_run(
    type: str, args: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(InputError) as error:
        resolve_rewards([RewardConfig(name="r", type=type, args=args)])
    (problem,) = error.value.problems
    assert message in problem and "\n" not in problem


def test_the_address_of_a_chat_is_enough_for_the_rest():
    (resolved,) = resolve_rewards([RewardConfig(name="r", type="reward_model_chat", args=CHAT)])
    assert resolved.fn.batch and resolved.fn.is_async
    assert resolved.args["score_range"] == (0.0, 10.0)
