"""Fetches a benchmark's files from the Hub into a folder, after saying how much that is, and unpacks its archives."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from .catalog import BENCHMARKS
from .files import VIDEO_SUFFIXES
from .spec import BenchmarkError, BenchmarkSpec, Download, size_text

_BLOCK = 1 << 20
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_PART = re.compile(r"(.+\.tar)\.part-?\d+")


def download(
    name: str,
    data_dir: str | os.PathLike[str],
    *,
    videos: bool = True,
    tell: Callable[[str], None] = print,
) -> Path:
    """Fetch a benchmark into `data_dir` with `huggingface_hub`, and unpack the videos in its archives.

    First the repositories are asked for their files, and `tell` is given how big they are and what else has to be
    fetched by hand. Called again it goes on: files that are there are not fetched or unpacked again. The archives are
    kept; the videos in them go below `data_dir/videos`.

    Args:
        name: of `BENCHMARKS`.
        videos: also the videos, not only the annotations.
        tell: takes a line for the user.

    Raises:
        BenchmarkError: there is no such benchmark, a repository cannot be had (gated, offline, gone), it has none of
            the files expected, or the disk has no room for them.
    """
    if name not in BENCHMARKS:
        raise BenchmarkError(f"there is no benchmark {name!r}; there are {', '.join(sorted(BENCHMARKS))}.")
    spec, folder = BENCHMARKS[name], Path(data_dir)
    wanted = [one for one in spec.downloads if one.repo and (videos or one.name != "videos")]
    by_hand = [one for one in spec.downloads if not one.repo and (videos or one.name != "videos")]
    listed = [(one, *_list_files(spec, one)) for one in wanted]
    total = 0
    for one, _, files in listed:
        size = sum(files.values())
        total += sum(size for path, size in files.items() if not _is_there(folder / path, size))
        tell(f"{spec.title}, {one.name}: {len(files)} files of {one.repo}, {size_text(size)}.")
    for one in by_hand:
        tell(f"{spec.title}, {one.name}: to be fetched by hand from {one.url}: {one.note}.")
    tell(f"Licence: {spec.license or 'not stated'}. Access: {spec.access or 'open'}.")
    folder.mkdir(parents=True, exist_ok=True)
    _check_room(spec, folder, total, any(_is_archive(path) for _, _, files in listed for path in files))
    for one, revision, files in listed:
        _fetch(spec, one, revision, list(files), folder)
    if videos:
        unpack(folder, tell=tell)
    return folder


def unpack(data_dir: str | os.PathLike[str], *, tell: Callable[[str], None] = print) -> int:
    """Unpack the videos of all zip and tar archives directly in a folder (also of a tar in parts) into `videos/`.

    Files that are there with their full size are left; each appears under its name only when it is whole. Members that
    are no videos, or that would lie outside the folder, are left out.

    Returns:
        How many files were written.

    Raises:
        BenchmarkError: an archive is broken, or a part of it is missing.
    """
    folder = Path(data_dir)
    written = 0
    for name, paths in _archives(folder).items():
        count = 0
        try:
            for member, size, open_member in _members(paths):
                target = folder / "videos" / member
                if _is_there(target, size):
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f".{target.name}.{os.getpid()}.part")
                try:
                    with open_member() as source, part.open("wb") as file:
                        shutil.copyfileobj(source, file, _BLOCK)
                    os.replace(part, target)
                finally:
                    part.unlink(missing_ok=True)
                count += 1
        except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise BenchmarkError(
                f"{name}: the archive is broken or a part is missing ({error}). Download it again."
            ) from error
        tell(f"{name}: {count} videos unpacked.")
        written += count
    return written


def _list_files(spec: BenchmarkSpec, one: Download) -> tuple[str, dict[str, int]]:
    """The commit of a repository, and its files that are wanted with their sizes."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    assert one.repo is not None
    api = HfApi()
    with _HubErrors(spec, one):
        revision = api.dataset_info(one.repo, revision=one.revision).sha or one.revision
        tree = api.list_repo_tree(one.repo, repo_type="dataset", revision=revision, recursive=True)
        entries = [entry for entry in tree if isinstance(entry, RepoFile)]
    files = {e.path: e.size for e in entries if any(fnmatch(e.path, pattern) for pattern in one.files)}
    if not files:
        raise BenchmarkError(
            f"{spec.title}: {one.repo} has none of the files expected ({', '.join(one.files)}); it has "
            f"{sorted(entry.path for entry in entries)[:10]}. The repository may have changed: fetch its files "
            "yourself and give their folder as data_dir."
        )
    return revision, files


