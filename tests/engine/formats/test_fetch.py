"""Weights by name and by address, from a server on this machine that does what servers do."""

import hashlib
import http.server
import json
import logging
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from finetune_runs import make_sounds, pretrained_file
from paths import ROOT

from ssast.engine.cli.main import main
from ssast.engine.config import from_plain
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.formats import fetch
from ssast.engine.formats.fetch import local_path
from ssast.engine.formats.known_weights import PUBLISHED, ours
from ssast.engine.formats.open import open_encoder, open_model
from ssast.engine.formats.published import save_published
from ssast.engine.model.objective import MSPM
from ssast.pipelines.files import CACHE

NAME = "SSAST-Tiny-Patch-400"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the bytes of ``server.files``, as ``server.behave`` says."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        server.asked.append((self.command, path, self.headers.get("Range")))
        status = server.statuses.pop(0) if server.statuses else 200
        content = server.files.get(path)
        if content is None or status != 200:
            self.reply(404 if content is None else status, b"")
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if start >= len(content):
            self.reply(416, b"")
            return
        body, claimed = content[start:], len(content) - start + server.lie
        if server.stop_at:  # breaks off, once
            body, server.stop_at = content[start : server.stop_at], 0
        self.reply(206 if start else 200, body, claimed)

    def reply(self, status, body, claimed=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if claimed is None else claimed))
        self.send_header("ETag", f'"{hashlib.md5(self.path.encode()).hexdigest()}"')
        for key, value in self.server.headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        if claimed not in (None, len(body)):
            self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.files, server.statuses, server.asked, server.headers = {}, [], [], {}
        server.lie = server.stop_at = 0
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
        monkeypatch.setenv(fetch.MIRROR, server.address)
        monkeypatch.setattr(fetch, "WAIT_S", 0.001)
        for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(key, raising=False)
        yield server
        server.shutdown()


@pytest.fixture
def weights(server, tmp_path):
    content = pretrained_file(tmp_path).read_bytes()
    server.files[f"/{NAME}.pth"] = content
    return content


def gets(server):
    return [asked for asked in server.asked if asked[0] == "GET"]


def resumed_at(server):
    """The first byte that was asked for last."""
    return int(gets(server)[-1][2].removeprefix("bytes=").removesuffix("-"))


def test_weights_are_fetched_once_by_name(server, weights, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    loaded = open_encoder(NAME)
    assert loaded.path == tmp_path / "cache" / "weights" / f"{NAME}.pth"
    assert loaded.path.read_bytes() == weights
    digest = hashlib.sha256(weights).hexdigest()
    assert f"SHA-256 {digest} is recorded" in caplog.text
    again = open_encoder(NAME)
    assert len(gets(server)) == 1
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    assert sorted(path.name for path in loaded.path.parent.iterdir() if path.name[0] != ".") == [
        f"{NAME}.pth",
        f"{NAME}.pth.sha256",
    ]


def test_the_four_lines_of_the_readme(server, tmp_path, monkeypatch, capsys):
    """Its commands, word for word, with a small model under the published name."""
    readme = (ROOT / "README.md").read_text()
    text = readme.partition("## A classifier in four lines\n")[2].partition("\n## ")[0]
    shown = re.findall(r"^    (.*)$", text, re.M)
    rows, commands = shown[:3], [line for line in shown if line.startswith("ssast ")]
    assert [line.partition(" ")[0] for line in shown[3:]] == ["ssast"] * len(commands)
    monkeypatch.chdir(tmp_path)
    small = {"model": {"size": "tiny", "depth": 1}, "audio": {"num_frames": 128}}
    model = MSPM(from_plain(small | {"objective": {"num_masked": 2}}))
    published = "SSAST-Base-Patch-400.pth"
    save_published(model, tmp_path / published)
    server.files[f"/{published}"] = (tmp_path / published).read_bytes()
    sounds = make_sounds(tmp_path / "clips", 2, 4)
    for name, path in zip((row.split(",")[0] for row in rows[1:]), sounds[::4], strict=True):
        path.rename(tmp_path / name)
    more = [f"clips/{path.name},{['dog', 'cat'][int(path.name[0])]}" for path in sounds]
    there = [row for row in more if (tmp_path / row.split(",")[0]).exists()]
    (tmp_path / "train.csv").write_text("\n".join([*rows, *there]) + "\n")
    shutil.copy(sounds[1], tmp_path / "dog.wav")
    for command in commands:
        assert main(shlex.split(command, comments=True)[1:]) == 0, command
    assert re.search(
        r"^dog\.wav  (dog|cat) [\d.]+%  (dog|cat) [\d.]+%$", capsys.readouterr().out, re.M
    )
    assert len(gets(server)) == 1


def test_a_cache_for_reading_alone(server, weights, monkeypatch):
    """What is there needs no lock, which cannot be made there."""
    path = local_path(NAME)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fetch, "in_turn", refused)
    assert local_path(NAME) == path


