"""Evaluation: samples made ready for the model: decoded once, encoded once, by threads ahead of it."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ..data.forms import PLACEHOLDERS
from ..modeling import Video2LoraProcessor
from ..video import VideoError, VideoFrames, VideoReader
from ..video.ahead import prepare_ahead
from .condition import Condition, PreparedSample, PreparedVideo
from .samples import Sample


def prepare_sample(
    sample: Sample,
    processor: Video2LoraProcessor,
    conditions: Sequence[Condition],
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    longest_edge: int | None = None,
) -> PreparedSample:
    """Decode and encode one sample with all that `conditions` need but a partner.

    Args:
        sample: its video a file or frames in memory.
        processor: the model's; not in use elsewhere meanwhile.
        conditions: decide what is prepared: segments, turns with the video in context.
        num_frames, fps, longest_edge: how to sample the video, as in `processor.load_video`.

    Raises:
        VideoError: the video cannot be read.
        ValueError: a prompt holds the video's placeholder, or frames that are sampled already are to be cut into
            segments.
    """
    prompts = dict.fromkeys(p for condition in conditions for p in condition.prompts_with_video(sample))
    _check_prompts(sample, processor, [*(question.prompt for question in sample.questions), *prompts])
    sampling: dict[str, Any] = {"num_frames": num_frames, "fps": fps}
    if num_frames is None and fps is None:
        sampling["num_frames"] = processor.num_frames
    counts = sorted({condition.num_segments for condition in conditions} - {1})
    frames, parts = _read(sample, sampling, longest_edge or processor.longest_edge, counts)
    internalization, turns = encode_turns(processor, frames, prompts)
    segments = {
        count: tuple(PreparedVideo(part, processor.encode_video(part)) for part in several)
        for count, several in parts.items()
    }
    return PreparedSample(sample, frames, internalization, turns=turns, segments=segments)


def prepare_samples(
    samples: Sequence[Sample],
    processor: Video2LoraProcessor,
    conditions: Sequence[Condition],
    num_workers: int = 2,
    *,
    indices: Sequence[int] | None = None,
    ahead: int | None = None,
    **sampling: Any,
) -> Generator[PreparedSample | VideoError, None, None]:
    """Prepare samples ahead of the model, in order, with their partners where a condition needs one.

    A sample's partner is the next sample of another video, in the order of `samples` and wrapping round, whose video
    can be read. Which it is depends on the videos alone, not on `indices`.

    Args:
        samples: the whole benchmark.
        processor: the model's; every thread works with a copy.
        conditions: decide what is prepared.
        num_workers: threads; 0 to prepare each sample when it is asked for.
        indices: of the samples to prepare; all by default.
        ahead: samples that may wait; as many as there are threads by default.
        sampling: `num_frames`, `fps`, `longest_edge` of [`prepare_sample`].

    Returns:
        For each sample what it became, or why its video cannot be read. Where no other video can be read either
        and a partner is needed, that is the error.

    Raises:
        ValueError: as [`prepare_sample`], or a partner is needed and all samples are about one video.
    """
    preparer = _Preparer(samples, processor, conditions, num_workers, sampling)
    return prepare_ahead(preparer.prepare, range(len(samples)) if indices is None else indices, num_workers, ahead)


def encode_turns(
    processor: Video2LoraProcessor, frames: VideoFrames, prompts: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The internalization turn of a video and its turns with each of `prompts`, the pixels processed only once.

    Equal to `processor.encode_video` one by one: the base's image or video processor is called with the same frames
    and options each time and sees no text, so what it returned the first time is what it would return again.

    Args:
        processor: not in use elsewhere meanwhile.
        frames: of the video.
        prompts: put behind the video, with the generation prompt behind them.

    Returns:
        The internalization turn, and the others by prompt; all hold the same tensors of pixels.
    """
    with _remember_pixels(processor.vlm_processor) as pixels:
        first = processor.encode_video(frames)
        turns = {prompt: processor.encode_video(frames, prompt, add_generation_prompt=True) for prompt in prompts}
    shared = {name: first[name] for name in pixels & first.keys()}
    return first, {prompt: turn | shared for prompt, turn in turns.items()}


@contextmanager
def _remember_pixels(vlm_processor: Any) -> Iterator[set[str]]:
    """Let a base's processor process the pixels of one video only once; gives the names of what it made of them."""
    names: set[str] = set()
    parts = ("image_processor", "video_processor")
    originals = {
        part: getattr(vlm_processor, part) for part in parts if getattr(vlm_processor, part, None) is not None
    }
    try:
        for part, original in originals.items():
            setattr(vlm_processor, part, _Remembering(original, names))
        yield names
    finally:
        for part, original in originals.items():
            setattr(vlm_processor, part, original)


