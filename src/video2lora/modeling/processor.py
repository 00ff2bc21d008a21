"""Modeling: Video2LoraProcessor, from videos and questions to the tensors the model takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.video_utils import VideoMetadata

from .configuration import INTERNALIZATION_PROMPT, Video2LoraConfig
from .vision import are_frames

if TYPE_CHECKING:
    from video2lora.video import VideoFrames

VLM_PROCESSOR_FOLDER = "vlm_processor"
SETTINGS = ("num_frames", "longest_edge", "internalization_prompt", "prompt_timestamps")
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
IGNORE_INDEX = -100
PIXELS = ("pixel_values", "pixel_attention_mask")


class Video2LoraProcessor(ProcessorMixin):
    """Prepares videos for [`Video2LoraModel.internalize`] and text for `forward` and `generate`.

    Wraps the base's own processor, whose prompts and pixels it does not change; sampling and the true timestamps of
    frames are ours. A base without video input (Idefics3) gets the frames as unsplit images, each behind its time.

    Args:
        vlm_processor: the base's processor.
        num_frames, longest_edge, internalization_prompt, prompt_timestamps: as in [`Video2LoraConfig`].
    """

    def __init__(
        self,
        vlm_processor: ProcessorMixin | None = None,
        num_frames: int = 12,
        longest_edge: int | None = 384,
        internalization_prompt: str = INTERNALIZATION_PROMPT,
        prompt_timestamps: str = "span",
    ) -> None:
        if vlm_processor is None:
            raise ValueError("expected the base model's processor: AutoProcessor.from_pretrained(base).")
        self.vlm_processor = vlm_processor
        self.num_frames, self.longest_edge = num_frames, longest_edge
        self.internalization_prompt, self.prompt_timestamps = internalization_prompt, prompt_timestamps
        self.chat_template = getattr(vlm_processor, "chat_template", None)

    @property
    def tokenizer(self) -> Any:
        return getattr(self.vlm_processor, "tokenizer", self.vlm_processor)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return []  # the base's processor is saved whole in a folder of its own

    @classmethod
    def from_config(cls, config: Video2LoraConfig, vlm_processor: ProcessorMixin | None = None, **kwargs: Any) -> Any:
        """The processor of a model: the base's, with the model's sampling settings.

        Args:
            config: the model's configuration.
            vlm_processor: the base's processor; loaded from the pinned base if left out.
            kwargs: `token`, `cache_dir`, `local_files_only` of that loading.

        Raises:
            OSError: the base's processor cannot be had.
        """
        if vlm_processor is None:
            name = config.base_model_name_or_path
            if name is None:
                raise OSError("the configuration names no base model: pass its processor as `vlm_processor=`.")
            revision = None if os.path.isdir(name) else config.base_model_revision
            arguments = {"trust_remote_code": False} | kwargs
            vlm_processor = AutoProcessor.from_pretrained(name, revision=revision, **arguments)
        return cls(vlm_processor, **{name: getattr(config, name) for name in SETTINGS})

    # --- videos ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        videos: Any = None,
        text: str | Sequence[str] | None = None,
        responses: Sequence[str] | str | None = None,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        longest_edge: int | None = None,
    ) -> BatchFeature:
        """Prepare videos, text queries, or both.

        Args:
            videos: one video or a list of them: anything [`load_video`] takes, or the [`VideoFrames`] it returned.
            text: one text query or a list.
            responses: the answers to `text`, for training: adds `labels`.
            num_frames, fps, start, end, longest_edge: how to sample `videos` (frames, frames a second, seconds,
                seconds, pixels); by default the settings of this processor.

        Returns:
            For videos, what [`Video2LoraModel.internalize`] takes: `input_ids` and `attention_mask` `[videos, tokens]`
            padded on the right, pixels as the base wants them. For text, `input_ids` and `attention_mask`
            `[queries, tokens]`, padded on the left with the generation prompt, or, with `responses`, on the right
            with `labels`. For both, the text's tensors and the videos' under `video_inputs`.

        Raises:
            VideoError: a video cannot be read or sampled.
            ValueError: neither videos nor text, or an empty list.
        """
        if videos is None and text is None:
            raise ValueError("expected `videos`, `text` or both, got neither.")
        features = BatchFeature()
        if text is not None:
            features.update(self._encode_text(text, responses))
        if videos is not None:
            sampling: dict[str, Any] = {"num_frames": num_frames, "fps": fps, "start": start, "end": end}
            frames = [self.load_video(video, **sampling, longest_edge=longest_edge) for video in _as_list(videos)]
            if not frames:
                raise ValueError("expected at least one video, got an empty list.")
            video_inputs = self.pad([self.encode_video(item) for item in frames])
            features.update({"video_inputs": video_inputs} if text is not None else video_inputs)
        return features

    def load_video(
        self,
        video: Any,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        longest_edge: int | None = None,
    ) -> VideoFrames:
        """Sample the frames of a video with this processor's settings where nothing else is asked for.

        See [`video2lora.video.load_video`]; [`VideoFrames`] pass through.

        Raises:
            VideoError: the video cannot be read or sampled so; or frames that are sampled already are to be sampled
                in another way.
        """
        from video2lora.video import VideoError, VideoFrames, load_video

        if isinstance(video, VideoFrames):
            asked = {"num_frames": num_frames, "fps": fps, "start": start, "end": end, "longest_edge": longest_edge}
            if given := [name for name, value in asked.items() if value is not None]:
                raise VideoError(
                    f"{video.source}: these frames are sampled already, so {', '.join(given)} cannot be applied: pass "
                    "the file, or the array of frames, or ask for nothing."
                )
            return video
        if num_frames is None and fps is None:
            num_frames = self.num_frames
        longest_edge = self.longest_edge if longest_edge is None else longest_edge
        return load_video(video, num_frames=num_frames, fps=fps, start=start, end=end, longest_edge=longest_edge)

    def encode_video(
        self,
        video: VideoFrames,
        prompt: str | None = None,
        add_generation_prompt: bool = False,
        image_splitting: bool = False,
    ) -> dict[str, Tensor]:
        """Render the turn `[video] + prompt` of one video through the base's processor.

        Args:
            video: sampled frames.
            prompt: text behind the video; the internalization prompt by default. With a question here and
                `add_generation_prompt` it is the video in context, as the base answers by itself.
            add_generation_prompt: end with the template's generation prompt.
            image_splitting: give the frames as pictures that the base's processor cuts into tiles where they are
                large, so that detail costs tokens; by default frames are what the base makes of a video (one tile),
                or unsplit pictures where it takes no video.

        Returns:
            `input_ids` and `attention_mask` `[1, tokens]`, and the pixels as the base wants them; join several with
            [`pad`].
        """
        relative = self.prompt_timestamps == "span"
        # the frame on display at the span's start may have come up a little before it
        times = [max(t - video.start, 0.0) if relative else t for t in video.timestamps]
        duration = video.end - video.start if relative or video.duration is None else video.duration
        text = self.internalization_prompt if prompt is None else prompt
        if getattr(self.vlm_processor, "video_processor", None) is not None and not image_splitting:
            content = [{"type": "video", "video": torch.from_numpy(video.frames).permute(0, 3, 1, 2)}]
            content.append({"type": "text", "text": text})
            arguments: dict[str, Any] = {"video_metadata": [_metadata(times, duration)], "do_sample_frames": False}
        else:
            content = []
            for time, frame in zip(times, video.frames, strict=True):
                stamp = f"\nFrame from {int(time // 60):02d}:{int(time % 60):02d}:"
                content += [{"type": "text", "text": stamp}, {"type": "image", "image": frame}]
            content.append({"type": "text", "text": "\n\n" + text})
            arguments = {"do_image_splitting": image_splitting}
        messages: list[Any] = [{"role": "user", "content": content}]
        features: Any = self.vlm_processor.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=arguments,
        )
        inputs = {name: torch.as_tensor(value) for name, value in features.items() if name != "video_metadata"}
        if "pixel_attention_mask" in inputs:  # eight bytes a pixel otherwise, on their way from a loader's worker
            inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].bool()
        return inputs

    def pad(
        self, items: Sequence[Mapping[str, Tensor]], left: bool = False, pack_frames: bool = False
    ) -> BatchFeature:
        """Join videos prepared one by one into a batch (frames that are all zero are padding).

        Each is prepared by itself because the base's processor would write the padded frame count into every prompt.

        Args:
            items: what `processor(video)` or [`encode_video`] returned for each.
            left: pad tokens on the left, for generation; on the right otherwise.
            pack_frames: put the frames of all videos one behind the other, `[1, all frames, channels, height, width]`,
                instead of padding each video to the longest: less memory, and a fraction of the copying where lengths
                differ much. For [`Video2LoraModel`] (and the base's own `forward`); not for the base's `generate`,
                which repeats pixels row by row for beams and several sequences. Nothing changes where a base takes
                pixels in another form.
        """
        batch = BatchFeature()
        for name in items[0]:
            fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}.get(name, 0)
            tensors = [item[name] for item in items]
            packed = pack_frames and name in PIXELS and are_frames(items[0].get("pixel_values"))
            if packed:
                tensors = [tensor.flatten(0, 1) for tensor in tensors]
            shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
            # pixels have more dimensions than tokens; their padding always comes last
            joined = torch.cat([_pad_to(t, shape, fill, left and t.dim() == 2) for t in tensors])
            batch[name] = joined[None] if packed else joined
        return batch

    def count_visual_tokens(self, input_ids: Tensor) -> int:
        """How many of `input_ids` stand for pixels."""
        names = ("image_token_id", "video_token_id")
        ids = {getattr(self.vlm_processor, name, None) for name in names} - {None}
        return int(torch.isin(input_ids, torch.tensor(sorted(ids), device=input_ids.device)).sum())

    # --- text ------------------------------------------------------------------------------------------------------

    @property
    def pad_token_id(self) -> int:
        """A pad id inside the vocabulary."""
        pad_id = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad_id is None else pad_id)

    def _encode_text(self, text: str | Sequence[str], responses: Sequence[str] | str | None) -> dict[str, Tensor]:
        prompts = [text] if isinstance(text, str) else list(text)
        if not prompts:
            raise ValueError("expected at least one query, got an empty list.")
        if responses is None:
            rows = [self._tokenize(self.render(prompt)) for prompt in prompts]
            return _pad_rows(rows, None, self.pad_token_id, left=True)
        answers = [responses] if isinstance(responses, str) else list(responses)
        if len(answers) != len(prompts):
            raise ValueError(f"expected one response for each of {len(prompts)} queries, got {len(answers)}.")
        return self.pad_turns([self.encode_turn(*turn) for turn in zip(prompts, answers, strict=True)])

    def pad_turns(self, turns: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """Join turns of [`encode_turn`] into `input_ids`, `attention_mask`, `labels` `[turns, tokens]`."""
        return _pad_rows([ids for ids, _ in turns], [labels for _, labels in turns], self.pad_token_id, left=False)

    def render(self, prompt: str, response: str | None = None) -> str:
        """The chat template's text of a question, or of a whole turn with its answer."""
        messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        if response is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
        # without a processor's option transformers 5.17's SmolVLM warns at every call of options it adds itself
        return self.vlm_processor.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=response is None,
            processor_kwargs={"do_sample_frames": False},
        )

    def encode_turn(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Token ids and labels of a question and its answer, exactly as the chat template renders the whole turn.

        The labels start where the generation prompt ends (the template's own space before the answer included) and
        end with the end-of-turn token; what the template writes behind it has none.

        Raises:
            ValueError: the template does not begin a whole turn with the generation prompt.
        """
        head, whole = self.render(prompt), self.render(prompt, response)
        if not whole.startswith(head):
            raise ValueError(
                f"the chat template renders the turn {whole!r}, which does not begin with its prompt {head!r}."
            )
        ids, prompt_ids = self._tokenize(whole), self._tokenize(head)
        shared = next((i for i, (a, b) in enumerate(zip(ids, prompt_ids, strict=False)) if a != b), len(prompt_ids))
        end_token_ids = self.end_token_ids  # a look into the tokenizer each time
        end = next((i + 1 for i in reversed(range(shared, len(ids))) if ids[i] in end_token_ids), len(ids))
        return ids[:end], [IGNORE_INDEX] * shared + ids[shared:end]

    def append_response(self, inputs: Mapping[str, Tensor], prompt: str, response: str) -> dict[str, Tensor]:
        """Put an answer's very tokens, as [`encode_turn`] has them, behind a question with the video in its context.

        Args:
            inputs: what [`encode_video`] returned for `prompt` with the generation prompt.
            prompt, response: question and answer.

        Returns:
            The inputs of the whole turn, with `labels` `[1, tokens]`: the teacher of [`Video2LoraModel.forward`].

        Raises:
            ValueError: the template ends the prompt in another way with the video than without it.
        """
        ids, labels = self.encode_turn(prompt, response)
        start = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        tokens = torch.tensor([ids[start:]])
        # a tokenizer may merge the prompt's end with the answer's beginning: then that end is the answer's
        rendered = self._tokenize(self.render(prompt))
        length = inputs["input_ids"].shape[1]
        kept = length - (len(rendered) - start)
        if inputs["input_ids"][0, kept:].tolist() != rendered[start:]:
            raise ValueError(f"the prompt {prompt!r} is rendered to another end with the video than without it.")
        whole = dict(inputs)
        for name, value in inputs.items():
            if value.shape == (1, length):  # one number a token
                tail = tokens if name == "input_ids" else torch.full_like(tokens, int(name == "attention_mask"))
                whole[name] = torch.cat([value[:, :kept], tail.to(value.dtype)], dim=1)
        return whole | {"labels": torch.cat([torch.full((1, kept), IGNORE_INDEX), tokens], dim=1)}

    @property
    def end_token_ids(self) -> set[int]:
        """Tokens that end a turn: the tokenizer's end of sequence."""
        return {self.tokenizer.eos_token_id}

    def _tokenize(self, rendered: str) -> list[int]:
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        return self.vlm_processor.apply_chat_template(conversation, *args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return list(self.vlm_processor.model_input_names)

    # --- files -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return {"processor_class": type(self).__name__} | {name: getattr(self, name) for name in SETTINGS}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()}, {type(self.vlm_processor).__name__})"

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write `processor_config.json` and the base's processor into the folder `vlm_processor`.

        Args:
            save_directory: where to; made if it does not exist.
            push_to_hub: also push to the Hub; `repo_id=`, `token=` in `kwargs`.
        """
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        written = list(self.vlm_processor.save_pretrained(target / VLM_PROCESSOR_FOLDER) or [])
        part = target / "processor_config.json.part"
        self.to_json_file(part)
        os.replace(part, target / "processor_config.json")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", None) or target.name, **kwargs)
        return [*written, str(target / "processor_config.json")]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Any:
        """Load a processor saved by [`save_pretrained`], or that of a model's base where only the model was saved.

        Args:
            pretrained_model_name_or_path: directory or Hub id.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, and settings to override
                (`num_frames=`, `longest_edge=`, `internalization_prompt=`, `prompt_timestamps=`).

        Raises:
            OSError: there is neither a processor nor a model configuration there, or the Hub cannot be reached.
        """
        for unused in ("_from_auto", "trust_remote_code", "_from_pipeline", "_commit_hash", "use_fast"):
            kwargs.pop(unused, None)
        overrides = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        settings, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if settings.get("processor_class") == cls.__name__:
            folder, hub = os.fspath(pretrained_model_name_or_path), {k: kwargs.pop(k) for k in HUB if k in kwargs}
            if not os.path.isdir(folder):
                # not with `subfolder=`: offline, AutoTokenizer would miss a config.json that was never there
                folder = snapshot_download(folder, allow_patterns=f"{VLM_PROCESSOR_FOLDER}/*", **hub)
            folder = os.path.join(folder, VLM_PROCESSOR_FOLDER)
            vlm_processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, **kwargs)
            return cls(vlm_processor, **{k: settings[k] for k in SETTINGS if k in settings} | overrides)
        config = Video2LoraConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs.pop("revision", None)
        processor = cls.from_config(config, **kwargs)
        for name, value in overrides.items():
            setattr(processor, name, value)
        return processor


def _metadata(times: list[float], duration: float) -> VideoMetadata:
    """Metadata at one frame a second whose frame indices are the seconds, so that any file's true times come out.

    `total_num_frames` is chosen so that `sampled_fps` (which Qwen2.5-VL turns into seconds per grid step) is the true
    rate of the sampled frames.
    """
    gap = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else max(duration, 1e-3)
    total = max(gap * len(times), 1e-3)
    return VideoMetadata(total_num_frames=total, fps=1.0, duration=duration, frames_indices=times)  # type: ignore[arg-type]


def _as_list(videos: Any) -> list[Any]:
    """A list of videos from one video or several; a list of frames is one video."""
    from video2lora.video import is_frame

    several = isinstance(videos, (list, tuple)) and not (videos and is_frame(videos[0]))
    return list(videos) if several else [videos]


def _pad_to(tensor: Tensor, shape: Sequence[int], fill: int, left: bool) -> Tensor:
    gaps = [size - have for size, have in zip(reversed(shape), reversed(tensor.shape[1:]), strict=True)]
    widths = [width for gap in gaps for width in ((gap, 0) if left else (0, gap))]
    return pad(tensor, widths, value=fill) if any(widths) else tensor


def _pad_rows(rows: list[list[int]], labels: list[list[int]] | None, pad_id: int, left: bool) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)

    def fill(values: list[list[int]], value: int) -> Tensor:
        gaps = [[value] * (width - len(row)) for row in values]
        return torch.tensor([gap + row if left else row + gap for gap, row in zip(gaps, values, strict=True)])

    batch = {"input_ids": fill(rows, pad_id), "attention_mask": fill([[1] * len(row) for row in rows], 0)}
    return batch | ({"labels": fill(labels, IGNORE_INDEX)} if labels is not None else {})
