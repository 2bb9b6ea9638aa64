"""Serve the built site on this machine alone: python scripts/site/serve.py _build/html 8000."""

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class QuietHandler(SimpleHTTPRequestHandler):
    """Static files, without a line for each request."""

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def make_server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server for `folder` on the loopback address; port 0 takes a free `server_port`."""
    return ThreadingHTTPServer(
        ("127.0.0.1", port), partial(QuietHandler, directory=str(folder))
    )


def main() -> None:
    """The command line."""
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    try:
        server = make_server(folder, port)
    except OSError:
        sys.exit(
            f"make: port {port} is taken; name another one with `make serve PORT={port + 1}`."
        )
    print(f"Serving the book at http://127.0.0.1:{server.server_port}/ (Ctrl+C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
