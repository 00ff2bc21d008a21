"""Pipelines: `pipeline("video-to-lora")`, from a video in any form to a VideoAdapter."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from threading import Lock
from typing import Any, cast

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import Pipeline

from ..adapters import AdapterProvenance, Segment, VideoAdapter, VideoAdapterStore
from ..modeling import LoraWeights, Video2LoraModel, Video2LoraProcessor
from ..video import VideoFrames, VideoReader, VideoSpanError
from ..video.ahead import one_ahead, prepare_ahead
from ..video.frames import is_frames
from .chunks import Chunk, cut
from .inputs import check_sampled, checked_videos, content_of, is_one_video, name_of, one_by_one, span_of
from .live import grow, stream
from .options import SAMPLING, check_store, checked_sampling, first_given, whole_number

logger = logging.getLogger(__name__)


class VideoToLoraPipeline(Pipeline):
    """Turn videos into LoRA adapters.

    ```python
    from transformers import pipeline
    import video2lora

    internalize = pipeline("video-to-lora", model="user/repo")
    adapter = internalize("clip.mp4", num_frames=12)
    adapter.save_pretrained("clip-lora")
    ```
    """

    model: Video2LoraModel
    processor: Video2LoraProcessor
    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False
    _pipeline_calls_generate = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, Video2LoraModel):  # transformers loads any model that AutoModel knows
            raise ValueError(
                f"{self.model.name_or_path or 'the model'} is a {type(self.model).__name__}, not a Video2LoraModel: "
                "give a checkpoint with a hypernetwork, or start one for it with Video2LoraModel.from_vlm(name)."
            )
        self._one_at_a_time = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_one_at_a_time"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._one_at_a_time = Lock()  # one cannot be copied, nor sent to another process

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown = set(parameters) - set(SAMPLING)
        if unknown:
            raise TypeError(f"unknown arguments {sorted(unknown)}; a video-to-lora pipeline takes {list(SAMPLING)}.")
        return {k: v for k, v in parameters.items() if v is not None}, {}, {}

    def __call__(  # type: ignore[override]
        self,
        videos: Any,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        longest_edge: int | None = None,
        chunk_seconds: float | None = None,
        max_rank: int | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        store: VideoAdapterStore | None = None,
    ) -> VideoAdapter | list[VideoAdapter] | Iterator[VideoAdapter]:
        """Turn one video, or many, into adapters.

        Args:
            videos: a path, URL, bytes, file object, frames in memory (a list of images, an array or tensor
                `[frames, height, width, 3]`, or [`VideoFrames`], which are taken as they are), or a row
                `{"video": ..., "start": ..., "end": ...}`; or a list of these; or a generator or dataset of them,
                which gives an iterator that reads as it is read.
            num_frames: frames sampled uniformly from each video or chunk; the model's setting by default.
            fps: frames a second instead of `num_frames`.
            start, end: span in seconds of the file's time; a row's own go first.
            longest_edge: pixels to which frames are shrunk.
            chunk_seconds: cut the span into equal chunks of at most this length, each read by itself with
                `num_frames` frames, and composed into one adapter of rank `(chunks + 1) * rank`. One in which no frame
                comes up is left out, its time goes to the segment before. Chunks are decoded, read and let go one
                after the other, so a long video needs no more memory than a short one, but for twice its adapter's.
            max_rank: with `chunk_seconds`, keep the adapter to this rank, the static part's included, as it grows;
                the chunks share it by what they have to say ([`VideoAdapter.truncate`] with `keep_segments`).
            batch_size: videos, or chunks of one, internalized together.
            num_workers: threads that decode ahead while the model works (chunks: always one).
            store: where adapters made before of the same bytes, in the same way, are found, and new ones are kept.

        Returns:
            A [`VideoAdapter`], or a list or iterator of them.

        Raises:
            VideoError: a video cannot be read, or not be sampled as asked. (One of which a part does not decode is
                read as far as it does, with a warning in the log; see `Segment.num_decode_errors`.)
            ValueError: another number makes no sense.
            TypeError: `videos` is nothing a video comes as, nor a list, generator or dataset; or `store` is none.
        """
        options = {"num_frames": num_frames, "fps": fps, "start": start, "end": end, "longest_edge": longest_edge}
        options |= {"chunk_seconds": chunk_seconds, "max_rank": max_rank}
        one = is_one_video(videos)
        if not one and not isinstance(videos, (Iterable, Dataset)):
            raise TypeError(
                "expected a video (path, URL, bytes, file object, frames in memory), or a list, generator or dataset "
                f"of videos; got {type(videos).__name__}."
            )
        preprocess = self._with_defaults(options, name_of(videos) if one else "every video")
        self._check_room(preprocess.get("max_rank"))
        batch_size = whole_number("batch_size", first_given(batch_size, self._batch_size, 1), at_least=1)
        num_workers = whole_number("num_workers", first_given(num_workers, self._num_workers, 0), at_least=0)
        check_store(store)
        asked = [name for name, value in options.items() if value is not None]
        if one:
            check_sampled(videos, asked)
            return warn_of_damage(self._one(videos, store, batch_size, preprocess))
        each: Any = checked_videos(videos, asked)
        if isinstance(videos, (list, tuple)):
            each = list(each)
        if store is not None:
            adapters = self._through_store(each, store, num_workers, batch_size, preprocess)
        else:
            adapters = self.get_iterator(each, num_workers, batch_size, preprocess, {}, {})
        adapters = map(warn_of_damage, adapters)
        return list(_with_bar(adapters, videos)) if isinstance(videos, (list, tuple)) else adapters

    stream = stream

    def _one(
        self, video: Any, store: VideoAdapterStore | None, batch_size: int, preprocess: dict[str, Any]
    ) -> VideoAdapter:
        if store is not None:
            return next(self._through_store([video], store, 0, batch_size, preprocess))
        if "chunk_seconds" in preprocess:
            return self._internalize_chunks(video, batch_size, **preprocess)
        return self.run_single(video, preprocess, {}, {})[0]

    def _through_store(
        self, videos: Any, store: VideoAdapterStore, num_workers: int, batch_size: int, preprocess: dict[str, Any]
    ) -> Iterator[VideoAdapter]:
        """Adapters of many videos, lazily: those in the store, and the others made and put there."""
        remaining = one_by_one(videos)
        while window := list(islice(remaining, max(batch_size, num_workers, 1))):
            keys = [self._key_of(video, preprocess) for video in window]
            found = {key: store.get(key) for key in keys}
            missing = {key: video for key, video in zip(keys, window, strict=True) if found[key] is None}
            made = self.get_iterator(list(missing.values()), num_workers, batch_size, preprocess, {}, {})
            for key, adapter in zip(missing, made, strict=True):
                if self._is_of(missing[key], adapter, key, preprocess):
                    store.put(key, adapter)
                found[key] = adapter
            for key, video in zip(keys, window, strict=True):  # equal bytes may go by other names
                yield renamed(cast(VideoAdapter, found[key]), name_of(video))

    def store_key(self, video: Any, **sampling: Any) -> str:
        """The key of a video's adapter in a [`VideoAdapterStore`]: everything that decides the adapter.

        That is the video's bytes (or frames and times), the sampling, the prompt, and base and hypernetwork with their
        revisions, or hashes of their weights where they have none. Versions of libraries are not in it.

        Args:
            video, sampling: as in a call: `num_frames`, `fps`, `start`, `end`, `longest_edge`, `chunk_seconds`,
                `max_rank`.

        Raises:
            VideoError: the video cannot be read, or not be sampled so.
        """
        check_sampled(video, [name for name, value in sampling.items() if value is not None])
        return self._key_of(video, self._with_defaults(sampling, name_of(video)))

    def _key_of(self, video: Any, sampling: dict[str, Any]) -> str:
        video, sampling = span_of(video, sampling)
        return self._key(content_of(video), sampling)

    def _with_defaults(self, asked: Mapping[str, Any], source: str = "every video") -> dict[str, Any]:
        """Options of a call: those asked for, and the pipeline's own; `num_frames` and `fps` replace each other."""
        given = {name: value for name, value in asked.items() if value is not None}
        own = {name: value for name, value in self._preprocess_params.items() if value is not None}
        if given.keys() & {"num_frames", "fps"}:
            own = {name: value for name, value in own.items() if name not in ("num_frames", "fps")}
        return checked_sampling(own | given, source)

    def _check_room(self, max_rank: int | None) -> None:
        """Raise `VideoSpanError` for a bound that leaves no rank for what a video says."""
        if max_rank is not None and max_rank <= self.static_rank:
            raise VideoSpanError(
                f"max_rank={max_rank} leaves no rank for a segment: the static part alone has {self.static_rank}."
            )

    def recipe(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides an adapter but the video, as JSON values.

        Args:
            asked: options of a call.

        Returns:
            `sampling`, with all defaults filled in; the prompt, how the base's processor prepares pictures, and what
            identifies base and hypernetwork.
        """
        processor = self.processor
        sampling = self._with_defaults(asked)
        if "num_frames" not in sampling and "fps" not in sampling:
            sampling["num_frames"] = processor.num_frames
        sampling.setdefault("longest_edge", processor.longest_edge)
        return {
            "sampling": {name: value for name, value in sampling.items() if value is not None},
            "prompt": processor.internalization_prompt,
            "prompt_timestamps": processor.prompt_timestamps,
            "processor_sha256": _hash_of_processor(processor.vlm_processor),
            "dtype": str(self.model.dtype),
            **self.model.base_identity(),
            **self.model.hypernetwork_identity(),
        }

    def _key(self, content: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
        facts = self.recipe(asked)
        if "frames" in content:  # they are sampled already
            facts["sampling"] = {name: value for name, value in facts["sampling"].items() if name == "max_rank"}
        return VideoAdapterStore.key(facts | {"video": content})

    def _is_of(self, video: Any, adapter: VideoAdapter, key: str, asked: Mapping[str, Any]) -> bool:
        """Whether an adapter is of the bytes that its key was made of: a file may be written to in between."""
        video, sampling = span_of(video, dict(asked))
        if isinstance(video, VideoFrames) or is_frames(video):
            return True
        if self._key({"sha256": adapter.segments[0].sha256}, sampling) == key:
            return True
        logger.warning("%s changed while it was read; its adapter is not stored.", adapter.segments[0].source)
        return False

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[VideoAdapter]:
        """Adapters of many videos, lazily; the parent's loader cannot batch what is not a dict of tensors."""
        videos = one_by_one(inputs)
        if "chunk_seconds" in preprocess_params:
            yield from (self._internalize_chunks(video, batch_size, **preprocess_params) for video in videos)
            return
        prepared = prepare_ahead(lambda video: self.preprocess(video, **preprocess_params), videos, num_workers)
        while batch := list(islice(prepared, batch_size)):
            yield from self.postprocess(self.forward(_join(batch), **forward_params), **postprocess_params)

    def _internalize_chunks(
        self,
        video: Any,
        batch_size: int,
        max_rank: int | None = None,
        guard: Callable[[Iterator[Any]], Iterator[Any]] = iter,
        **sampling: Any,
    ) -> VideoAdapter:
        """One adapter from the chunks of a video, of which only a few are in memory at a time.

        `guard` sees what becomes of the file, and so its errors, apart from the model's.
        """
        video, sampling = span_of(video, sampling)
        most = None if max_rank is None else max_rank - self.static_rank
        chunks = self._segments(video, max_chunks=most, **sampling)
        prepared = one_ahead(guard(_until(self._prepare(frames), until) for frames, until in chunks))
        parts, segments = [], []
        adapter: VideoAdapter | None = None
        while batch := list(islice(prepared, batch_size)):
            outputs = self.forward(_join(batch))
            if max_rank is not None:
                adapter = grow(adapter, self.postprocess(outputs), max_rank)
                continue
            parts.append(outputs["generated"])
            segments += outputs["segments"]
        if adapter is None:
            (adapter,) = self._adapters(parts, [segments])
        return adapter

    @property
    def static_rank(self) -> int:
        """Ranks of the hypernetwork's static part, which every adapter has."""
        return self.model.hypernetwork.rank if self.model.hypernetwork.use_static_lora else 0

    def preprocess(self, video: Any, **sampling: Any) -> dict[str, list[Any]]:  # type: ignore[override]
        """Decode a video and prepare it for the model."""
        video, sampling = span_of(video, sampling)
        frames, _ = next(self._segments(video, **sampling))
        return self._prepare(frames)

    def _prepare(self, frames: VideoFrames) -> dict[str, list[Any]]:
        with self._one_at_a_time:  # tokenizers may not be entered twice at once
            features = self.processor(frames)
        return {"inputs": [dict(features)], "segments": [self._describe(frames, features["input_ids"])]}

    def _segments(
        self,
        video: Any,
        chunk_seconds: float | None = None,
        longest_edge: int | None = None,
        max_chunks: int | None = None,
        **sampling: Any,
    ) -> Iterator[tuple[VideoFrames, float | None]]:
        """The frames of a video, or of each of its chunks one after the other, from one opened file; and until when,
        in seconds, nothing else comes (`Chunk.until`)."""
        if isinstance(video, VideoFrames):
            yield video, None
            return
        if "num_frames" not in sampling and "fps" not in sampling:
            sampling["num_frames"] = self.processor.num_frames
        with VideoReader(video, longest_edge=longest_edge or self.processor.longest_edge) as reader:
            chunks = [Chunk(sampling)] if chunk_seconds is None else cut(reader, chunk_seconds, sampling)
            if max_chunks is not None and len(chunks) > max_chunks:
                raise VideoSpanError(
                    f"{reader.name}: {len(chunks)} chunks, but max_rank={max_chunks + self.static_rank} has room for "
                    f"{max(max_chunks, 0)} beside the static part's {self.static_rank}. Raise one or the other."
                )
            for chunk in chunks:
                yield reader.sample(**chunk.sampling), chunk.until

    def _describe(self, frames: VideoFrames, input_ids: torch.Tensor) -> Segment:
        return Segment(
            source=frames.source,
            sha256=frames.sha256,
            start=frames.start,
            end=frames.end,
            timestamps=frames.timestamps,
            num_decode_errors=frames.num_decode_errors,
            num_visual_tokens=self.processor.count_visual_tokens(input_ids),
            prompt=self.processor.internalization_prompt,
        )

    def _forward(self, model_inputs: dict[str, list[Any]], **_: Any) -> dict[str, Any]:  # type: ignore[override]
        """The generated part of the adapters of a batch of segments."""
        generated = self.model.generate_segments(**self.processor.pad(model_inputs["inputs"]))
        return {"generated": generated.to("cpu"), "segments": model_inputs["segments"]}

    def postprocess(self, model_outputs: dict[str, Any], **_: Any) -> list[VideoAdapter]:
        """An adapter of each segment."""
        return self._adapters([model_outputs["generated"]], [[segment] for segment in model_outputs["segments"]])

    @torch.no_grad()
    def _adapters(self, parts: list[LoraWeights], segments: list[list[Segment]]) -> list[VideoAdapter]:
        """Adapters with their provenance, each of consecutive generated segments; `parts` is emptied.

        Of an hour the parts are as large as its adapter: none is kept longer than it is needed.
        """
        hypernetwork, config = self.model.hypernetwork, self.model.config
        weights = hypernetwork.combine(parts, [len(several) for several in segments])
        parts.clear()
        origin: dict[str, Any] = {
            "base_model": config.base_model_name_or_path,
            "base_revision": config.base_model_revision,
            "hypernetwork": self.model.name_or_path or None,
            **self.model.hypernetwork_identity(),
        }
        return [
            VideoAdapter.from_weights(
                adapter.to("cpu"),
                vlm=self.model.vlm,
                targets=self.model.targets,
                provenance=AdapterProvenance(segments=tuple(several), **origin),
                copy=len(segments) > 1,
            )
            for adapter, several in zip(weights, segments, strict=True)
        ]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model and processor; `kwargs` as for [`Video2LoraModel.save_pretrained`] (`bundle_base=True`).

        The parent would copy this library's source into the folder and make loading ask for `trust_remote_code`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def count_decode_errors(segments: Sequence[Segment]) -> int:
    """Packets and frames of one video that did not decode."""
    counts = [segment.num_decode_errors for segment in segments]
    # what the whole file lacks, such as an end that was cut off, is counted in every chunk
    return sum(counts) - (len(counts) - 1) * min(counts, default=0)


def warn_of_damage(adapter: VideoAdapter) -> VideoAdapter:
    """The same adapter, of one video; log it if that is damaged."""
    count = count_decode_errors(adapter.segments)
    if count:
        name = adapter.segments[0].source or "the video"
        logger.warning("%s: %d packets or frames do not decode; the rest was used", name, count)
    return adapter


def renamed(adapter: VideoAdapter, source: str) -> VideoAdapter:
    """The same adapter, of one video, under the name that this goes by now."""
    segments = tuple(replace(segment, source=source) for segment in adapter.segments)
    return replace(adapter, provenance=replace(adapter.provenance, segments=segments))


# What a base's processor may do to pictures; not all of its settings, whose names differ between versions.
_PICTURES: tuple[str, ...] = ("size", "max_image_size", "min_pixels", "max_pixels", "patch_size")
_PICTURES += ("temporal_patch_size", "merge_size")
_PICTURES += ("image_mean", "image_std", "rescale_factor", "resample", "do_resize", "do_rescale", "do_normalize")
_PICTURES += ("do_image_splitting", "crop_size", "do_center_crop", "image_seq_len")


def _hash_of_processor(vlm_processor: Any) -> str:
    """SHA-256 of the chat template and of what is done to pictures."""
    settings: dict[str, Any] = {"chat_template": getattr(vlm_processor, "chat_template", None)}
    for name in ("image_processor", "video_processor"):
        part = getattr(vlm_processor, name, None)
        values = {} if part is None else part.to_dict()
        settings[name] = {key: values[key] for key in _PICTURES if values.get(key) is not None}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _with_bar(adapters: Iterator[VideoAdapter], videos: Sequence[Any]) -> Iterable[VideoAdapter]:
    """A progress bar where there is something to wait for and somebody to see it."""
    show = len(videos) > 1 and sys.stderr.isatty()
    return tqdm(adapters, total=len(videos), desc="internalizing", unit="video", disable=not show)


def _join(items: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Preprocessed videos as one batch."""
    return {name: [part for item in items for part in item[name]] for name in items[0]}


def _until(item: dict[str, list[Any]], until: float | None) -> dict[str, list[Any]]:
    """A prepared chunk whose segment goes on until nothing else comes."""
    if until is None:
        return item
    return item | {"segments": [replace(segment, end=until) for segment in item["segments"]]}
