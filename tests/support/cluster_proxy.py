"""A proxy in front of an HTTP server, such as S3, that fails on demand, and remembers who asked for what."""

from __future__ import annotations

import http.client
import os
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Kind = Literal["status", "reset", "lost", "stall", "truncate"]


@dataclass(frozen=True)
class Request:
    """One request. `status`: of the answer, 0 where there was none. `time`: seconds since 1970."""

    time: float
    client: str
    method: str
    path: str
    status: int
    fault: str | None = None


@dataclass
class Fault:
    """What the next `times` requests that `wanted` accepts will meet. `value`: status code, or seconds of a stall.

    `reset` breaks the connection before the server hears of the request, `lost` when it has done what was asked.
    """

    kind: Kind
    times: int
    value: float = 0
    wanted: Callable[[str, str], bool] = field(default=lambda method, path: True)

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}" if self.value else self.kind


class FaultyProxy:
    """Passes HTTP on to `upstream`. `serve` blocks; run it in a thread of the namespace it is to listen in."""

    def __init__(self, listen: tuple[str, int], upstream: tuple[str, int]) -> None:
        self.listen, self.upstream = listen, upstream
        self.url = f"http://{listen[0]}:{listen[1]}"
        self.requests: list[Request] = []
        self.met: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None

    def serve(self) -> None:
        proxy = self

        class Handler(_Handler):
            owner = proxy

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def server_bind(self) -> None:
                """Without the name of the address: to ask for it takes half a minute where no name server answers."""
                socketserver.TCPServer.server_bind(self)
                self.server_name, self.server_port = proxy.listen

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that went away is not news."""

        self._server = Server(self.listen, Handler)
        self._server.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def inject(
        self, kind: Kind, times: int = 1, value: float = 0, wanted: Callable[[str, str], bool] | None = None
    ) -> Fault:
        """Have the next `times` requests for which `wanted(method, path)` holds fail; returns the fault, which counts
        down."""
        fault = Fault(kind, times, value, *([wanted] if wanted else []))
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """No more faults."""
        with self._lock:
            self._faults.clear()

    def pick(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.wanted(method, path):
                    fault.times -= 1
                    return fault
        return None

    def note(self, client: str, method: str, path: str, status: int, fault: Fault | None) -> None:
        request = Request(time.time(), client, method, path, status, str(fault) if fault else None)
        self.requests.append(request)
        if fault:
            self.met.append(request)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: FaultyProxy

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.owner.pick(self.command, self.path)
        status = 0
        try:
            if fault and fault.kind == "stall":
                time.sleep(fault.value)
            if fault and fault.kind == "reset":
                self.reset()
            elif fault and fault.kind == "status":
                status = int(fault.value)
                self.answer(status, {"Content-Type": "application/xml"}, _error_body(status))
            else:
                status = self.pass_on(body, fault.kind if fault else None)
        finally:
            self.owner.note(self.client_address[0], self.command, self.path, status, fault)

    do_GET = do_PUT = do_POST = do_PATCH = do_HEAD = do_DELETE = handle_any

    def pass_on(self, body: bytes, fault: Kind | None) -> int:
        upstream = http.client.HTTPConnection(*self.owner.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):  # neither is part of the signature
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            self.answer(502, {}, b"")
            return 502
        finally:
            upstream.close()
        if fault == "lost":
            self.reset()
            return 0
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _OF_THE_CONNECTION}
        if self.command == "HEAD":
            headers["Content-Length"] = answer.getheader("Content-Length") or "0"
        self.answer(answer.status, headers, data, len(data) // 2 if fault == "truncate" else None)
        return answer.status

    def answer(self, status: int, headers: dict[str, str], data: bytes, sent: int | None = None) -> None:
        """Send an answer; with `sent`, only so many bytes of its body, and hang up."""
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])
        if sent is not None:
            self.wfile.flush()
            self.hang_up()

    def reset(self) -> None:
        """End the connection with a TCP reset, as a crashed server or an impatient balancer does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        os.close(self.connection.detach())  # `close` would wait for the files that were made of it

    def log_message(self, *_: object) -> None:
        """`FaultyProxy.requests` is the log."""


_OF_THE_CONNECTION = ("connection", "transfer-encoding", "content-length", "keep-alive")


def _error_body(status: int) -> bytes:
    code = "SlowDown" if status == 503 else "InternalError"
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'.encode()
