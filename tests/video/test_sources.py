"""Whatever a video comes as, it is the same video."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.video.clips import numbers_in, write_clip

from video2lora.video import UnreadableVideoError, VideoError, VideoReader, VideoSpanError, load_video


@pytest.fixture(scope="module")
def server(cfr: Path) -> Iterator[str]:
    """A server on this machine: /clip.mp4 is whole, /cut.mp4 breaks off, all else is missing."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path not in ("/clip.mp4", "/cut.mp4"):
                self.send_error(404)
                return
            data = cfr.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if path == "/clip.mp4" else data[:1000])

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


class Pipe(io.RawIOBase):
    """A stream that cannot seek."""

    def __init__(self, data: bytes):
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self._data.readinto(buffer)


def data_url(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


FORMS = {
    "path": (lambda p: p, "cfr.mp4"),
    "str": (str, "cfr.mp4"),
    "os.PathLike": (lambda p: SimpleNamespacePath(p), "cfr.mp4"),
    "file-url": (lambda p: p.as_uri(), "cfr.mp4"),
    "data-url": (data_url, "<bytes>"),
    "bytes": (lambda p: p.read_bytes(), "<bytes>"),
    "bytearray": (lambda p: bytearray(p.read_bytes()), "<bytes>"),
    "memoryview": (lambda p: memoryview(p.read_bytes()), "<bytes>"),
    "bytesio": (lambda p: io.BytesIO(p.read_bytes()), "<file>"),
    "pipe": (lambda p: Pipe(p.read_bytes()), "<file>"),
    "dict-path": (lambda p: {"path": str(p), "bytes": None}, "cfr.mp4"),
    "dict-bytes": (lambda p: {"path": None, "bytes": p.read_bytes()}, "<bytes>"),
    "dict-both": (lambda p: {"path": "train/0001.mp4", "bytes": p.read_bytes()}, "0001.mp4"),
    "decoder-of-datasets": (lambda p: SimpleNamespace(_hf_encoded={"path": str(p), "bytes": None}), "cfr.mp4"),
}


class SimpleNamespacePath(os.PathLike):
    def __init__(self, path: Path):
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_video(cfr: Path, form: str):
    make, name = FORMS[form]
    expected, got = load_video(cfr, num_frames=7), load_video(make(cfr), num_frames=7)
    assert np.array_equal(got.frames, expected.frames) and got.timestamps == expected.timestamps
    assert got.source == name
    assert got.sha256 == hashlib.sha256(cfr.read_bytes()).hexdigest()


def test_a_file_object_stays_open_and_where_it_was(cfr: Path):
    with open(cfr, "rb") as file:
        file.seek(123)
        got = load_video(file, num_frames=3)
        assert not file.closed and file.tell() == 123
    assert got.source == "cfr.mp4" and numbers_in(got.frames) == [0, 24, 49]


def test_hashing_between_samples_disturbs_nothing(cfr: Path):
    with VideoReader(cfr.read_bytes()) as reader:
        first = reader.sample(end=0.5)
        assert reader.sha256 == first.sha256
        again = reader.sample(start=0.52)
    assert numbers_in(first.frames) + numbers_in(again.frames) == list(range(50))


def test_a_name_full_of_signs_is_just_a_name(cfr: Path, tmp_path: Path):
    path = tmp_path / "http:a%03d b|c?.mp4"
    path.write_bytes(cfr.read_bytes())
    assert load_video(path, num_frames=2).source == path.name
    relative = os.path.relpath(path)
    assert load_video(relative, num_frames=2).source == path.name


def test_url(server: str, cfr: Path):
    got = load_video(f"{server}/clip.mp4?token=secret#t", num_frames=4)
    assert numbers_in(got.frames) == [0, 16, 32, 49]
    assert got.source == f"{server}/clip.mp4"
    assert got.sha256 == hashlib.sha256(cfr.read_bytes()).hexdigest()


def test_urls_that_fail_give_one_clear_error_without_secrets(server: str):
    with pytest.raises(UnreadableVideoError, match="404"):
        load_video(f"{server}/other.mp4")
    with pytest.raises(UnreadableVideoError, match=r"broke off after 1000 of \d+ bytes"):
        load_video(f"{server}/cut.mp4")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        dead = f"http://user:secret@127.0.0.1:{unused.getsockname()[1]}/clip.mp4?key=secret"
        with pytest.raises(UnreadableVideoError, match="cannot be downloaded") as caught:
            load_video(dead)
    assert "secret" not in str(caught.value)
    with pytest.raises(UnreadableVideoError, match="cannot be fetched"):
        load_video("nosuchscheme://a/b.mp4")
    with pytest.raises(VideoSpanError, match="other.mp4: num_frames=0"):  # before anything is downloaded
        load_video(f"{server}/other.mp4", num_frames=0)


def test_fsspec_urls(cfr: Path):
    import fsspec

    with fsspec.open("memory://clips/cfr.mp4", "wb") as file:
        file.write(cfr.read_bytes())
    got = load_video("memory://clips/cfr.mp4", num_frames=2)
    assert numbers_in(got.frames) == [0, 49] and got.source == "memory://clips/cfr.mp4"


def test_file_objects_that_cannot_be_read(cfr: Path, tmp_path: Path):
    text = tmp_path / "a.txt"
    text.write_text("hello")
    with open(text) as file, pytest.raises(VideoError, match="mode 'rb'"):
        load_video(file)
    with open(cfr, "rb") as file:
        pass
    with pytest.raises(VideoError, match="cfr.mp4: the file object cannot be read"):
        load_video(file)


def test_a_broken_data_url_is_not_recited():
    for url in ("data:video/mp4;base64,AAAA" + "x" * 10001, "data:" + "A" * 10000):
        with pytest.raises(UnreadableVideoError, match="^<bytes>: a data URL that cannot be decoded") as caught:
            load_video(url)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "playlist"),
    [
        ("clip.ffconcat", "ffconcat version 1.0\nfile clip.ts\n"),
        ("innocent.mp4", "ffconcat version 1.0\nfile clip.ts\n"),
        ("clip.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:0.8,\nclip.ts\n#EXT-X-ENDLIST\n"),
    ],
)
def test_playlists_lead_to_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, playlist: str):
    """Whoever hands over a video must not get to read another file of this machine by it."""
    write_clip(tmp_path / "clip.ts", 20)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(playlist)
    with pytest.raises(UnreadableVideoError, match=f"^{name}: a playlist of other files"):
        load_video(name)
    with pytest.raises(UnreadableVideoError, match="^<bytes>: "):
        load_video(playlist.encode())


