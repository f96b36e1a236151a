"""Whether the Hub is asked: a name without network is answered at once, and a copy that is kept needs none."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from llmkit import hub
from llmkit.data.tokenizers.load import load_tokenizer
from llmkit.errors import MissingError
from llmkit.models.count import fetch_config
from llmkit.models.tasks import longest_input

NAME = "someone/model"


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """As on a machine that was not told to stay offline; nobody answers, and nothing waits to try again."""

    def impatient(seconds):
        raise AssertionError(f"waited {seconds} s to try again")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", impatient)
    hub._answers.cache_clear()
    yield
    hub._answers.cache_clear()


@pytest.fixture
def answering(monkeypatch):
    """A Hub on this machine that gives one answer to everything."""
    servers = []

    def make(code, body=b"{}", **headers):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("code", "headers", "local"),
    [
        (200, {}, False),
        (404, {"X_Error_Code": "RepoNotFound"}, False),
        (401, {"X_Error_Code": "GatedRepo"}, False),
        (403, {}, False),
        (503, {}, True),
    ],
)
def test_what_the_hub_answers_decides(answering, code, headers, local):
    answering(code, json.dumps({"id": NAME}).encode(), **headers)
    assert hub.local_only(NAME) is local


def test_a_folder_and_what_can_be_no_name_are_not_asked_for(tmp_path, answering):
    answering(200)
    assert hub.local_only(str(tmp_path))
    assert hub.local_only("no/such/folder")


@pytest.mark.parametrize("ask", [fetch_config, load_tokenizer, longest_input])
def test_without_network_a_name_is_answered_at_once(monkeypatch, tmp_path, ask):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingError, match=NAME):
        ask(NAME)


def test_without_network_the_copy_that_is_kept_is_taken(monkeypatch, tmp_path):
    kept = tmp_path / "models--someone--model"
    (kept / "snapshots/abc").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("abc")
    (kept / "snapshots/abc/config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 77}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert fetch_config(NAME)["n_positions"] == 77
    assert longest_input(NAME) == 77
