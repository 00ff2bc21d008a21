"""Tiny models of every family with adapters that do something, and samples about files and frames in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from video2lora.evaluation.conditions import CONDITIONS, Decoding, PreparedSample, prepare_samples
from video2lora.evaluation.samples import Answer, Question, Sample
from video2lora.modeling import Video2LoraModel, Video2LoraProcessor
from video2lora.testing import tiny_clip, tiny_idefics3, tiny_qwen2_5_vl, tiny_smolvlm

from ..modeling.helpers import SMALL, awaken

FAMILIES = {"smolvlm": tiny_smolvlm, "idefics3": tiny_idefics3, "qwen2_5_vl": tiny_qwen2_5_vl}
DECODING = Decoding(max_new_tokens=6, batch_size=3)


class Setup(NamedTuple):
    """A model and its processor; never change them."""

    family: str
    model: Video2LoraModel
    processor: Video2LoraProcessor


@lru_cache
def setup_of(family: str) -> Setup:
    vlm, vlm_processor = FAMILIES[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Video2LoraModel.from_vlm(vlm, **SMALL).eval()
    awaken(model.hypernetwork)
    return Setup(family, model, Video2LoraProcessor(vlm_processor, num_frames=4, longest_edge=64))


def ask(name: str, *prompts: str) -> tuple[Question, ...]:
    return tuple(Question(f"{name}-{number}", prompt, ("yes",)) for number, prompt in enumerate(prompts))


def make_samples(folder: Path) -> list[Sample]:
    """Four samples about three videos, one of them in memory, of different lengths."""
    first = tiny_clip(folder / "first.mp4", seconds=4, fps=4, seed=1)
    second = tiny_clip(folder / "second.mp4", seconds=2, fps=1, seed=2)
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    return [
        Sample("s0", str(first), ask("s0", "What moves?", "Describe the scene in some detail.")),
        Sample("s1", str(first), ask("s1", "Internalize"), start=1.0, end=3.0),
        Sample("s2", frames, ask("s2", "Ünïcode — 字?", "What moves?", "And then?")),
        Sample("s3", second, ask("s3", "Which colour?")),
    ]


def prepare(setup: Setup, samples: Sequence[Sample], *conditions: Any, **options: Any) -> list[PreparedSample]:
    prepared = list(prepare_samples(samples, setup.processor, conditions, 0, **options))
    assert all(isinstance(item, PreparedSample) for item in prepared), prepared
    return prepared  # type: ignore[return-value]


def answer(
    setup: Setup, samples: Sequence[Sample], name: str, decoding: Decoding = DECODING, **options: Any
) -> list[list[Answer]]:
    """All samples' answers, as one batch."""
    condition = CONDITIONS[name](setup.model, setup.processor, **options)
    return condition.answer(prepare(setup, samples, condition), decoding)


def token_ids(
    setup: Setup, samples: Sequence[Sample], name: str, decoding: Decoding = DECODING
) -> list[list[tuple[str, int, int]]]:
    """The very tokens of all answers, which noise as text would not tell apart, and those of their contexts."""
    condition = CONDITIONS[name](setup.model, setup.processor)
    condition.read = lambda ids: (str(ids), False)  # type: ignore[method-assign]
    answers = condition.answer(prepare(setup, samples, condition), decoding)
    return [[(a.text, a.context_tokens, a.visual_tokens) for a in several] for several in answers]


def by_itself(setup: Setup, inputs: dict[str, Any], max_new_tokens: int = 6, **options: Any) -> str:
    """What the model says to one prompt, by plain generation."""
    with torch.no_grad():
        output = setup.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **options)
    ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    ended = bool(ids) and ids[-1] == setup.processor.tokenizer.eos_token_id
    text = setup.processor.decode(ids, skip_special_tokens=True)
    return (text if ended else text.rstrip("\ufffd")).strip()


def texts(answers: Sequence[Sequence[Answer]]) -> list[list[str]]:
    return [[item.text for item in several] for several in answers]


def facts(answers: Sequence[Sequence[Answer]]) -> list[list[tuple[Any, ...]]]:
    """All of the answers but the times."""
    return [
        [(a.text, a.num_tokens, a.ended, a.context_tokens, a.visual_tokens, a.num_frames) for a in several]
        for several in answers
    ]
