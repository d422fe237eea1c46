"""An S3 server on this machine (moto's), in front of which faults can be put."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from threading import Thread
from typing import Any
from urllib.request import Request, urlopen

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"
REFUSALS = {
    "busy": (
        "503 Slow Down",
        b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
    ),
    "denied": ("403 Forbidden", b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"),
}
"""{fault: status and body of the answer}"""


@dataclass
class S3:
    """The server; `faults` says for each request what goes wrong with it."""

    endpoint: str = ""
    fault: Callable[[dict[str, Any]], str | None] = lambda environ: None
    """WSGI environ -> "busy" (503), "denied" (403), "cut" (half the answer), "flip" (a bit of the answer), or None."""
    injected: list[str] = field(default_factory=list)

    def every(self, n: int, *kinds: str) -> None:
        """From now on every n-th request for an object's content fails, in turn in these ways."""
        numbers, faults = itertools.count(1), itertools.cycle(kinds)
        self.fault = lambda environ: next(faults) if _reads(environ) and next(numbers) % n == 0 else None

    def serve(self, app: Any, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        kind = self.fault(environ)
        if kind is None:
            return app(environ, start_response)
        self.injected.append(kind)
        if kind in REFUSALS:
            status, body = REFUSALS[kind]
            start_response(status, [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
            return [body]
        body = b"".join(app(environ, start_response))
        return [body[: len(body) // 2] if kind == "cut" else body[:-1] + bytes([body[-1] ^ 1])]


def _reads(environ: dict[str, Any]) -> bool:
    return environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].count("/") > 1


@contextlib.contextmanager
def s3_server() -> Iterator[S3]:
    """A server with an empty bucket, to which the environment's credentials and endpoint lead meanwhile."""
    found = S3()
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server(
        "127.0.0.1", 0, lambda *request: found.serve(app, *request), threaded=True, request_handler=_Quiet
    )
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    found.endpoint = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own: its pauses are of seconds
        _forget_clients()
        urlopen(Request(f"{found.endpoint}/moto-api/reset", method="POST")).close()  # servers of a process share state
        _make_bucket()
        yield found
    _forget_clients()
    server.shutdown()
    thread.join()


class _Quiet(MotoRequestHandler):
    def log(self, *args: object) -> None:
        pass


def _make_bucket() -> None:
    import s3fs

    s3fs.S3FileSystem().mkdir(BUCKET)


def _forget_clients() -> None:
    """A client keeps the endpoint that it was made for."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
