"""Pipelines: an adapter that grows while its video is still coming in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..adapters import VideoAdapter, compose_adapters
from ..video import LiveVideo
from ..video.ahead import one_ahead
from .options import whole_number

if TYPE_CHECKING:
    from .video_to_lora import VideoToLoraPipeline


def stream(
    self: VideoToLoraPipeline,
    source: Any,
    *,
    chunk_seconds: float | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    longest_edge: int | None = None,
    frame_rate: float | None = None,
    timeout: float | None = 10.0,
    max_segments: int | None = None,
    max_rank: int | None = None,
) -> Iterator[VideoAdapter]:
    """Internalize a video that is still coming in: after each chunk the adapter of all that was seen so far.

    ```python
    for adapter in internalize.stream("recording.ts", chunk_seconds=10, max_segments=30):
        adapter.save_pretrained("last-five-minutes", overwrite=True)
    ```

    Each chunk becomes what internalizing its span of the finished file becomes, and the adapter is their composition:
    without a bound it grows by the hypernetwork's rank with every chunk. One that shows nothing new is left out, and
    when the next comes its time belongs to the segment before. The next chunk is read and decoded while the model
    works. Stop by leaving the loop. If the source fails, what came before it is internalized and then the error
    raised; adapters that were given out stay as they are.

    Args:
        source: the path of a file that is being written, a binary file object such as a pipe, a URL that FFmpeg knows
            (`rtsp://`, `udp://`, ...), or an iterator of frames or of `(seconds, frame)`; see [`LiveVideo`].
        chunk_seconds: length of a chunk; the last one may be shorter.
        num_frames, fps, longest_edge: how each chunk is sampled, as in a call.
        frame_rate: frames a second of an iterator that gives no times.
        timeout: seconds without anything new after which a file, pipe or URL counts as ended; None: never.
        max_segments: keep only so many segments, the latest.
        max_rank: keep the adapter to this rank, the static part's included: segments share it by what they have to
            say ([`VideoAdapter.truncate`] with `keep_segments`), and the oldest go where there is none left for them.

    Yields:
        Adapters, each with one segment more (or the oldest replaced by it). The newest segment alone is
        `adapter.select(start=adapter.segments[-1].start)`.

    Raises:
        VideoError: the source cannot be opened or read, or not be sampled as asked; or nothing came.
        ValueError: a bound leaves no room for a segment.
    """
    sampling: dict[str, Any] = {"num_frames": num_frames, "fps": fps, "longest_edge": longest_edge}
    sampling = self._with_defaults(sampling | {"chunk_seconds": chunk_seconds, "max_rank": max_rank}, "the stream")
    length, max_rank = sampling.pop("chunk_seconds", None), sampling.pop("max_rank", None)
    if length is None:
        raise ValueError("pass chunk_seconds=, the length of the chunks that a live video is cut into.")
    if sampling.keys() & {"start", "end"}:
        raise ValueError("a live video has no start and end to be cut to: it is read from where it is until it ends.")
    if max_segments is not None:
        max_segments = whole_number("max_segments", max_segments, at_least=1)
    self._check_room(max_rank)
    if "num_frames" not in sampling and "fps" not in sampling:
        sampling["num_frames"] = self.processor.num_frames
    sampling.setdefault("longest_edge", self.processor.longest_edge)
    video = LiveVideo(source, chunk_seconds=length, frame_rate=frame_rate, timeout=timeout, **sampling)
    return _adapters(self, video, max_segments, max_rank)


def _adapters(
    pipeline: VideoToLoraPipeline, video: LiveVideo, max_segments: int | None, max_rank: int | None
) -> Iterator[VideoAdapter]:
    room = max_segments
    if max_rank is not None:
        most = max_rank - pipeline.static_rank
        room = most if room is None else min(room, most)
    adapter: VideoAdapter | None = None
    with ExitStack() as stack:
        chunks = (pipeline._prepare(frames) for frames in video)
        prepared = stack.enter_context(closing(one_ahead(chunks)))
        stack.callback(video.stop)  # first, for closing waits for the chunk that is on its way
        for inputs in prepared:
            (newest,) = pipeline.postprocess(pipeline.forward(inputs))
            before = _with_room(_until(adapter, newest.segments[0].start), room)
            adapter = grow(before, [newest], max_rank)
            yield adapter


def grow(adapter: VideoAdapter | None, newest: list[VideoAdapter], max_rank: int | None) -> VideoAdapter:
    """The adapter with the newest segments behind its own, kept to a rank.

    Truncating again and again gives what truncating once gives: a segment keeps its first singular directions, and
    its share only falls as others come.
    """
    grown = compose_adapters([adapter, *newest] if adapter else newest)
    if max_rank is not None and grown.rank > max_rank:
        grown, _ = grown.truncate(max_rank, keep_segments=True)
    return grown


def _until(adapter: VideoAdapter | None, end: float | None) -> VideoAdapter | None:
    """The adapter whose last segment goes on to there: what was left out between showed its picture."""
    if adapter is None:
        return None
    *others, last = adapter.segments
    provenance = replace(adapter.provenance, segments=(*others, replace(last, end=end)))
    return replace(adapter, provenance=provenance)


def _with_room(adapter: VideoAdapter | None, room: int | None) -> VideoAdapter | None:
    """The adapter without its oldest segments, so that one more fits; None where only that one does."""
    if adapter is None or room is None or len(adapter.segments) < room:
        return adapter
    if room == 1:
        return None
    latest = adapter.select(start=adapter.segments[1 - room].start)
    # of an endless stream only what happened since the oldest segment came
    truncations = latest.provenance.truncations[-len(latest.segments) :]
    return replace(latest, provenance=replace(latest.provenance, truncations=truncations))
