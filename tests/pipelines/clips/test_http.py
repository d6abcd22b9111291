"""Data behind a web server: listed without sizes, refused, and out of order for a while."""

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prepared import rejected
from sounds import tone, write

from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips import remote
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.errors import DataError, StorageError
from ssast.pipelines.prepare.pack import Packing, prepare_shards


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files and lists of them, or refuses paths that hold a word."""

    refused = ("", 200, 0)  # the word, the status, and how often

    def send_head(self) -> Any:
        word, status, times = Handler.refused
        if times and word in self.path:
            Handler.refused = (word, status, times - 1)
            return self.send_error(status)
        return super().send_head()

    def log_message(self, *given: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of two recordings and of what was prepared of them."""
    (tmp_path / "in/sub").mkdir(parents=True)
    for name in ("a.wav", "sub/b.wav"):
        write(tmp_path / "in" / name, tone(16000), subtype="PCM_16")
    (tmp_path / "labels.csv").write_text("wav,labels\nin/a.wav,x\nin/sub/b.wav,y\n")
    prepared(tmp_path / "labels.csv", tmp_path / "out")
    handler = partial(Handler, directory=str(tmp_path))
    monkeypatch.setattr(remote, "RETRY_S", 0.3)
    monkeypatch.setattr(Handler, "refused", ("", 200, 0))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def prepared(source: str | Path, out: str | Path) -> dict[str, Any]:
    packing = Packing(Recipe(clip_s=0.5, min_s=0.1))
    return prepare_shards(source, out, packing, progress=False, log=lambda line: None)


def opened(place: str) -> tuple[list[int], Any]:
    manifest = read_manifest(place)
    return manifest.paths.recordings().tolist(), manifest.labels  # type: ignore[union-attr]


def assert_refused(place: str, read: Any) -> None:
    """One line with the URL; what may pass by itself keeps its own status."""
    for status, kind in ((403, DataError), (503, StorageError)):
        Handler.refused = (place.rpartition("/")[2], status, 10**6)
        with pytest.raises(DataError, match=rf"^{place}/?: [^\n]* {status}, [^\n]*$") as caught:
            read()
        assert type(caught.value) is kind


def test_a_server_that_refuses_is_one_line(server: str) -> None:
    assert_refused(f"{server}/out", lambda: opened(f"{server}/out"))


@pytest.mark.parametrize("name", ["shards", "recordings.npy"])
def test_a_server_that_refuses_once_is_asked_again(server: str, name: str) -> None:
    expected = [0, 0, 1, 1], (("x",), ("x",), ("y",), ("y",))
    Handler.refused = (name, 503, 1)
    assert opened(f"{server}/out") == expected
    assert Handler.refused[2] == 0


def test_recordings_in_a_list_without_sizes(server: str, tmp_path: Path) -> None:
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "new/shards").iterdir()}

    report = prepared(f"{server}/in/", tmp_path / "new")
    assert report["clips"] == 4 and not report["num_rejected"]
    done = times()
    prepared(f"{server}/in/", tmp_path / "new")
    assert times() == done
    write(tmp_path / "in/a.wav", tone(8000), subtype="PCM_16")  # another one of that name
    assert prepared(f"{server}/in/", tmp_path / "new")["clips"] == 3
    Handler.refused = ("b.wav", 403, 10**6)
    prepared(f"{server}/in/", tmp_path / "other")
    assert "cannot be fetched: " in rejected(tmp_path / "other")["sub/b.wav"]
    assert_refused(f"{server}/in", lambda: prepared(f"{server}/in/", tmp_path / "more"))


def test_a_server_cannot_be_written_to(server: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=f"^{server}/new: a URL that cannot be written to: expected"
    ):
        prepared(tmp_path / "in", f"{server}/new")
