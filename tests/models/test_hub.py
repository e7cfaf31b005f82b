"""Without an answer from the hub the cache is used at once, without the client's minute of trying."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"
LOADING = (PROGRAMS / "loading.py").read_text(encoding="utf-8")


class EmptyHub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200 if self.path in ("", "/") else 404)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, *_: object) -> None:
        pass


def said(hub: str) -> list[str]:
    unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"HF_ENDPOINT": hub}
    program = [sys.executable, "-c", LOADING]
    return subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_hub_that_does_not_answer_is_not_asked_again() -> None:
    *errors, offline = said("http://127.0.0.1:9")
    assert len(errors) == 2 and all("neither a local directory nor loadable from the hub" in line for line in errors)
    assert offline == "True"


def test_a_hub_that_answers_is_used() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        *errors, offline = said(f"http://127.0.0.1:{hub.server_address[1]}")
        hub.shutdown()
    assert len(errors) == 2 and offline == "False"