def test_a_closed_reader_says_so(cfr: Path):
    for video in (cfr, np.zeros((2, 4, 4, 3), np.uint8)):
        with VideoReader(video) as reader:
            reader.sample(num_frames=1)
        with pytest.raises(VideoError, match="this reader is closed"):
            reader.sample(num_frames=1)
        with pytest.raises(VideoError, match="this reader is closed"):
            reader.info  # noqa: B018
        reader.close()


def test_timestamps_belong_to_frames_in_memory(cfr: Path):
    with pytest.raises(VideoError, match="cfr.mp4: a video file has its own timestamps"):
        load_video(cfr, timestamps=[0.0])


@pytest.mark.parametrize("longest_edge", [0, -5, 33.3, "64"])
def test_longest_edge_of_nothing(cfr: Path, longest_edge: int):
    with pytest.raises(VideoError, match="longest_edge"):
        load_video(cfr, longest_edge=longest_edge)


def test_importing_the_room_loads_nothing_heavy():
    """Beside what the package itself loads; here the package is an empty one with the same folder."""
    import video2lora

    code = f"""if True:
        import sys, types
        package = types.ModuleType("video2lora")
        package.__path__ = {list(video2lora.__path__)!r}
        sys.modules["video2lora"] = package
        import video2lora.video
        print(sorted({{"torch", "transformers", "datasets", "evaluate", "fsspec", "PIL"}} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
