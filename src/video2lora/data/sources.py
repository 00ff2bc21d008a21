"""Opens what a dataset can come as: JSONL files, lists of rows, `datasets` objects, or the name of one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DatasetError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_EXPECTED = (
    "JSONL files (or JSON arrays), a list of dicts, a datasets.Dataset or IterableDataset, or a name for "
    "datasets.load_dataset"
)
_JSONL = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Record:
    """A row as it was read.

    Attributes:
        row: the row, in any form.
        where: how to find it: "row 3", or "train.jsonl:4".
        root: folder its relative video path is resolved against; None leaves it.
        error: why the row could not be read at all, or None.
    """

    row: Any
    where: str
    root: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class OpenedSource:
    """A source of rows: either a `datasets` object, or records to be read once."""

    dataset: Dataset | IterableDataset | None
    root: str | None
    _records: Iterable[Record] | None = None

    def records(self) -> Iterator[Record]:
        """The rows, in order."""
        if self._records is not None:
            yield from self._records
        else:
            assert self.dataset is not None
            for index, row in enumerate(self.dataset):
                yield Record(row, f"row {index}", self.root)


def open_source(source: Any, *, split: str | None = None, video_root: str | Path | None = None) -> OpenedSource:
    """Open a source without reading its rows.

    Args:
        source: see `load_rows`.
        split: of a DatasetDict or a name, the split; of rows in JSONL or a list, the value of their `split` field.
        video_root: folder that relative video paths are resolved against.

    Raises:
        DatasetError: the source is nothing known, cannot be loaded, or has no such split.
    """
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    root = None if video_root is None else os.path.abspath(video_root)
    if isinstance(source, (str, os.PathLike)) and not _is_jsonl(source):
        if root is None and os.path.isdir(source):
            root = os.path.abspath(source)
        return OpenedSource(undecoded(_choose_split(_load_dataset(os.fspath(source), split), split)), root)
    if isinstance(source, (DatasetDict, IterableDatasetDict)):
        return OpenedSource(undecoded(_choose_split(source, split)), root)
    if isinstance(source, (Dataset, IterableDataset)):
        if split is not None:
            raise DatasetError(
                f"split={split!r} was given with a {type(source).__name__}, which is one split already."
            )
        return OpenedSource(undecoded(source), root)
    sources = [source] if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(sources, Sequence) or isinstance(sources, bytes):
        raise DatasetError(f"cannot read rows from {type(source).__name__}; expected {_EXPECTED}.")
    if sources and all(isinstance(one, (str, os.PathLike)) for one in sources):
        for one in sources:
            if not _is_jsonl(one) or not os.path.isfile(one):
                reason = "there is no such file" if _is_jsonl(one) else "it is not a .jsonl file"
                raise DatasetError(f"{os.fspath(one)}: {reason}; in a list of paths each must be a JSONL file.")
        records: Iterable[Record] = (record for one in sources for record in _jsonl_records(Path(one), root))
    else:
        records = (Record(row, f"row {index}", root) for index, row in enumerate(sources))
    return OpenedSource(None, root, records if split is None else _of_split(records, split))


def undecoded(dataset: Any) -> Any:
    """Have the Video columns of a dataset give `{"path", "bytes"}`: that needs no torchcodec, and no decoding twice.

    A video column of plain bytes, or of `{"path", "bytes"}` without the feature, is given it.
    """
    from datasets import Video

    for name, feature in (dataset.features or {}).items():
        named = name in ("video", "video_path")
        plain = getattr(feature, "dtype", None) in ("binary", "large_binary")
        pair = isinstance(feature, Mapping) and set(feature) == {"path", "bytes"}
        if (isinstance(feature, Video) and feature.decode) or (named and (plain or pair)):
            dataset = dataset.cast_column(name, Video(decode=False))
    return dataset


def _is_jsonl(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).lower().endswith(_JSONL)


def _jsonl_records(path: Path, root: str | None) -> Iterator[Record]:
    folder = root if root is not None else str(path.resolve().parent)
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        if file.read(1) == "[":
            file.seek(0)
            yield from _json_array(path.name, file.read(), folder)
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                yield Record(json.loads(line), where, folder)
            except (ValueError, RecursionError) as error:
                yield Record(None, where, folder, error=f"not JSON ({error}); expected one object a line")


def _json_array(name: str, text: str, folder: str) -> Iterator[Record]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{name}: it begins as a JSON array but is none ({error}).") from error
    for index, row in enumerate(rows):
        yield Record(row, f"{name}[{index}]", folder)


def _of_split(records: Iterable[Record], split: str) -> Iterator[Record]:
    found: set[str] = set()
    for record in records:
        name = record.row.get("split") if isinstance(record.row, Mapping) else None
        found.add(str(name))
        # A line that cannot be read may belong to it, so it is not dropped without a word.
        if name == split or record.error is not None:
            yield record
    if split not in found:
        raise DatasetError(f"no row has split={split!r}; the rows have {sorted(found)}.")


def _load_dataset(name: str, split: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the Hub client, fsspec and the builders each raise errors of their own
        raise DatasetError(
            f"{name!r} cannot be loaded as a dataset ({type(error).__name__}: {error}). Expected {_EXPECTED}; "
            "check the name, the network and, for a gated dataset, that its terms are accepted and you are logged in."
        ) from error


def _choose_split(loaded: Any, split: str | None) -> Any:
    if not isinstance(loaded, Mapping):
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise DatasetError(f"split={split!r}: the dataset has {sorted(loaded)}; give one of them as split.")
    return loaded[split]
