"""Web servers for the tests, on this machine: one that keeps objects as S3 does, one that serves a folder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response

App = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Asked(NamedTuple):
    method: str
    path: str
    query: str
    range: str | None


class Server:
    """A WSGI application on a free port, with faults on demand; a context manager.

    Attributes:
        asked: the requests seen.
        fail: status to answer the next `failures` requests with.
        gather: requests for paths with this ending wait until so many of them are under way together, once.
        held: while it is not set, requests for ranges hang.
    """

    def __init__(self, app: App) -> None:
        self.asked: list[Asked] = []
        self.fail, self.failures = 503, 0
        self.gather: tuple[str, int] | None = None
        self.held = threading.Event()
        self.held.set()
        self._app, self._gathered, self._change = app, 0, threading.Condition()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.held.set()
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def clear(self) -> None:
        self.asked.clear()

    def gets(self) -> list[Asked]:
        return [a for a in self.asked if a.method == "GET"]

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        request = Request(environ)
        asked = Asked(request.method, request.path, request.query_string.decode(), request.headers.get("Range"))
        with self._change:
            self.asked.append(asked)
            failing = self.failures > 0
            self.failures -= failing
            self._wait_for_others(asked.path)
        if asked.range:
            self.held.wait()
        return Response(status=self.fail)(environ, start) if failing else self._app(environ, start)

    def _wait_for_others(self, path: str) -> None:
        if self.gather is None or not path.endswith(self.gather[0]):
            return
        self._gathered += 1
        if self._gathered == self.gather[1]:
            self.gather, self._gathered = None, 0
            self._change.notify_all()
        assert self._change.wait_for(lambda: self.gather is None, timeout=30)


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


def folder_app(folder: Path, *, ranges: bool = True) -> App:
    """Serves the files of a folder; lists nothing."""

    def app(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        path = folder / Request(environ).path.lstrip("/")
        if not path.is_file():
            return Response(status=404)(environ, start)
        if not ranges:
            environ.pop("HTTP_RANGE", None)
        return send_file(path, environ, mimetype="application/octet-stream", conditional=ranges)(environ, start)

    return app


def s3_app() -> App:
    """Keeps objects in memory, as moto does."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    return DomainDispatcherApplication(create_backend_app)