def test_a_download_that_breaks_off_is_resumed(server, weights):
    server.stop_at = end = len(weights) // 3
    path = local_path(NAME)
    assert path.read_bytes() == weights
    assert len(gets(server)) == 2 and 0 < resumed_at(server) <= end


def test_what_an_earlier_process_fetched_is_kept(server, weights):
    end = len(weights) // 2
    server.stop_at, server.statuses = end, [200, 500, 500, 500, 500]
    with pytest.raises(CheckpointError, match=r"cannot be fetched, 5 times: .*answers 500"):
        local_path(NAME)
    assert local_path(NAME).read_bytes() == weights
    assert 0 < resumed_at(server) <= end


def test_a_part_that_is_longer_than_the_file_is_fetched_anew(server, weights, tmp_path):
    part = tmp_path / "cache" / "weights" / f"{NAME}.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(len(weights) + 1))
    assert local_path(NAME).read_bytes() == weights


def test_a_server_that_lies_about_the_length_is_not_believed(server, weights, tmp_path):
    server.lie = 10
    with pytest.raises(CheckpointError, match="cannot be fetched, 5 times"):
        local_path(NAME)
    assert not (tmp_path / "cache" / "weights" / f"{NAME}.pth").exists()


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_not_repeated_and_says_where_a_file_may_be_put(
    server, weights, status, tmp_path, capsys
):
    server.statuses = [status]
    assert main(["embed", NAME, str(tmp_path), "--out", str(tmp_path / "x.npy")]) == 2
    shown = capsys.readouterr().err
    assert f"{server.address}/{NAME}.pth: the server answers {status}; or put the file" in shown
    assert str(tmp_path / "cache" / "weights" / f"{NAME}.pth") in shown and shown.count("\n") == 1
    assert len(gets(server)) == 1


def test_a_passing_error_is_tried_again(server, weights):
    server.statuses = [503, 429, 500]
    assert local_path(NAME).read_bytes() == weights


def test_offline_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(fetch.MIRROR, "http://127.0.0.1:1")
    monkeypatch.setattr(fetch, "WAIT_S", 0.001)
    assert main(["weights", NAME]) == 2
    shown = capsys.readouterr().err
    assert f"http://127.0.0.1:1/{NAME}.pth: cannot be fetched" in shown
    assert f"put the file by hand where it is looked for: {tmp_path}" in shown
    assert shown.count("\n") == 1
    put = tmp_path / "cache" / "weights" / f"{NAME}.pth"
    put.write_bytes(pretrained_file(tmp_path).read_bytes())
    assert open_encoder(NAME).path == put  # no checksum is known of it


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/ssast-was-here",)


def test_code_in_a_fetched_file_is_not_run(server, tmp_path):
    server.files[f"/{NAME}.pth"] = pickle.dumps(Evil())
    with pytest.raises(CheckpointError, match=NAME):
        open_model(NAME)
    assert not os.path.exists("/tmp/ssast-was-here")


