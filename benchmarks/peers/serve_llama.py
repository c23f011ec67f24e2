"""A small HTTP server over llama.cpp's batched core, for where llama.cpp's own server cannot be had:
streams of completions, one thread that steps, one thread a connection that writes.

    python serve_llama.py SETTINGS --port PORT [--batch TOKENS]      (SETTINGS: as for drive_llama.py)
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from llama_core import Core

Answer = queue.SimpleQueue[tuple[int, bool]]
Submission = tuple[list[int], int, Answer]


def step_forever(core: Core, submitted: queue.SimpleQueue[Submission]) -> None:
    """Take what was submitted, step, hand out the tokens."""
    while True:
        while core.idle or not submitted.empty():
            prompt, new, answer = submitted.get()
            core.add(answer, prompt, new)
        for answer, token, last in core.step():
            answer.put((token, last))


def handler(submitted: queue.SimpleQueue[Submission]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer: Answer = queue.SimpleQueue()
            submitted.put((request["prompt"], request["max_tokens"], answer))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            last = False
            while not last:
                token, last = answer.get()
                choice = {"text": f"<{token}>", "finish_reason": "length" if last else None}
                self.event(json.dumps({"choices": [choice]}))
            self.event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")

        def event(self, data: str) -> None:
            line = f"data: {data}\n\n".encode()
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")

        def log_message(self, format: str, *arguments: Any) -> None:
            """Requests are not logged."""

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int)
    options = parser.parse_args()
    settings = options.settings | ({"batch": options.batch} if options.batch else {})
    submitted: queue.SimpleQueue[Submission] = queue.SimpleQueue()
    core = Core(**settings)
    threading.Thread(target=step_forever, args=(core, submitted), daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", options.port), handler(submitted)).serve_forever()


if __name__ == "__main__":
    main()
