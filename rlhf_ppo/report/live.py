"""Live report: serve the page of a run while it trains; the browser refreshes it as the run writes."""

import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from rlhf_ppo.loop.run_folder import RunFolder
from rlhf_ppo.report.page import live_page
from rlhf_ppo.utils.access import is_authorized, is_loopback

logger = logging.getLogger(__name__)

DEFAULT_ADDRESS = "127.0.0.1:8019"
TOKEN_VARIABLE = "RLHF_PPO_LIVE_TOKEN"
DRAWING_SHARE = 0.05
"""Largest share of the time in which the page is drawn: what the server takes from the training beside it."""
SCRIPT = Path(__file__).parent / "templates" / "live.js"
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy: the page loads nothing from elsewhere and runs no script but its own."""


@contextmanager
def serve_report(run_dir: Path | str, *, title: str, address: str | None = None) -> Iterator[str]:
    """Context manager: while active, the report of the run is served; yields the page's address.

    Args:
        run_dir: The run folder; created when missing.
        title: Heading of the page.
        address: HOST:PORT to listen on. None takes `DEFAULT_ADDRESS`, or another port when that one is taken. A host
            that other machines can reach needs a token in the environment variable RLHF_PPO_LIVE_TOKEN; the browser
            asks for it as a password.

    Raises:
        ValueError: The address cannot be read, or needs a token that is not set.
        OSError: The address is taken.
    """
    token = os.environ.get(TOKEN_VARIABLE) or None
    host, port = _parse(address or DEFAULT_ADDRESS)
    if not is_loopback(host) and token is None:
        raise ValueError(
            f"host {host!r} can be reached from other machines, but there is no token: anyone could read the run. "
            f"Set {TOKEN_VARIABLE}, or listen on 127.0.0.1."
        )
    page = LivePage(RunFolder.create(run_dir), title)
    server = _bind(host, port, page, token, any_port=address is None)
    threading.Thread(target=server.serve_forever, name="live report", daemon=True).start()
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


class LivePage:
    """The page as HTML, drawn again when the run has written more, and no more often than `DRAWING_SHARE` allows."""

    def __init__(self, run: RunFolder, title: str) -> None:
        self.run, self.title = run, title
        self._lock = threading.Lock()
        self._state: list[tuple[str, int, int]] | None = None
        self._html = b""
        self._keep_until = 0.0

    def html(self) -> bytes:
        """The current page; one thread draws it, the others wait for it."""
        with self._lock:
            state, start = self._folder_state(), time.monotonic()
            if state != self._state and start >= self._keep_until:
                self._html = live_page(self.run, title=self.title).encode()
                end = time.monotonic()
                self._state, self._keep_until = state, end + (end - start) / DRAWING_SHARE
            return self._html

    def _folder_state(self) -> list[tuple[str, int, int]]:
        files = sorted(path for path in self.run.path.glob("*.json*") if not path.name.startswith("."))
        return [(path.name, (stat := path.stat()).st_mtime_ns, stat.st_size) for path in files]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, page: LivePage, token: str | None) -> None:
        self.page, self.token = page, token
        self.names = {"localhost", "127.0.0.1", "::1", host}
        """Host names that a server without a token answers to; another one belongs to a site that points here."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def handle_error(self, *_: object) -> None:
        """Log a broken connection for those who debug: the terminal belongs to the training."""
        logger.debug("A request for the live report failed.", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 30

    def do_GET(self) -> None:
        """Answer with the page, its script, or a refusal."""
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if self.server.token is None and name not in self.server.names:
            self._answer(403, b"This server answers only to the name of this machine.", "text/plain")
        elif not is_authorized(self.headers.get("Authorization"), self.server.token):
            self._answer(401, f"Password: the value of {TOKEN_VARIABLE}.".encode(), "text/plain")
        elif self.path == "/":
            self._answer(200, self.server.page.html(), "text/html")
        elif self.path == "/live.js":
            self._answer(200, SCRIPT.read_bytes(), "text/javascript")
        else:
            self._answer(404, b"There is only the page / here.", "text/plain")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="rlhf-ppo live report", charset="UTF-8"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name that http.server gives it
        """Log requests for those who debug."""
        logger.debug(format, *args)


def _bind(host: str, port: int, page: LivePage, token: str | None, *, any_port: bool) -> _Server:
    try:
        return _Server(host, port, page, token)
    except OSError as error:
        if any_port:
            return _bind(host, 0, page, token, any_port=False)
        raise OSError(
            f"the live report cannot listen on {host}:{port} ({error.strerror or error}): choose another address."
        ) from error


def _parse(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None:
        raise ValueError(
            f"the address of the live report must be HOST:PORT, such as {DEFAULT_ADDRESS}, got {address!r}."
        )
    return host, port
