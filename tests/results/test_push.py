"""Uploads: what a dry run says, what is refused, and a whole upload to a server of this machine."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from pipeline.__main__ import main
from pipeline.runtime.folder import mark_done


@pytest.fixture
def run(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    mark_done(run / "reinforce", {"updates": 3})
    return run


@pytest.fixture
def hub(monkeypatch):
    """A hub of this machine: the requests that an upload makes; yields what it has got."""
    got = {"refuse": False, "files": {}, "made": None, "tokens": set()}

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got["tokens"].add(self.headers.get("Authorization"))
            code, answer = (403, {"error": "no"}) if got["refuse"] else (200, self._answer(body))
            text = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _answer(self, body: bytes):
            if self.path == "/api/repos/create":
                got["made"] = json.loads(body)
                return {"url": f"{huggingface_hub.constants.ENDPOINT}/me/tiny"}
            if "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        got["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return {
                    "commitUrl": f"{huggingface_hub.constants.ENDPOINT}/me/tiny/commit/1",
                    "commitOid": "1",
                    "success": True,
                }
            return {}  # the check of the card's metadata

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    yield got
    server.shutdown()
    server.server_close()


def test_a_dry_run_lists_files_and_bytes_and_sends_nothing(run, hub, capsys):
    assert main(["push", str(run), "--to", "me/tiny", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for path in (run / "student").iterdir():
        assert f"{path.stat().st_size:>15,}  {path.name}" in said
    assert "README.md" in said and "nothing was sent" in said
    assert hub["made"] is None and not hub["tokens"]


def test_an_upload_is_the_folder_with_its_card(run, hub, capsys):
    assert main(["push", str(run), "--to", "me/tiny", "--private"]) == 0
    assert hub["made"]["name"] == "tiny" and hub["made"]["organization"] == "me"
    assert hub["made"].get("private") is True or hub["made"].get("visibility") == "private"
    assert hub["files"] == {path.name: path.read_bytes() for path in (run / "student").iterdir()}
    assert hub["tokens"] == {"Bearer hf_of_this_test"}
    assert "/me/tiny" in capsys.readouterr().out


def test_a_run_without_a_student_is_refused_with_the_command_to_run(run, hub, capsys):
    (run / "reinforce" / "done.json").unlink()
    assert main(["push", str(run), "--to", "me/tiny", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "stage 2 is not complete" in said and "launch/train.py --stage" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("refused", "the token may not write there"),
        ("offline", "HF_HUB_OFFLINE is set"),
        ("nobody", "the hub cannot be reached for me/tiny"),
    ],
)
def test_what_the_network_answers_becomes_an_error_that_says_what_to_do(run, hub, monkeypatch, capsys, change, said):
    if change == "refused":
        hub["refuse"] = True
    elif change == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(run), "--to", "me/tiny"]) == 2
    error = capsys.readouterr().err
    assert said in error and "run the same command again" in error


def test_a_name_that_is_none_is_refused(run, capsys):
    assert main(["push", str(run), "--to", "a b/c"]) == 2
    assert "expected a name such as OWNER/MODEL" in capsys.readouterr().err
