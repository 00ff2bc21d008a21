"""Opens anything a video can come as: a path, a URL, bytes, a file object or a row of a dataset."""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import av
from av.container import InputContainer

from .errors import UnreadableVideoError, VideoError

_BLOCK = 1 << 20
_TIMEOUT_S = 30
# FFmpeg shows any .txt file as a film of a terminal; nobody means that.
_TEXT_ART = {"ansi", "bintext", "xbin", "idf"}
# They lead to other files, which nobody handed over and the hash would not cover.
_PLAYLISTS = {"concat", "dash", "hls", "imf"}
ACCEPTED = (
    "a path, a URL, bytes, a binary file object, a dict with 'path' or 'bytes', "
    "or frames in memory (a list of images, or an array or tensor [T, H, W, 3])"
)


class VideoSource:
    """A video file that can be opened again and again, whatever it came as.

    A URL is downloaded once to a temporary file (all of it is needed: packets are indexed and bytes hashed); an object
    that cannot seek is copied to one. `http`, `https`, `file`, `data` and what fsspec knows (`hf`, `s3`, ...) will do.
    Closing removes the copies and puts a caller's file object back where it was.

    Raises:
        UnreadableVideoError: there is no such file, it is empty, or it cannot be fetched.
        VideoError: the value is nothing a video comes as.
    """

    def __init__(self, video: Any):
        self.name = source_name(video)
        self._path: str | None = None
        self._file: BinaryIO | None = None
        self._sha256: str | None = None
        self._stack = ExitStack()
        try:
            self._take(video)
            self._check_size()
        except BaseException:
            self.close()
            raise

    def open(self, options: dict[str, str] | None = None) -> InputContainer:
        """A fresh PyAV container at the start of the file, with `options` for FFmpeg's demuxer.

        Raises:
            UnreadableVideoError: FFmpeg cannot read it, or it is a playlist of other files.
        """
        try:
            if self._path is not None:
                # With the protocol named, a colon or a percent sign in a file name means nothing to FFmpeg.
                container = av.open("file:" + self._path, mode="r", options=options, metadata_errors="replace")
            else:
                assert self._file is not None
                self._file.seek(0)
                container = av.open(self._file, mode="r", options=options, metadata_errors="replace")
        except av.FFmpegError as error:
            raise UnreadableVideoError(
                f"{self.name}: FFmpeg cannot read it as a video ({error.strerror}). Expected a complete file such as "
                "MP4, MOV, WebM, MKV, AVI or GIF; check that it plays and was copied or downloaded to the end."
            ) from error
        if is_playlist(container):
            container.close()
            raise UnreadableVideoError(
                f"{self.name}: a playlist of other files, not a video. Give one file, for example from "
                "`ffmpeg -i playlist -c copy out.mp4`."
            )
        return container

    def sha256(self) -> str:
        """SHA-256 of the file's bytes, in hexadecimal."""
        if self._sha256 is None:
            digest = hashlib.sha256()
            if self._path is not None:
                with open(self._path, "rb") as file:
                    _update(digest, file)
            else:
                assert self._file is not None
                with self.undisturbed():
                    self._file.seek(0)
                    _update(digest, self._file)
            self._sha256 = digest.hexdigest()
        return self._sha256

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Put a file object back where it is now: an open container reads on from there."""
        position = None if self._file is None else self._file.tell()
        try:
            yield
        finally:
            if self._file is not None and position is not None:
                self._file.seek(position)

    def close(self) -> None:
        """Remove temporary files and put a caller's file object back where it was."""
        self._stack.close()

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, video: Any) -> None:
        video = getattr(video, "_hf_encoded", video)  # what `datasets` leaves on the torchcodec decoders it hands out
        if isinstance(video, Mapping):
            path, data = video.get("path"), video.get("bytes")
            if path is None and data is None:
                raise VideoError(f"a dict with neither 'path' nor 'bytes' (keys: {sorted(video)}); give one of them.")
            video = data if data is not None else path
        if isinstance(video, (bytes, bytearray, memoryview)):
            self._file = io.BytesIO(video)
        elif isinstance(video, str) and video.startswith("data:"):
            self._file = io.BytesIO(_decode_data_url(video))
        elif isinstance(video, (str, os.PathLike)):
            self._take_location(os.fsdecode(video))
        elif hasattr(video, "read"):
            self._take_file(video)
        else:
            raise VideoError(f"cannot read a video from {type(video).__name__}; expected {ACCEPTED}.")

    def _take_location(self, location: str) -> None:
        scheme = re.match(r"([a-z][a-z0-9+.-]+)://", location, re.IGNORECASE)
        if scheme is None or scheme[1].lower() == "file":
            if scheme is not None:
                location = urllib.request.url2pathname(urllib.parse.urlsplit(location).path)
            self._path = location
            if not os.path.exists(location):
                raise UnreadableVideoError(f"{self.name}: no such file: {location or repr('')}. Check the path.")
            if os.path.isdir(location):
                raise UnreadableVideoError(f"{self.name}: {location} is a directory; give one video file.")
            return
        self._file = cast(BinaryIO, self._stack.enter_context(tempfile.TemporaryFile()))
        if scheme[1].lower() in ("http", "https"):
            _download(location, self._file, self.name)
        else:
            _fetch_with_fsspec(location, self._file, self.name)

    def _take_file(self, file: Any) -> None:
        if isinstance(file, io.TextIOBase):
            raise VideoError(f"{self.name}: the file is open as text; open it with mode 'rb'.")
        try:
            seekable = file.seekable() if hasattr(file, "seekable") else hasattr(file, "seek")
            if seekable:
                self._stack.callback(file.seek, file.tell())
                self._file = file
            else:
                self._file = cast(BinaryIO, self._stack.enter_context(tempfile.TemporaryFile()))
                shutil.copyfileobj(file, self._file, _BLOCK)
        except (OSError, ValueError) as error:
            raise UnreadableVideoError(f"{self.name}: the file object cannot be read ({error}).") from error

    def _check_size(self) -> None:
        if self._path is not None:
            empty = os.path.isfile(self._path) and os.path.getsize(self._path) == 0
        else:
            assert self._file is not None
            empty = self._file.seek(0, io.SEEK_END) == 0
        if empty:
            raise UnreadableVideoError(f"{self.name}: the file is empty (0 bytes). Expected a video; fetch it again.")