class _Remembering:
    """An image or video processor that returns what it returned before, as long as its options are the same."""

    def __init__(self, original: Any, names: set[str]) -> None:
        self._original, self._names = original, names
        self._options: str | None = None
        self._output: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        options = repr(kwargs)
        if self._options != options:
            self._options, self._output = options, self._original(*args, **kwargs)
            self._names.update(self._output)
        return copy.copy(self._output)  # its keys may be added to


class _Preparer:
    """Prepares samples in any thread."""

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Video2LoraProcessor,
        conditions: Sequence[Condition],
        num_workers: int,
        sampling: dict[str, Any],
    ) -> None:
        self.samples, self.conditions, self.sampling = samples, conditions, sampling
        self.needs_partner = any(condition.needs_partner for condition in conditions)
        self._pristine, self._lock, self._thread = copy.deepcopy(processor), threading.Lock(), threading.local()
        # a partner is read for its neighbour and for itself at about the same time
        self._loaded: OrderedDict[int, Future[PreparedSample | VideoError]] = OrderedDict()
        self._capacity = num_workers + 2 if self.needs_partner else 0

    @property
    def processor(self) -> Video2LoraProcessor:
        """This thread's own: tokenizers may not be entered by two at once."""
        if not hasattr(self._thread, "processor"):
            with self._lock:
                self._thread.processor = copy.deepcopy(self._pristine)
        return self._thread.processor

    def prepare(self, index: int) -> PreparedSample | VideoError:
        """A sample with its partner, or the error of a video."""
        prepared = self._load_shared(index)
        if isinstance(prepared, VideoError) or not self.needs_partner:
            return prepared
        partner = self._find_partner(index, prepared)
        return partner if isinstance(partner, VideoError) else replace(prepared, partner=partner)

    def _find_partner(self, index: int, own: PreparedSample) -> PreparedSample | VideoError:
        unread = False
        for step in range(1, len(self.samples)):
            other = (index + step) % len(self.samples)
            if self.samples[other].same_video(own.sample):
                continue
            partner = self._load_shared(other)
            if isinstance(partner, VideoError):
                unread = True
            elif partner.frames.sha256 is None or partner.frames.sha256 != own.frames.sha256:
                return partner
        if not unread:
            raise ValueError(
                f"every sample is about the video of {own.sample.id}, so there is no other video's adapter: leave "
                "other_adapter out, or take more samples."
            )
        return VideoError(f"{own.sample.id} can be read, but no other video, which other_adapter needs.")

    def _load_shared(self, index: int) -> PreparedSample | VideoError:
        """Read a video, once where two threads want it at about the same time."""
        if not self._capacity:
            return self._load(index)
        with self._lock:
            future = self._loaded.get(index)
            mine = future is None
            if future is None:
                future = self._loaded[index] = Future()
            self._loaded.move_to_end(index)
            while len(self._loaded) > self._capacity:
                self._loaded.popitem(last=False)
        if mine:
            try:
                future.set_result(self._load(index))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _load(self, index: int) -> PreparedSample | VideoError:
        try:
            return prepare_sample(self.samples[index], self.processor, self.conditions, **self.sampling)
        except VideoError as error:
            return error


def _read(
    sample: Sample, sampling: dict[str, Any], longest_edge: int | None, counts: Sequence[int]
) -> tuple[VideoFrames, dict[int, list[VideoFrames]]]:
    """Frames of a sample's span, and of its segments by their number."""
    if isinstance(sample.video, VideoFrames):
        if counts:
            raise ValueError(f"{sample.id}: its frames are sampled already, so they cannot be cut into segments.")
        return sample.video, {}
    with VideoReader(sample.video, longest_edge=longest_edge) as reader:
        whole = reader.sample(**sampling, start=sample.start, end=sample.end)
        segments: dict[int, list[VideoFrames]] = {}
        for count in counts:
            edges: list[float | None] = np.linspace(whole.start, whole.end, count + 1).tolist()
            edges[-1] = sample.end  # where nothing tells how long the last frame is shown, None includes it
            spans = zip(edges, edges[1:], strict=False)
            segments[count] = [reader.sample(**sampling, start=a, end=b) for a, b in spans]
        return whole, segments


def _check_prompts(sample: Sample, processor: Video2LoraProcessor, prompts: Sequence[str]) -> None:
    names = (getattr(processor.vlm_processor, kind, None) for kind in ("image_token", "video_token"))
    marks = sorted({*PLACEHOLDERS, *(name for name in names if name)})
    for prompt in prompts:
        found = [mark for mark in marks if mark in prompt]
        if found:
            raise ValueError(f"{sample.id} has {found[0]} in a prompt, but the video has its own place: take it out.")
