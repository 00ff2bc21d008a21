"""Training rows in one form, from JSONL, lists, `datasets` objects (streaming too) or the Hub."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DatasetError
from .forms import ParsedRow, parse_row, video_key
from .sources import OpenedSource, open_source

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

COLUMNS = ("id", "video", "start", "end", "queries")
_CHUNK = 10_000  # rows held as Python objects at a time


def load_rows(
    source: Any, *, split: str | None = None, video_root: str | Path | None = None
) -> Dataset | IterableDataset:
    """Read training rows in any of their forms into a dataset of one form; order and number of rows are kept.

    A row has `video` (path, URL, `{"path", "bytes"}`) or `video_path`, optional `start` and `end` in seconds, and
    either `prompt` and `response` (or `target_text`) or `conversations` (or `messages`): a list of
    `{"prompt", "response"}`, of `{"role", "content"}` with content a string or a list of parts, or of
    `{"from", "value"}`. A missing response is None: a teacher is to fill it. Turns of a conversation are taken pair by
    pair, each question without the turns before it; `<video>` and `<image>` at either end of a chat turn go. The
    published manifests (`id, video_path, task_type, prompt, target_text, dataset, split, metadata`) are read as they
    are; `metadata` may hold the span as `start` or `start_time`, `_seconds`, `_sec`, `_s` (`end` alike), in seconds or
    "HH:MM:SS.mmm".

    Args:
        source: path or paths of JSONL files, a list of rows, a `datasets.Dataset`, `IterableDataset` (read lazily, row
            by row) or a dict of splits of them, or a name or folder for `datasets.load_dataset`.
        split: which split of a dict of splits or of a name; of JSONL and lists, the rows whose `split` field says so.
        video_root: folder that relative video paths start from. Default: the folder of the JSONL file or of the local
            dataset; for rows in memory they are left as they are.

    Returns:
        A Dataset, or of an IterableDataset an IterableDataset, with the columns `id` (given, or 16 hexadecimal digits
        hashed from the row's content; in a Dataset a repeated hash gets "-1", "-2", ...), `video` (a location, or
        `{"path", "bytes"}` when rows carry videos: Video(decode=False)), `start`, `end` (float seconds or None) and
        `queries` (list of `{"prompt", "response"}`).

    Raises:
        DatasetError: the source cannot be opened, or a row is in none of the forms; the first such row is named (when
            it is reached, if streaming). `check_rows` lists them all.
    """
    from datasets import IterableDataset

    opened = open_source(source, split=split, video_root=video_root)
    if isinstance(opened.dataset, IterableDataset):
        return _stream(opened.dataset, opened.root)
    if opened.dataset is not None and _carries_videos(opened.dataset):
        return _beside_videos(opened)
    return _in_memory(_parse_all(opened))


def group_queries(dataset: Dataset) -> Dataset:
    """Merge the rows of the same video and span into one row with all their queries, so it is encoded once.

    The merged row keeps the id and place of its first row; queries keep their order. Videos carried as bytes are told
    apart by their SHA-256, and are copied (by `datasets`, into its cache) if anything is merged.

    Raises:
        DatasetError: the dataset is streaming, or not one of `load_rows`.
    """
    from datasets import Dataset, concatenate_datasets

    if not isinstance(dataset, Dataset):
        raise DatasetError(
            f"group_queries has to see all rows, but this is {type(dataset).__name__}. Write the rows of one video as "
            "one row with conversations, or load them into memory."
        )
    if set(COLUMNS) - set(dataset.column_names):
        raise DatasetError(f"expected the columns {list(COLUMNS)} of load_rows, not {dataset.column_names}.")
    groups: dict[tuple[str, float | None, float | None], int] = {}
    firsts: list[int] = []
    queries: list[list[dict[str, str | None]]] = []
    for index, row in enumerate(dataset):
        key = (video_key(row["video"]), row["start"], row["end"])
        if key in groups:
            queries[groups[key]].extend(row["queries"])
        else:
            groups[key] = len(firsts)
            firsts.append(index)
            queries.append(list(row["queries"]))
    if len(firsts) == len(dataset):
        return dataset
    merged = Dataset.from_dict({"queries": queries}, features=_features(dataset.features["video"], ("queries",)))
    with _quiet():
        kept = dataset.select_columns([name for name in COLUMNS if name != "queries"]).select(firsts)
        return concatenate_datasets([kept, merged], axis=1)


def form_error(where: str, parsed: ParsedRow) -> DatasetError:
    """The error for a row that is in none of the forms."""
    first = parsed.problems[0]
    more = f" (and {len(parsed.problems) - 1} more)" if len(parsed.problems) > 1 else ""
    return DatasetError(f"{where}: {first.message}{more}. Run check_rows on the source to list every such row.")


def _parse_all(opened: OpenedSource) -> Iterator[ParsedRow]:
    """Parse every record, making the hashed ids unique."""
    given: set[str] = set()
    seen: dict[str, int] = {}
    for record in opened.records():
        if record.error is not None:
            raise DatasetError(f"{record.where}: {record.error}.")
        parsed = parse_row(record.row, record.root)
        if parsed.problems:
            raise form_error(record.where, parsed)
        if parsed.id_given:
            given.add(parsed.id)
        else:
            repeats = seen.get(parsed.id, 0)
            seen[parsed.id] = repeats + 1
            parsed.id += f"-{repeats}" if repeats else ""
        yield parsed


def _in_memory(rows: Iterable[ParsedRow]) -> Dataset:
    """A dataset of the rows; the video column carries bytes if any row does."""
    from datasets import Dataset, Value, Video, concatenate_datasets

    chunks: list[Dataset] = []
    pending: list[ParsedRow] = []

    def flush() -> None:
        carries = any(isinstance(row.video, dict) for row in pending)
        feature = Video(decode=False) if carries else Value("string")
        columns = {name: [getattr(row, name) for row in pending] for name in COLUMNS}
        if carries:
            columns["video"] = [_as_dict(video) for video in columns["video"]]
        chunks.append(Dataset.from_dict(columns, features=_features(feature)))
        pending.clear()

    for row in rows:
        pending.append(row)
        if len(pending) == _CHUNK:
            flush()
    if pending or not chunks:
        flush()
    if len({str(chunk.features["video"]) for chunk in chunks}) > 1:
        chunks = [chunk if _carries_videos(chunk) else _with_dicts(chunk) for chunk in chunks]
    return concatenate_datasets(chunks) if len(chunks) > 1 else chunks[0]


def _as_dict(video: Any) -> dict[str, Any]:
    return video if isinstance(video, dict) else {"path": video, "bytes": None}


def _with_dicts(chunk: Dataset) -> Dataset:
    from datasets import Dataset, Video

    columns = {**chunk.to_dict(), "video": [_as_dict(video) for video in chunk["video"]]}
    return Dataset.from_dict(columns, features=_features(Video(decode=False)))


def _beside_videos(opened: OpenedSource) -> Dataset:
    """The new columns beside the old video column, whose bytes are read for the ids but not copied."""
    from datasets import Dataset, concatenate_datasets

    assert opened.dataset is not None
    if opened.root is not None:
        return _in_memory(_parse_all(opened))  # paths in the column may have to change
    name = "video" if "video" in opened.dataset.column_names else "video_path"
    names = [column for column in COLUMNS if column != "video"]
    columns: dict[str, list[Any]] = {column: [] for column in names}
    for row in _parse_all(opened):
        for column in names:
            columns[column].append(getattr(row, column))
    videos = opened.dataset.select_columns([name])
    videos = videos if name == "video" else videos.rename_column(name, "video")
    beside = Dataset.from_dict(columns, features=_features(videos.features["video"], names))
    with _quiet():
        return concatenate_datasets([videos, beside], axis=1).select_columns(list(COLUMNS))


def _stream(dataset: IterableDataset, root: str | None) -> IterableDataset:
    normalise = _Normalise(root)
    if dataset.features is None:
        # Their types are known only by reading, and nothing may be read yet.
        return dataset.map(normalise).select_columns(list(COLUMNS))
    name = "video" if "video" in dataset.features else "video_path"
    if name not in dataset.features:
        raise DatasetError(f"there is no video or video_path among the columns {sorted(dataset.features)}.")
    columns = list(dataset.features)
    return dataset.map(normalise, remove_columns=columns, features=_features(_video_feature(dataset.features[name])))


class _Normalise:
    """Brings one streamed row to the one form; a class, so that it goes to dataloader workers."""

    def __init__(self, root: str | None):
        self.root = root

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        parsed = parse_row(row, self.root)
        if parsed.problems:
            named = (
                f"row {parsed.id!r}" if parsed.id_given else f"a row of {row.get('video') or row.get('video_path')!r}"
            )
            raise form_error(named[:200], parsed)
        return {name: getattr(parsed, name) for name in COLUMNS}


def _video_feature(feature: Any) -> Any:
    """Keep text as text; anything else comes out as `{"path", "bytes"}`."""
    from datasets import Value, Video

    return feature if isinstance(feature, Value) and "string" in feature.dtype else Video(decode=False)


def _features(video: Any, names: Sequence[str] = COLUMNS) -> Features:
    from datasets import Features, Value

    features = {
        "id": Value("string"),
        "video": video,
        "start": Value("float64"),
        "end": Value("float64"),
        "queries": [{"prompt": Value("string"), "response": Value("string")}],
    }
    return Features({name: features[name] for name in names})


def _carries_videos(dataset: Dataset) -> bool:
    from datasets import Video

    name = "video" if "video" in dataset.features else "video_path"
    return isinstance(dataset.features.get(name), Video)


class _quiet:
    """`datasets` shows its bars also where stderr is a file: not there."""

    def __enter__(self) -> None:
        import datasets

        self._off = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
        if self._off:
            datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        if self._off:
            import datasets

            datasets.enable_progress_bars()