def is_playlist(container: InputContainer) -> bool:
    """Whether a file only lists others."""
    return bool(_PLAYLISTS & set(container.format.name.split(",")))


def source_name(video: Any) -> str:
    """A name for errors and provenance: file name, URL without credentials and query, "<bytes>", "<file>", "<frames>".

    Never a local directory.
    """
    video = getattr(video, "_hf_encoded", video)
    if isinstance(video, Mapping):
        video = video.get("bytes") if video.get("path") is None else video["path"]
    if isinstance(video, (bytes, bytearray, memoryview)) or (isinstance(video, str) and video.startswith("data:")):
        return "<bytes>"
    if hasattr(video, "read") and not isinstance(video, os.PathLike):
        video = getattr(video, "name", None)
        if not isinstance(video, str):
            return "<file>"
    if not isinstance(video, (str, os.PathLike)):
        return "<frames>"
    location = os.fsdecode(video)
    parts = urllib.parse.urlsplit(location) if "://" in location else None
    if parts is None or parts.scheme == "file":
        return Path(parts.path if parts else location).name or "<file>"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def best_video_stream(container: InputContainer, name: str) -> av.VideoStream:
    """The video stream to read: FFmpeg's best (marked default, then most frames and bit rate), never a cover picture.

    The rule is that of ffmpeg, ffplay and torchcodec (`av_find_best_stream`); `container.streams.video[0]` differs
    when a file holds several resolutions.

    Raises:
        UnreadableVideoError: there is none, or this FFmpeg has no decoder for it.
    """
    pictures = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
        found = f"only {' and '.join(kinds)}" if kinds else "only a picture" if len(container.streams) else "nothing"
        raise UnreadableVideoError(f"{name}: no video stream in it ({found}). Give a file with moving pictures.")
    best = container.streams.best("video")
    stream = next((stream for stream in streams if stream is best), streams[0])
    if stream.codec_context is None:
        raise UnreadableVideoError(
            f"{name}: this build of FFmpeg has no decoder for its video stream. Convert it to H.264, for example with "
            "`ffmpeg -i in -c:v libx264 out.mp4`."
        )
    if stream.codec_context.name in _TEXT_ART:
        raise UnreadableVideoError(f"{name}: a text file, not a video. Give a video file such as MP4, WebM or GIF.")
    return stream


def _decode_data_url(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url) as response:
            return response.read()
    except (OSError, ValueError) as error:
        raise UnreadableVideoError(
            f"<bytes>: a data URL that cannot be decoded ({error}); expected 'data:video/mp4;base64,...'."
        ) from error


def _update(digest: hashlib._Hash, file: BinaryIO) -> None:
    while block := file.read(_BLOCK):
        digest.update(block)


def _download(url: str, file: BinaryIO, name: str) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "video2lora"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            expected = response.headers.get("Content-Length")
            shutil.copyfileobj(response, file, _BLOCK)
    except urllib.error.HTTPError as error:
        answer = f"{error.code} {error.reason}"
        raise UnreadableVideoError(f"{name}: the server answered {answer}; check the URL.") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UnreadableVideoError(
            f"{name}: it cannot be downloaded ({reason}). Check the URL and the network, or download it yourself and "
            "give the file."
        ) from error
    if expected is not None and file.tell() < int(expected):
        raise UnreadableVideoError(
            f"{name}: the download broke off after {file.tell()} of {expected} bytes; try again."
        )


def _fetch_with_fsspec(url: str, file: BinaryIO, name: str) -> None:
    import fsspec  # type: ignore[import-untyped]  # comes with huggingface_hub; hf://, s3:// and the like

    try:
        with fsspec.open(url, "rb") as remote:
            shutil.copyfileobj(remote, file, _BLOCK)
    except Exception as error:  # each of its back ends raises errors of its own
        raise UnreadableVideoError(
            f"{name}: it cannot be fetched ({type(error).__name__}: {error}). Check the URL, the network and your "
            "access, or give a local file."
        ) from error
