"""A judge's server in the tests: it does everything a server should not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Server:
    """An OpenAI-compatible server whose `respond(data, number)` says what comes back to a request.

    It returns a grade (int), the text of a reply (str), (status, body, headers), or None to hang up without a word.
    """

    def __init__(self) -> None:
        self.respond: Callable[[dict[str, Any], int], Any] = lambda data, number: 5
        self.requests: list[dict[str, Any]] = []
        self.answers: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.handle(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        data = json.loads(body["messages"][1]["content"].split("<data>\n")[1].split("\n</data>")[0])
        with self.lock:
            self.requests.append(body)
            self.answers.append(data["answer"])
            self.headers.append({key.lower(): value for key, value in handler.headers.items()})
            number = len(self.requests) - 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            said = self.respond(data, number)
        finally:
            with self.lock:
                self.at_once -= 1
        if said is None:
            handler.connection.close()
            return
        if isinstance(said, int):
            said = json.dumps({"reason": "because", "score": said})
        status, text, headers = said if isinstance(said, tuple) else (200, completion(said), {})
        content = text.encode() if isinstance(text, str) else text
        try:
            handler.send_response(status)
            for key, value in {
                "content-type": "application/json",
                "content-length": str(len(content)),
                **headers,
            }.items():
                handler.send_header(key, value)
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:
            pass  # the client did not wait


def completion(text: str | None, finish_reason: str = "stop") -> str:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 400, "completion_tokens": 20, "total_tokens": 420}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # 127.0.0.1 only
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()
