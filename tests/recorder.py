"""A reverse proxy that writes down what is sent through it, and answers some requests by itself as it is told: a provider on a bad day."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx


@dataclass(frozen=True, kw_only=True)
class Odd:
    """What happens to one request in place of being forwarded."""

    status: int = 0
    """0: it is forwarded."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay: float = 0.0
    """Seconds before anything is sent."""
    cut: int | None = None
    """Bytes of the forwarded answer after which the line is cut."""
    stall: float = 0.0
    """Seconds after the first piece of the forwarded answer."""


class Recorder(ThreadingHTTPServer):
    """Forwards to one address."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        """Args: target: `http://host:port`."""
        super().__init__(("127.0.0.1", 0), _Request)
        self.target, self.headers, self.bodies, self.odd = target, list[dict[str, str]](), list[bytes](), list[Odd]()
        self.broken = threading.Event()
        """The one who asked went away before the end of an answer."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The bodies, read."""
        return [json.loads(body) for body in self.bodies]

    def then(self, *odd: Odd) -> None:
        """Forget what was, and do this to the next requests."""
        self.headers.clear()
        self.bodies.clear()
        self.broken.clear()
        self.odd[:] = odd

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A line that was cut is no news."""


class _Request(BaseHTTPRequestHandler):
    server: Recorder
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        self.server.bodies.append(body)
        odd = self.server.odd.pop(0) if self.server.odd else Odd()
        time.sleep(odd.delay)
        try:
            if odd.status:
                self._send(odd.status, {**odd.headers, "content-length": str(len(odd.body)), "content-type": "application/json"})
                self.wfile.write(odd.body)
            else:
                self._forward(body, odd.cut, odd.stall)
        except OSError:
            self.server.broken.set()

    def _send(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _forward(self, body: bytes, cut: int | None, stall: float) -> None:
        sent = {"content-type": "application/json", "authorization": self.headers.get("authorization", "")}
        with httpx.stream("POST", self.server.target + self.path, content=body, headers=sent, timeout=60) as answer:
            kept = ("content-type", "retry-after", "content-length")
            self.close_connection = True
            self._send(answer.status_code, {name: value for name, value in answer.headers.items() if name in kept} | {"connection": "close"})
            for piece in answer.iter_raw():
                self.wfile.write(piece if cut is None else piece[:cut])
                self.wfile.flush()
                time.sleep(stall)
                cut = None if cut is None else cut - len(piece)
                if cut is not None and cut <= 0:
                    self.connection.shutdown(2)
                    return

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""
