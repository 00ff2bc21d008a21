"""Pipelines: many videos into a folder of adapters, on one process or many, whatever stops it."""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..adapters import AdapterError, VideoAdapter, VideoAdapterStore
from ..data import DatasetError
from ..video import VideoError, VideoReader
from ..video.ahead import prepare_ahead
from .bulk_folder import IN_INDEX, BulkFolder, Entry
from .bulk_processes import Turns, distributed_state, share
from .bulk_videos import BulkItem, BulkVideos
from .options import check_store, first_given, whole_number
from .video_to_lora import VideoToLoraPipeline, _join, renamed, warn_of_damage

__all__ = ["BulkSummary", "BulkVideos", "internalize_many"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BulkSummary:
    """What a bulk run did, all its processes together.

    Made, from the store, found, shared and skipped are all its videos.

    Attributes:
        output_dir: the folder of adapters.
        index: its `index.jsonl`.
        num_videos: videos, or spans of them, of this run (of this shard).
        num_made: adapters made now.
        num_from_store: adapters taken from the store.
        num_found: videos whose adapters were there already.
        num_shared: videos of the same bytes and span as one whose adapter is new; they share it.
        num_skipped: videos that could not be read; they are in `skipped.jsonl`, with the error.
        num_bytes: of the adapters of this run, on disk.
        seconds: that it took.
        videos_per_second: made now.
    """

    output_dir: Path
    index: Path
    num_videos: int
    num_made: int
    num_from_store: int
    num_found: int
    num_shared: int
    num_skipped: int
    num_bytes: int
    seconds: float
    videos_per_second: float

    def __str__(self) -> str:
        text = f"{self.num_videos} videos: {self.num_made} made, {self.num_found} already there"
        if self.num_from_store:
            text += f", {self.num_from_store} from the store"
        if self.num_shared:
            text += f", {self.num_shared} of the same bytes as another"
        text += f", {self.num_skipped} skipped, in {self.seconds:.1f} s ({self.videos_per_second:.2f} videos/s)"
        return f"{text}.\nIndex: {self.index}"


def internalize_many(
    pipeline: VideoToLoraPipeline,
    videos: Any,
    output_dir: str | os.PathLike[str],
    *,
    split: str | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    longest_edge: int | None = None,
    chunk_seconds: float | None = None,
    max_rank: int | None = None,
    batch_size: int | None = None,
    num_workers: int = 4,
    layout: str = "vlm",
    dtype: torch.dtype = torch.float32,
    store: VideoAdapterStore | None = None,
    shard: tuple[int, int] | None = None,
    max_bad_fraction: float = 1.0,
    overwrite: bool = False,
) -> BulkSummary:
    """Turn a folder of videos, rows of a JSONL file or a dataset into a folder of adapters.

    `output_dir` gets an adapter directory `<name of the video>-<16 digits>` for each video and span;
    `index.jsonl`, in the order of the videos: `video`, `start` and `end` (as asked for), `ids` of rows, `adapter` (the
    directory), `key` (as `VideoToLoraPipeline.store_key`), `content_hash`, `sha256` of the video, `num_frames`,
    `num_decode_errors` (packets and frames of a damaged video that were left out), `seconds` of video, `segments`,
    `rank`, `bytes`; `skipped.jsonl`, what could not be read, with the `error`;
    `internalize.json`, what decides the adapters; and `journal/`, what is known of each video.

    Called again it goes on where it was stopped, even by kill -9, and by the same batches comes to the same adapters:
    which videos share a batch depends on the list and `batch_size` alone. An adapter is not made again if its video
    has the size and time it had (else its bytes are hashed, and count), the settings are the same, and its files are
    as they were left. Another video under an old name is internalized anew, and what was made of the old one stays on
    disk, without a line in the index. A URL is taken to hold what it held; another folder reads it again, and `store`
    finds it by its bytes. Skipped videos are tried again. Videos of the same bytes and span share one adapter.

    Launched with accelerate or torchrun, each process takes the next batch when it is through with one.

    Args:
        pipeline: on the device to use.
        videos: a folder, JSONL file, dataset, Hub id, or a list of these and of videos; see [`BulkVideos`].
        output_dir: made if missing; of several machines, on a disk they share.
        split: of datasets and rows.
        num_frames, fps, start, end, longest_edge, chunk_seconds, max_rank: as in a call of the pipeline; a row's own
            span goes first.
        batch_size: videos internalized together, in each process; with `chunk_seconds`, chunks of one.
        num_workers: threads that decode ahead of the model, in each process.
        layout, dtype: of the files, as for [`VideoAdapter.save_pretrained`].
        store: where adapters made before of the same bytes, in the same way, are found, and new ones are kept.
        shard: `(i, n)`: only the i-th (1..n) of n parts, for launches that know nothing of each other.
        max_bad_fraction: stop when more than this part of the videos cannot be read; by default never.
        overwrite: go on also where the folder was made with other settings, and remove the adapters that are replaced.

    Returns:
        The same in every process.

    Raises:
        DatasetError: there are no such videos, too many bad ones, or the folder is another run's.
        VideoSpanError: sampling that no video could satisfy.
        OSError: an adapter cannot be written; what is done is kept.
        ValueError: a number makes no sense.
        TypeError: `store` is none, or `videos` are none.
    """
    began = time.perf_counter()
    asked = {"num_frames": num_frames, "fps": fps, "start": start, "end": end, "longest_edge": longest_edge}
    asked |= {"chunk_seconds": chunk_seconds, "max_rank": max_rank}
    recipe = _Recipe.of(pipeline, {name: value for name, value in asked.items() if value is not None})
    pipeline._check_room(recipe.sampling.get("max_rank"))
    batch_size = whole_number("batch_size", first_given(batch_size, pipeline._batch_size, 1), at_least=1)
    num_workers = whole_number("num_workers", num_workers, at_least=0)
    check_store(store)
    _check_parts(shard, max_bad_fraction)
    state = distributed_state(pipeline.device.type == "cpu")
    folder = BulkFolder(output_dir, recipe.facts | {"layout": layout, "file_dtype": str(dtype).removeprefix("torch.")})
    work = _Work(pipeline, recipe, BulkVideos(videos, split), folder, layout, dtype, store, batch_size)
    try:
        plan = share(state, lambda: work.plan(shard, overwrite))
        if not state.is_main_process:
            folder.open(_journal_name(shard, state.process_index))
        counts = work.run(plan, state, num_workers, max_bad_fraction * plan.num_videos)
        state.wait_for_everyone()
        if state.is_main_process:
            folder.merge(plan.items, remove_replaced=overwrite)
        counts = sum(gather_object([counts]), Counter())
    except BaseException:
        if state.is_main_process and work.items:
            with suppress(Exception):  # the first error is the one to be seen
                folder.merge(work.items, remove_replaced=False)
        raise
    finally:
        folder.close()
    if counts["skipped"] > max_bad_fraction * plan.num_videos:
        raise _too_many(counts["skipped"], plan.num_videos, max_bad_fraction, folder.path)
    seconds = time.perf_counter() - began
    return BulkSummary(
        output_dir=folder.path,
        index=folder.index,
        num_videos=plan.num_videos,
        num_made=counts["made"],
        num_from_store=counts["store"],
        num_found=plan.num_done + counts["found"],
        num_shared=counts["shared"],
        num_skipped=counts["skipped"],
        num_bytes=plan.num_bytes + counts["bytes"],
        seconds=seconds,
        videos_per_second=counts["made"] / seconds,
    )


@dataclass(frozen=True)
class _Recipe:
    """All that decides an adapter but the video: what `VideoToLoraPipeline.store_key` puts into its key.

    Attributes:
        sampling: options of the pipeline's call, defaults filled in.
        facts: these and everything else.
    """

    sampling: dict[str, Any]
    facts: dict[str, Any]

    @classmethod
    def of(cls, pipeline: VideoToLoraPipeline, asked: dict[str, Any]) -> _Recipe:
        facts = pipeline.recipe(asked)
        return cls(facts["sampling"], facts)

    def of_item(self, item: BulkItem) -> dict[str, Any]:
        """Sampling of an item: its own span goes first."""
        own = {"start": item.start, "end": item.end}
        return self.sampling | {name: float(value) for name, value in own.items() if value is not None}

    def key(self, sha256: str | None, item: BulkItem) -> str:
        """The key in a store."""
        return VideoAdapterStore.key(self.facts | {"video": {"sha256": sha256}, "sampling": self.of_item(item)})


@dataclass(frozen=True)
class _Plan:
    """The work of a launch.

    Attributes:
        items: of the whole list, all shards.
        units: items that share a batch, of those still to be done.
        num_videos: of this shard.
        num_done: of these, done already.
        num_bytes: of their adapters.
    """

    items: list[BulkItem]
    units: list[list[BulkItem]]
    num_videos: int
    num_done: int
    num_bytes: int


@dataclass(frozen=True)
class _Prepared:
    """An item ready for the model, or not in need of it: exactly one of the last four is set."""

    item: BulkItem
    signature: Any = None
    found: Entry | None = None
    stored: VideoAdapter | None = None
    inputs: Any = None
    error: str | None = None


class _Work:
    """One process's part of a bulk run."""

    def __init__(
        self,
        pipeline: VideoToLoraPipeline,
        recipe: _Recipe,
        videos: BulkVideos,
        folder: BulkFolder,
        layout: str,
        dtype: torch.dtype,
        store: VideoAdapterStore | None,
        batch_size: int,
    ) -> None:
        self.pipeline, self.recipe, self.videos, self.folder = pipeline, recipe, videos, folder
        self.layout, self.dtype, self.store, self.batch_size = layout, dtype, store, batch_size
        self.chunked = "chunk_seconds" in recipe.sampling
        self.items: list[BulkItem] = []
        self.new: dict[str, Entry] = {}  # by key, what was not there before

    def plan(self, shard: tuple[int, int] | None, overwrite: bool) -> _Plan:
        """List the videos, see what is done, and cut the rest into units; by the main process alone."""
        items = self.videos.items()
        self.folder.prepare(_journal_name(shard, 0), overwrite=overwrite)
        self.folder.open(_journal_name(shard, 0))
        self.items = items
        part, parts = shard or (1, 1)
        size = 1 if self.chunked else self.batch_size
        own = [unit for number, unit in enumerate(plan_units(items, size)) if number % parts == part - 1]
        done = [entry for unit in own for item in unit if (entry := self._done(item)) is not None]
        self.folder.append(done)  # those whose files were only touched
        finished = {(entry["video"], entry["where"], entry["start"], entry["end"]) for entry in done}
        todo = [[item for item in unit if item.identity not in finished] for unit in own]
        # a unit of which nothing is done keeps its batch; what is left of the others is put together
        whole = [left for left, unit in zip(todo, own, strict=True) if len(left) == len(unit)]
        rest = [item for left, unit in zip(todo, own, strict=True) if len(left) < len(unit) for item in left]
        sizes = {entry["adapter"]: entry["bytes"] for entry in done}
        num_videos = sum(map(len, own))
        return _Plan(items, whole + plan_units(rest, size), num_videos, len(done), sum(sizes.values()))

    def run(self, plan: _Plan, state: PartialState, num_workers: int, limit: float) -> Counter[str]:
        """Do this process's units; the counts of what came of them."""
        turns = Turns(len(plan.units), state)
        taken: list[int] = []

        def upcoming() -> Iterator[BulkItem]:
            for number in turns:
                taken.append(len(plan.units[number]))
                yield from plan.units[number]

        counts: Counter[str] = Counter()
        # while the model is at one batch, the next is made ready
        ahead = num_workers + (1 if self.chunked else self.batch_size)
        prepared = prepare_ahead(self.prepare, upcoming(), num_workers, ahead)
        hide = None if state.is_main_process else True  # None: unless stderr is a terminal
        total, done = plan.num_videos, plan.num_done
        bar = tqdm(desc="Internalizing", unit="video", total=total, initial=done, disable=hide)
        with closing(prepared), bar:
            for first in prepared:
                unit = [first, *islice(prepared, taken.pop(0) - 1)]
                bad = self._finish(unit, counts)
                bar.update(turns.add("finished", len(unit)) + done - bar.n)
                if turns.add("skipped", bad) > limit:
                    break  # other processes, too: all come to the end
        return counts

    def prepare(self, item: BulkItem) -> _Prepared:
        """Find an item's adapter, or decode its video and prepare it for the model."""
        if item.error is not None:
            return _Prepared(item, error=item.error)
        with ExitStack() as stack:
            try:
                signature = None
                with suppress(FileNotFoundError):  # opening it says so in words
                    signature = self.videos.signature(item)
                video = self.videos.fetch(item)
                if self.chunked and self.store is None and "://" in (item.video or ""):
                    return _Prepared(item, signature, inputs=video)  # not fetched twice
                edge = self.recipe.sampling.get("longest_edge")
                reader = stack.enter_context(VideoReader(video, longest_edge=edge))
                key = self.recipe.key(reader.sha256, item)
            except Exception as error:  # whatever a file does to a library, the others go on
                return _Prepared(item, error=_told(error))
            if found := self.folder.find(key):
                return _Prepared(item, signature, found=found)
            if self.store is not None and (stored := self.store.get(key)) is not None:
                return _Prepared(item, signature, stored=renamed(stored, reader.name))
            if self.chunked:
                return _Prepared(item, signature, inputs=video)
            try:
                names = ("num_frames", "fps", "start", "end")
                span = {name: value for name, value in self.recipe.of_item(item).items() if name in names}
                return _Prepared(item, signature, inputs=self.pipeline.preprocess(reader.sample(**span)))
            except Exception as error:
                return _Prepared(item, error=_told(error))

    def _finish(self, unit: Sequence[_Prepared], counts: Counter[str]) -> int:
        """Make what is missing of a unit, write it, and note it in the journal; return how many were skipped."""
        made = iter(self._make([ready for ready in unit if ready.inputs is not None]))
        entries: list[Entry] = []
        written: dict[str, int] = {}
        for ready in unit:
            item, error, adapter = ready.item, ready.error, ready.stored
            if ready.inputs is not None:
                outcome = next(made)
                error, adapter = (outcome, None) if isinstance(outcome, str) else (None, outcome)
            place = {"video": item.video, "where": item.where, "start": item.start, "end": item.end}
            if error is not None:
                logger.warning("%s is skipped: %s", item.name, _without_name(error, item))
                entries.append(place | {"error": error})
                counts["skipped"] += 1
                continue
            kind, facts = self._take(ready, adapter)
            counts[kind] += 1
            entry = {name: facts[name] for name in (*IN_INDEX, "source", "stamp")}
            entries.append(place | {"signature": ready.signature} | entry)
            if kind != "shared":
                written[facts["adapter"]] = facts["bytes"]
        counts["bytes"] += sum(written.values())
        self.folder.append(entries)
        return sum("error" in entry for entry in entries)

    def _take(self, ready: _Prepared, adapter: VideoAdapter | None) -> tuple[str, Entry]:
        """What came of a video, as it is counted, and what is to be said of its adapter, which is written if new."""
        if ready.found is not None:
            return "shared" if ready.found["key"] in self.new else "found", ready.found
        assert adapter is not None
        key = self.recipe.key(warn_of_damage(adapter).segments[0].sha256, ready.item)
        if key in self.new:  # of a copy that was on its way when this one was looked for
            return "shared", self.new[key]
        if ready.stored is None and self.store is not None:
            self.store.put(key, adapter)
        self.new[key] = self.folder.save(adapter, key, self.layout, self.dtype)
        return "store" if ready.stored is not None else "made", self.new[key]

    def _make(self, batch: Sequence[_Prepared]) -> list[VideoAdapter | str]:
        """The adapter of each, or why there is none; a batch that fails is tried one by one."""
        if not batch:
            return []
        try:
            return list(self._adapters(batch))
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            told = _told(error)  # the error itself would hold on to the memory
        if len(batch) == 1:
            return [told]
        return [outcome for ready in batch for outcome in self._make([ready])]

    def _adapters(self, batch: Sequence[_Prepared]) -> list[VideoAdapter]:
        if not self.chunked:
            outputs = self.pipeline.forward(_join([ready.inputs for ready in batch]))
            return self.pipeline.postprocess(outputs)
        return [
            self.pipeline._internalize_chunks(
                ready.inputs, self.batch_size, guard=_errors_of_the_file, **self.recipe.of_item(ready.item)
            )
            for ready in batch
        ]

    def _done(self, item: BulkItem) -> Entry | None:
        try:
            return self.folder.done(item, self.videos.signature(item))
        except OSError:
            return None  # to be told when its turn comes


def plan_units(items: Sequence[BulkItem], batch_size: int) -> list[list[BulkItem]]:
    """Consecutive items, `batch_size` at a time."""
    return [list(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]


def _journal_name(shard: tuple[int, int] | None, rank: int) -> str:
    part, parts = shard or (1, 1)
    return f"{part}-of-{parts}-{rank:05d}"


class _FileError(ValueError):
    """Whatever a file did to a library while its chunks were read, in words."""


def _errors_of_the_file(chunks: Iterator[Any]) -> Iterator[Any]:
    """The same chunks; an error is this video's alone, and no bug that would stop the run."""
    try:
        yield from chunks
    except Exception as error:
        raise _FileError(_told(error)) from error


def _told(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (VideoError, AdapterError, _FileError)) else f"{type(error).__name__}: {text}"


def _without_name(error: str, item: BulkItem) -> str:
    """An error without the name of its video or row, which stands before it already."""
    name = item.where or re.split(r"[/\\]", item.video or "")[-1].partition("?")[0]
    return error.removeprefix(f"{name}: ") if name else error


def _too_many(bad: int, total: int, max_bad_fraction: float, path: Path) -> Exception:
    return DatasetError(
        f"{bad} of {total} videos could not be read, more than max_bad_fraction={max_bad_fraction:g}; "
        f"{path / 'skipped.jsonl'} tells why. Correct or remove them and start again: what is done is kept."
    )


def _check_parts(shard: tuple[int, int] | None, max_bad_fraction: float) -> None:
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard must be (i, n) with i from 1 to n, got {shard}.")
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction must be from 0 to 1, got {max_bad_fraction}.")