def test_an_address_with_a_checksum(server, weights, tmp_path):
    digest = hashlib.sha256(weights).hexdigest()
    url = f"{server.address}/{NAME}.pth"
    assert local_path(f"{url}#sha256={digest}").read_bytes() == weights
    server.files["/other/model.pth"] = weights
    wrong = f"{server.address}/other/model.pth#sha256={'0' * 64}"
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        local_path(wrong)
    assert not list((tmp_path / "cache").rglob("model.pth"))
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        local_path(f"{url}#sha256=12")


def test_a_cached_file_that_changed_is_refused(server, weights):
    path = local_path(NAME)
    path.write_bytes(weights[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"has SHA-256 .*remove it, to fetch it again"):
        local_path(NAME)


def test_paths_come_first_and_ours_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert local_path(NAME) == tmp_path / NAME or str(local_path(NAME)) == NAME
    assert open_model("tiny_patch").path == ours()["tiny_patch"]
    with pytest.raises(CheckpointError, match="ssast weights lists what has a name"):
        open_model("tiny_pach")


def test_the_list_names_everything(server, weights, capsys):
    assert main(["weights"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*PUBLISHED, *ours()))
    assert all(known.url in shown for known in PUBLISHED.values())
    assert main(["weights", NAME, "--mirror", f"{server.address}/"]) == 0
    path = capsys.readouterr().out.strip()
    assert main(["weights"]) == 0 and path in capsys.readouterr().out
    assert main(["weights", "SSAST"]) == 2


def test_models_of_the_hub(server, tmp_path):
    """With the hub's own client, in a process of its own: it reads HF_ENDPOINT when imported."""
    folder = tmp_path / "exported"
    assert main(["export", "tiny_patch", "--to", "hf", str(folder)]) == 0
    names, commit = [path.name for path in folder.iterdir()], "0" * 40
    described = {"id": "me/mine", "sha": commit, "siblings": [{"rfilename": n} for n in names]}
    server.files["/api/models/me/mine/revision/main"] = json.dumps(described).encode()
    tree = [
        {"type": "file", "path": n, "oid": n, "size": (folder / n).stat().st_size} for n in names
    ]
    server.files[f"/api/models/me/mine/tree/{commit}"] = json.dumps(tree).encode()
    for name in names:
        server.files[f"/me/mine/resolve/{commit}/{name}"] = (folder / name).read_bytes()
    server.headers = {"X-Repo-Commit": commit}
    code = "from ssast.engine.api import open_model; print(open_model('hf:me/mine').path)"
    environment = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment | {"HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(tmp_path / "hub") in done.stdout
    assert not any(path.endswith(".py") for _, path, _ in server.asked)  # no code is fetched


@pytest.mark.parametrize("name", ["hf:mine", "hf:a/b/c", "hf:a/b@"])
def test_malformed_names_of_the_hub(name):
    with pytest.raises(ConfigError, match="expected hf:owner/name"):
        local_path(name)


def test_an_export_is_pushed_with_a_card(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options))

        def upload_folder(self, *, repo_id, folder_path, delete_patterns):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            assert delete_patterns == ["model.non_ema.safetensors", "modeling_ssast.py"]

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    arguments = ["export", "tiny_patch", "--to", "hf", str(tmp_path / "out")]
    assert main([*arguments, "--push", "me/mine"]) == 0
    assert "hf:me/mine" in capsys.readouterr().out
    assert calls[0] == ("me/mine", {"exist_ok": True})
    assert "README.md" in calls[1][1] and "model.safetensors" in calls[1][1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1.28 s at 16000 Hz" in card and "hf:me/mine" in card
    assert main(["export", "tiny_patch", "--to", "onnx", str(tmp_path / "x"), "--push", "a/b"]) == 2
    assert main([*arguments[:-1], str(tmp_path / "two"), "--push", "mine"]) == 2