def _fetch(spec: BenchmarkSpec, one: Download, revision: str, files: Sequence[str], folder: Path) -> None:
    from huggingface_hub import snapshot_download

    assert one.repo is not None
    with _HubErrors(spec, one):
        snapshot_download(
            one.repo, repo_type="dataset", revision=revision, allow_patterns=list(one.files), local_dir=folder
        )
    if left := [path for path in files if not (folder / path).is_file()]:
        raise BenchmarkError(
            f"{spec.title}: {len(left)} files of {one.repo} did not arrive, such as {left[0]}; again."
        )


class _HubErrors:
    """Makes the Hub client's errors say which benchmark it is about, and what to do."""

    def __init__(self, spec: BenchmarkSpec, one: Download):
        self.spec, self.one = spec, one

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
        )

        if error is None or not isinstance(error, (HfHubHTTPError, OSError)):
            return
        repo, title = self.one.repo, self.spec.title
        page = f"https://huggingface.co/datasets/{repo}"
        if isinstance(error, GatedRepoError):
            advice = f"accept its terms at {page} and log in with `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            advice = f"look whether {page} still exists, and log in if it is private"
        elif isinstance(error, OfflineModeIsEnabled):
            advice = "unset HF_HUB_OFFLINE, or fetch the files on another machine and give their folder as data_dir"
        else:
            advice = "check the network and call again: it goes on where it stopped"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BenchmarkError(f"{title}: {repo} cannot be had ({reason}); {advice}.") from error


def _check_room(spec: BenchmarkSpec, folder: Path, size: int, archives: bool) -> None:
    needed = 2 * size if archives else size  # the archives and what is in them
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BenchmarkError(
            f"{spec.title}: {size_text(needed)} are needed{' (archives and their videos)' if archives else ''}, but "
            f"{folder} has {size_text(free)} free. Choose another folder."
        )


def _archives(folder: Path) -> dict[str, list[Path]]:
    """Archives by name, each with its file or its parts in order."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or not path.is_file():
            continue
        if match := _PART.fullmatch(path.name):
            found.setdefault(match[1], []).append(path)
        elif _is_archive(path.name):
            found[path.name] = [path]
    return found


def _members(paths: Sequence[Path]) -> Iterator[tuple[PurePosixPath, int, Callable[[], IO[bytes]]]]:
    """The videos in an archive: path inside, size, and what opens it."""
    if paths[0].suffix == ".zip":
        with zipfile.ZipFile(paths[0]) as archive:
            for info in archive.infolist():
                if (member := _safe(info.filename)) is not None and not info.is_dir():
                    yield member, info.file_size, lambda info=info: archive.open(info)  # type: ignore[misc]
        return
    with _Parts(paths) as joined, tarfile.open(fileobj=cast(Any, joined), mode="r|*", bufsize=_BLOCK) as tar:
        for one in tar:
            if one.isfile() and (member := _safe(one.name)) is not None:
                yield member, one.size, lambda one=one: cast(IO[bytes], tar.extractfile(one))  # type: ignore[misc]


class _Parts(io.RawIOBase):
    """Several files read as one, from start to end."""

    def __init__(self, paths: Sequence[Path]):
        self._left = list(paths)
        self._file: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = b""
        while size < 0 or len(data) < size:
            if self._file is None:
                if not self._left:
                    break
                self._file = self._left.pop(0).open("rb")
            block = self._file.read(size - len(data) if size >= 0 else -1)
            data += block
            if not block:
                self._file.close()
                self._file = None
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def _safe(name: str) -> PurePosixPath | None:
    """The path of a video inside an archive, or None for what is no video or lies outside."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or path.suffix.lower() not in VIDEO_SUFFIXES:
        return None
    return None if any(part.startswith(("._", "__MACOSX")) for part in path.parts) else path


def _is_archive(path: str) -> bool:
    return path.endswith(_ARCHIVES) or _PART.fullmatch(PurePosixPath(path).name) is not None


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
