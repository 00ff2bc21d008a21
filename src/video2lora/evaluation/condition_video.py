"""Evaluation: the video in the context, to be asked directly or captioned first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..modeling import Video2LoraModel, Video2LoraProcessor
from ..modeling.vision import are_frames, embed_frames
from .condition import (
    Condition,
    Decoding,
    PreparedSample,
    Reply,
    batches_of,
    expected_lengths,
    lengths_of,
    longest_first,
)
from .prepare import encode_turns
from .samples import Answer, Sample

CAPTION_PROMPT = "Describe this video in detail."
CAPTION_TEMPLATE = "A description of a video: {caption}\n\n{prompt}"


class VideoInContext(Condition):
    """A condition that puts videos into the base's context."""

    def to_vlm(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs on the base's device, pixels in its dtype; frames stay where they are until they are read."""
        frames, moved = are_frames(inputs.get("pixel_values")), {}
        for name, value in inputs.items():
            if not (frames and name.startswith("pixel_")):
                # a number for each video (Qwen's seconds per grid step) must not be rounded to the base's dtype
                pixels = value.is_floating_point() and value.dim() > 1
                value = value.to(self.vlm.device, self.vlm.dtype if pixels else None)
            moved[name] = value
        return moved

    def turns(self, prepared: PreparedSample, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """The video with each of `prompts` behind it and the generation prompt."""
        missing = [prompt for prompt in prompts if prompt not in prepared.turns]
        made = encode_turns(self.processor, prepared.frames, missing)[1] if missing else {}
        return [made[prompt] if prompt in made else prepared.turns[prompt] for prompt in prompts]

    @torch.no_grad()
    def embed_videos(self, batch: Sequence[PreparedSample]) -> tuple[list[Tensor | None], float]:
        """Visual tokens `[visual tokens, hidden_size]` of each video, and seconds in all.

        None for a base that takes pixels with each prompt, whose grid it needs for positions (Qwen2.5-VL).
        """
        turns = [prepared.internalization for prepared in batch]
        if not all(are_frames(turn.get("pixel_values")) for turn in turns):
            return [None] * len(batch), 0.0
        start, features = self.now(), list[Tensor | None]()
        alike = len({turn["pixel_values"].shape[2:] for turn in turns}) == 1  # else padding would change pixels
        for part in batches_of([turn["input_ids"].shape[1] for turn in turns], len(turns) if alike else 1):
            inputs = self.to_vlm(self.processor.pad(turns[part], pack_frames=True))
            embedded = embed_frames(self.vlm, inputs)
            if "inputs_embeds" not in embedded:
                return [None] * len(batch), 0.0
            visual = inputs["input_ids"] == self.vlm.config.image_token_id
            features += embedded["inputs_embeds"][visual].split(visual.sum(1).tolist())
        return features, self.now() - start

    def join(self, turns: Sequence[Mapping[str, Tensor]], features: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """One batch, padded on the left, of turns and their videos' visual tokens."""
        visual_tokens = [tokens for tokens in features if tokens is not None]
        if not visual_tokens:
            return self.to_vlm(self.processor.pad(turns, left=True))
        texts = [{name: value for name, value in turn.items() if not name.startswith("pixel_")} for turn in turns]
        inputs = self.to_vlm(self.processor.pad(texts, left=True))
        visual = inputs["input_ids"] == self.vlm.config.image_token_id
        joined = torch.cat(visual_tokens)
        if int(visual.sum()) != len(joined):
            raise ValueError(f"{int(visual.sum())} visual tokens in the prompts do not fit the videos' {len(joined)}.")
        embeddings = self.vlm.get_input_embeddings()(inputs["input_ids"])
        return inputs | {"inputs_embeds": embeddings.masked_scatter(visual[..., None], joined.to(embeddings))}

    @torch.no_grad()
    def reply_with_video(
        self,
        batch: Sequence[PreparedSample],
        prompts: Sequence[Sequence[str]],
        max_new_tokens: int,
        batch_size: int,
        expected: Sequence[Sequence[float]] | None = None,
    ) -> tuple[list[list[Reply]], list[float]]:
        """Answer each sample's prompts with its video in the context; `expected` as in `reply_to_text`.

        Returns:
            Replies by sample, and each video's share of the vision tower's seconds (0 where it runs with each prompt).
        """
        turns = [self.turns(item, several) for item, several in zip(batch, prompts, strict=True)]
        lengths = [[turn["input_ids"].shape[1] for turn in several] for several in turns]
        flat = longest_first(prompts, expected, lengths)
        replies: dict[tuple[int, int], Reply] = {}
        features: dict[int, Tensor | None] = {}
        seconds_of = [0.0] * len(batch)
        tokens = [lengths[place][number] for place, number in flat]
        for part in batches_of(tokens, batch_size, lengths_of(flat, expected), self.tokens_at_once):
            rows, waiting = sorted(flat[part]), {place for place, _ in flat[part.start :]}
            features = {place: found for place, found in features.items() if place in waiting}
            new = [place for place in dict.fromkeys(place for place, _ in rows) if place not in features]
            embedded, seconds = self.embed_videos([batch[place] for place in new])
            features |= dict(zip(new, embedded, strict=True))
            seconds_of = [seconds / len(new) if place in new else s for place, s in enumerate(seconds_of)]
            start = self.now()
            own = [turns[place][number] for place, number in rows]
            inputs = self.join(own, [features[place] for place, _ in rows])
            joining = self.now() - start
            generated, seconds = self.generate(inputs, max_new_tokens)
            share = (joining + seconds) / len(generated)
            for row, turn, token_ids in zip(rows, own, generated, strict=True):
                ids = turn["input_ids"]
                replies[row] = Reply(token_ids, ids.shape[1], self.processor.count_visual_tokens(ids), share)
        answered = [[replies[place, n] for n in range(len(several))] for place, several in enumerate(prompts)]
        return answered, seconds_of


class VideoCondition(VideoInContext):
    """The video in the context before every question: what adapters are to replace.

    The vision tower runs once a video where the base allows, and is then what was done once for the video.
    """

    name = "video"

    def prompts_with_video(self, sample: Sample) -> Sequence[str]:
        return [question.prompt for question in sample.questions]

    def answer(self, batch: Sequence[PreparedSample], decoding: Decoding) -> list[list[Answer]]:
        prompts = [prepared.prompts for prepared in batch]
        replies, seconds = self.reply_with_video(
            batch, prompts, decoding.max_new_tokens, decoding.batch_size, expected_lengths(batch)
        )
        return self.make_answers(replies, [prepared.num_frames for prepared in batch], seconds)


class CaptionCondition(VideoInContext):
    """The base's own caption of the video as text before the question; `Answer.extra` holds the caption.

    Args:
        prompt: what the base is asked for with the video in its context.
        max_new_tokens: of the caption.
    """

    name = "caption"

    def __init__(
        self,
        model: Video2LoraModel,
        processor: Video2LoraProcessor,
        prompt: str = CAPTION_PROMPT,
        max_new_tokens: int = 256,
    ) -> None:
        super().__init__(model, processor)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}, but a caption needs at least one token.")
        self.prompt, self.max_new_tokens = prompt, max_new_tokens

    def settings(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "max_new_tokens": self.max_new_tokens, "template": CAPTION_TEMPLATE}

    def prompts_with_video(self, sample: Sample) -> Sequence[str]:
        return [self.prompt]

    def answer(self, batch: Sequence[PreparedSample], decoding: Decoding) -> list[list[Answer]]:
        asked = [[self.prompt]] * len(batch)
        captioned, towers = self.reply_with_video(batch, asked, self.max_new_tokens, decoding.batch_size)
        seconds = [several[0].seconds + tower for several, tower in zip(captioned, towers, strict=True)]
        captions = [self._plain(self.read(several[0].token_ids)[0]) for several in captioned]
        prompts = [
            [CAPTION_TEMPLATE.format(caption=caption, prompt=prompt) for prompt in prepared.prompts]
            for caption, prepared in zip(captions, batch, strict=True)
        ]
        replies = self.reply_to_text(prompts, decoding, expected=expected_lengths(batch))
        return self.make_answers(replies, [prepared.num_frames for prepared in batch], seconds, captions)

    def _plain(self, caption: str) -> str:
        """A caption without anything that spells a special token, which a prompt would read as one."""
        for token in self.processor.tokenizer.get_added_vocab():
            caption = caption.replace(token, "")
        return caption.strip()
