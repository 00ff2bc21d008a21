"""Pipelines: which videos a bulk run is about, from a folder, JSONL rows, a dataset, or a list of these."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..data import DatasetError
from ..data.forms import parse_row
from ..data.sources import open_source

VIDEO_SUFFIXES = frozenset(
    ".3g2 .3gp .asf .avi .f4v .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm "
    ".wmv".split()
)
"""Ends of names that make a file in a folder a video. PyAV would also open pictures, sound, subtitles and text."""

_ROWS = (".jsonl", ".ndjson", ".json")
_DATA = (*_ROWS, ".parquet", ".arrow", ".csv", ".tar")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COLUMNS = ("id", "start", "end", "metadata")
# What is wrong with the questions of a training row is nothing to a run that asks none.
_OF_THE_VIDEO = re.compile(r"|video|video_path|start|end|metadata\..*")


@dataclass(frozen=True)
class BulkItem:
    """One video, or one span of it, to become one adapter.

    Attributes:
        video: absolute path, or URL; None where a row carries the bytes, or is no row at all.
        start, end: the row's span in seconds, as it was asked for.
        ids: of the rows that ask for it, where they have any.
        where: for a video without a location the row's place in its source, such as `user/name[12]`.
        place: where its bytes are: `(number of the source, row)`.
        error: why it cannot even be tried.
    """

    video: str | None
    start: float | None = None
    end: float | None = None
    ids: tuple[str, ...] = ()
    where: str | None = None
    place: tuple[int, int] | None = None
    error: str | None = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells it from the others of a run, and finds it again in the next."""
        return self.video, self.where, self.start, self.end

    @property
    def name(self) -> str:
        """For people."""
        span = "" if self.start is None and self.end is None else f" [{self.start or 0:g}..{self.end or ''} s]"
        return f"{self.video or self.where}{span}"


class BulkVideos:
    """The videos of a bulk run, listed without opening any of them.

    Args:
        sources: one of these, or a list of them: a folder, which is searched with all folders in it for files with
            `VIDEO_SUFFIXES` (hidden ones are left out); a JSONL file of rows (`load_rows` tells their forms; here they
            need no questions); a `datasets.Dataset`, a Hub id, or a folder without videos for `datasets.load_dataset`;
            a path or URL of a video, its bytes, or a row.
        split: of datasets and rows; folders and Hub ids are read as datasets if it is given.
    """

    def __init__(self, sources: Any, split: str | None = None) -> None:
        if isinstance(sources, BulkVideos):
            sources, split = sources._sources, split or sources._split
        self._sources: list[Any] = _as_list(sources)
        self._split = split
        self._datasets: dict[int, tuple[Any, str, str | None]] = {}

    def items(self) -> list[BulkItem]:
        """All of them, in order; rows about the same span of the same file are one.

        Raises:
            DatasetError: a source is not there, cannot be read, or holds no videos.
        """
        items: dict[tuple[Any, ...], BulkItem] = {}
        for number, source in enumerate(self._sources):
            for item in self._items_of(number, source):
                known = items.setdefault(item.identity, item)
                if known is not item:
                    ids = dict.fromkeys(known.ids + item.ids)
                    items[item.identity] = replace(known, ids=tuple(ids))
        return list(items.values())

    def fetch(self, item: BulkItem) -> Any:
        """What a `VideoReader` takes."""
        if item.place is None:
            return item.video
        number, row = item.place
        source = self._sources[number]
        if isinstance(source, (bytes, bytearray, memoryview)):
            return bytes(source)
        if isinstance(source, Mapping):
            return parse_row(source).video
        dataset, column, _ = self._dataset(number)
        return parse_row({"video": dataset[row][column]}).video

    def signature(self, item: BulkItem) -> Any:
        """What changes when the video does, without reading it: size and time of a file, a dataset's fingerprint.

        A URL is taken to hold what it held.

        Raises:
            OSError: the file is not there.
        """
        if item.place is None:
            if item.video is None or "://" in item.video:
                return None
            found = os.stat(item.video)
            return [found.st_size, found.st_mtime_ns]
        video = self.fetch(item) if isinstance(self._sources[item.place[0]], (bytes, bytearray, Mapping)) else None
        if isinstance(video, Mapping):
            video = video["bytes"]
        if video is not None:
            return [hashlib.sha256(video).hexdigest()]
        return [self._dataset(item.place[0])[0]._fingerprint, item.place[1]]

    def _items_of(self, number: int, source: Any) -> Iterator[BulkItem]:
        if isinstance(source, (bytes, bytearray, memoryview)):
            yield BulkItem(None, where=f"videos[{number}]", place=(number, 0))
        elif isinstance(source, Mapping):
            yield _of_row(source, None, f"videos[{number}]", (number, 0))
        elif not isinstance(source, str):
            yield from self._of_dataset(number)
        elif (kind := kind_of(source, self._split)) == "folder":
            yield from map(BulkItem, _walk(source))
        elif kind == "rows":
            yield from self._of_rows(source)
        elif kind == "dataset":
            yield from self._of_dataset(number)
        else:
            yield BulkItem(_located(os.path.expanduser(source)))

    def _of_rows(self, path: str) -> Iterator[BulkItem]:
        for record in open_source(path, split=self._split).records():
            if record.error is not None:
                yield BulkItem(None, where=record.where, error=f"{record.where}: {record.error}.")
            else:
                yield _of_row(record.row, record.root, record.where, None)

    def _of_dataset(self, number: int) -> Iterator[BulkItem]:
        dataset, column, root = self._dataset(number)
        source = self._sources[number]
        name = source if isinstance(source, str) else f"rows{number or ''}"
        light = dataset.select_columns([name for name in _COLUMNS if name in dataset.column_names])
        rows: Iterable[dict[str, Any]] = light if light.column_names else ({} for _ in range(len(dataset)))
        for index, (row, (path, carried)) in enumerate(zip(rows, _locations(dataset, column), strict=True)):
            where = f"{name}[{index}]"
            # a stand-in for the bytes, which stay where they are until their turn comes
            item = _of_row({**row, "video": where if carried else path}, None if carried else root, where, None)
            yield replace(item, video=None, where=where, place=(number, index)) if carried else item

    def _dataset(self, number: int) -> tuple[Any, str, str | None]:
        """A source as a dataset, its video column, and the folder its paths start from; opened once a process."""
        if number not in self._datasets:
            from datasets import Dataset

            source = self._sources[number]
            given = isinstance(source, Dataset)
            opened = open_source(source, split=None if given else self._split)
            if not isinstance(opened.dataset, Dataset):
                raise DatasetError(
                    f"a bulk run has to know all rows, but this is {type(opened.dataset).__name__}: load the dataset "
                    "without streaming."
                )
            column = next((name for name in ("video", "video_path") if name in opened.dataset.column_names), None)
            if column is None:
                raise DatasetError(
                    f"{source if isinstance(source, str) else 'the dataset'}: there is no video or video_path among "
                    f"the columns {sorted(opened.dataset.column_names)}."
                )
            self._datasets[number] = opened.dataset, column, opened.root
        return self._datasets[number]


