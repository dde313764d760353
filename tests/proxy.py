"""A TCP proxy that counts what passes, and cuts the line after so many bytes: a connection that breaks in the middle of a file."""

from __future__ import annotations

import socket
import socketserver
import threading
from contextlib import suppress
from typing import Any


class Proxy(socketserver.ThreadingTCPServer):
    """Forwards to one address. Once cut, it drops what is open and whatever is opened, until it is mended."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Line)
        self.target, self.up, self.down, self.limit = (host, port), 0, 0, None
        self.cut, self.guard = False, threading.Lock()
        self.limit: int | None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def cut_after(self, count: int | None) -> None:
        """Mend the line, count anew, and cut it once so many bytes have passed, up and down; None: never."""
        with self.guard:
            self.up, self.down, self.limit, self.cut = 0, 0, count, False

    def passes(self, count: int, upwards: bool) -> int:
        """How many of so many bytes still pass."""
        with self.guard:
            if self.cut:
                return 0
            if self.limit is not None and self.up + self.down + count >= self.limit:
                count, self.cut = self.limit - self.up - self.down, True
            self.up, self.down = (self.up + count, self.down) if upwards else (self.up, self.down + count)
            return count

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A line that was cut is no news."""


class _Line(socketserver.BaseRequestHandler):
    """One connection, both ways."""

    server: Proxy

    def handle(self) -> None:
        if self.server.cut:
            return
        with socket.create_connection(self.server.target) as far:
            back = threading.Thread(target=self.pump, args=(far, self.request, False), daemon=True)
            back.start()
            self.pump(self.request, far, True)
            back.join()

    def pump(self, source: socket.socket, target: socket.socket, upwards: bool) -> None:
        with suppress(OSError):
            while (data := source.recv(65536)) and (count := self.server.passes(len(data), upwards)):
                target.sendall(data[:count])
                if count < len(data):
                    break
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