def kind_of(source: str, split: str | None = None) -> str:
    """What a text names: a "folder" of videos, a file of "rows", a "dataset", or one "video".

    Raises:
        DatasetError: a folder in which there are neither videos nor data files.
    """
    if "://" in source:
        return "video"
    source = os.path.expanduser(source)
    if os.path.isdir(source):
        if split is None and next(_walk(source), None) is not None:
            return "folder"
        if split is None and not any(path.suffix.lower() in _DATA for path in Path(source).rglob("*")):
            raise DatasetError(
                f"{source} holds no videos (files ending in {' '.join(sorted(VIDEO_SUFFIXES))}) and no data files of "
                "a dataset. Name another folder."
            )
        return "dataset"
    if source.lower().endswith(_ROWS):
        return "rows"
    if os.path.exists(source) or Path(source).suffix.lower() in VIDEO_SUFFIXES:
        return "video"
    return "dataset" if split is not None or _HUB_ID.fullmatch(source) else "video"


def _as_list(sources: Any) -> list[Any]:
    one = isinstance(sources, (str, os.PathLike, bytes, bytearray, memoryview, Mapping))
    if one or type(sources).__module__.startswith("datasets."):
        sources = [sources]
    if not isinstance(sources, Iterable):
        raise TypeError(
            f"expected a folder, a JSONL file, a dataset, or a list of videos, got {type(sources).__name__}."
        )
    found: list[Any] = []
    for source in sources:
        if isinstance(source, Mapping) and not {"video", "video_path"} & set(source):
            source = {"video": source}  # what `datasets` has for a video
        found.append(os.fspath(source) if isinstance(source, os.PathLike) else source)
    for source in found:
        known = isinstance(source, (str, bytes, bytearray, memoryview, Mapping))
        if not known and not type(source).__module__.startswith("datasets."):
            raise TypeError(
                f"a bulk run reads files, URLs, bytes, rows and datasets, not {type(source).__name__}; the pipeline "
                "itself takes frames in memory."
            )
    return found


def _walk(folder: str) -> Iterator[str]:
    """Absolute paths of the videos in a folder and all folders in it, sorted; links are followed, once each."""
    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(os.path.abspath(os.path.expanduser(folder)), followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES:
                yield os.path.join(root, name)


def _locations(dataset: Any, column: str) -> Iterator[tuple[str | None, bool]]:
    """The path of each row's video, and whether the row carries its bytes; these are not read."""
    import pyarrow as pa  # type: ignore[import-untyped]  # comes with datasets

    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=256):
        for values in table.column(column).chunks:
            if pa.types.is_struct(values.type):
                carried = values.field("bytes").is_valid().to_pylist()
                yield from zip(values.field("path").to_pylist(), carried, strict=True)
            else:
                yield from ((value, False) for value in values.to_pylist())


def _of_row(row: Any, root: str | None, where: str, place: tuple[int, int] | None) -> BulkItem:
    parsed = parse_row(row, root)
    ids = (parsed.id,) if parsed.id_given else ()
    wrong = [problem.message for problem in parsed.problems if _OF_THE_VIDEO.fullmatch(problem.field)]
    if wrong:
        return BulkItem(None, ids=ids, where=where, error=f"{where}: {wrong[0]}.")
    video = parsed.video
    if isinstance(video, Mapping) and video["bytes"] is None:
        video = str(video["path"])
    if isinstance(video, Mapping):
        return BulkItem(None, parsed.start, parsed.end, ids, where, place)
    return BulkItem(_located(str(video)), parsed.start, parsed.end, ids)


def _located(video: str) -> str:
    """A URL as it is, a file from any folder."""
    if video.startswith("file://"):
        video = url2pathname(urlsplit(video).path)
    return video if "://" in video else os.path.abspath(video)
