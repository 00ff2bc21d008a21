"""Evaluation: ordinary LoRA fine-tuning on the one video, from zero and from the generated adapter."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..modeling import LoraWeights, Video2LoraModel, Video2LoraProcessor
from ..modeling.processor import IGNORE_INDEX
from .condition import Decoding, PreparedSample, expected_lengths
from .condition_adapter import Internalizing
from .condition_video import VideoInContext
from .samples import Answer, Sample

PROMPTS = (
    "Describe this video in detail.",
    "Summarize this video in 1-3 sentences.",
    "Describe the sequence of events in this video.",
    "What is happening in this video?",
    "Who or what can be seen in this video, and what do they look like?",
    "Where does this video take place?",
    "What actions take place in this video, and in what order?",
    "What do the beginning, the middle and the end of this video show?",
)
STEPS, LEARNING_RATE, MAX_GRADIENT_NORM = 100, 2e-4, 1.0


class FineTunedCondition(VideoInContext, Internalizing):
    """LoRA trained on what the base, with the video in its context, says about it; then asked without the video.

    Rank, modules and layers are those of a generated adapter, the multiplier is 1 (the generated one's is folded into
    its factors). AdamW without weight decay, gradients clipped to norm 1, all texts in every step, the recipe's loss.
    The base's answers, the adapter to start from and the steps are `prepare_seconds`; `Answer.extra` is
    `{"losses": [of each step]}` as JSON. Each sample is trained by itself, so nothing depends on its batch.

    Args:
        steps: gradient steps; 0 asks the adapter that training would start from.
        learning_rate: of AdamW, constant.
        prompts: what the base answers about the video for training.
        max_new_tokens: of each of those answers.
        seed: of the random factors, with the sample's id.

    Raises:
        ValueError: a number makes no sense, or there are no prompts or others than texts.
    """

    def __init__(
        self,
        model: Video2LoraModel,
        processor: Video2LoraProcessor,
        steps: int = STEPS,
        learning_rate: float = LEARNING_RATE,
        prompts: Sequence[str] = PROMPTS,
        max_new_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(model, processor)
        texts = not isinstance(prompts, str) and bool(prompts) and all(isinstance(prompt, str) for prompt in prompts)
        if steps < 0 or not learning_rate > 0 or max_new_tokens < 1 or not texts:
            raise ValueError(
                f"steps={steps}, learning_rate={learning_rate}, max_new_tokens={max_new_tokens}, prompts={prompts!r}: "
                "expected steps of 0 or more, a positive rate, at least one token and a list of prompts (texts)."
            )
        self.steps, self.learning_rate, self.prompts = steps, learning_rate, tuple(prompts)
        self.max_new_tokens, self.seed = max_new_tokens, seed
        if steps != STEPS:
            self.name = f"{type(self).name}_{steps}_steps"

    def settings(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "prompts": list(self.prompts),
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }

    def prompts_with_video(self, sample: Sample) -> Sequence[str]:
        return self.prompts if self.steps else ()

    def answer(self, batch: Sequence[PreparedSample], decoding: Decoding) -> list[list[Answer]]:
        adapters, seconds, extras = [], [], []
        for prepared in batch:
            start = self.now()
            adapter, losses = self.fine_tune(prepared, decoding)
            adapters.append(adapter)
            seconds.append(self.now() - start)
            extras.append(json.dumps({"losses": losses}))
        prompts = [prepared.prompts for prepared in batch]
        replies = self.reply_to_text(prompts, decoding, adapters, expected_lengths(batch))
        return self.make_answers(replies, [prepared.num_frames for prepared in batch], seconds, extras)

    def fine_tune(self, prepared: PreparedSample, decoding: Decoding) -> tuple[LoraWeights, list[float]]:
        """An adapter trained on one video, and the loss before each step."""
        adapter = self.start_from(prepared).to(self.vlm.device, torch.float32).fold()
        if not self.steps:
            return adapter, []
        texts = self._own_answers(prepared, decoding)
        with torch.inference_mode(False), torch.enable_grad():
            return self._train(adapter, texts)

    @abstractmethod
    def start_from(self, prepared: PreparedSample) -> LoraWeights:
        """The adapter before the first step, a batch of one."""

    def _own_answers(self, prepared: PreparedSample, decoding: Decoding) -> dict[str, Tensor]:
        """What the base says about the video, behind the prompts without it; only its own tokens are labelled."""
        replies, _ = self.reply_with_video([prepared], [self.prompts], self.max_new_tokens, decoding.batch_size)
        turns = []
        for prompt, reply in zip(self.prompts, replies[0], strict=True):
            # the very tokens it generated: an answer cut off at the limit teaches no end of turn
            ids = self.processor(text=[prompt])["input_ids"][0].tolist()
            turns.append((ids + reply.token_ids, [IGNORE_INDEX] * len(ids) + reply.token_ids))
        return {name: value.to(self.vlm.device) for name, value in self.processor.pad_turns(turns).items()}

    def _train(self, adapter: LoraWeights, texts: dict[str, Tensor]) -> tuple[LoraWeights, list[float]]:
        lora_A, lora_B = (
            {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
            for tensors in (adapter.lora_A, adapter.lora_B)
        )
        trained = replace(adapter, lora_A=lora_A, lora_B=lora_B)
        parameters = [*lora_A.values(), *lora_B.values()]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        losses = []
        for _ in range(self.steps):
            loss = self.model(**texts, adapters=trained).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            losses.append(loss.detach())
        return trained.detach(), torch.stack(losses).tolist()


class LoraFromZeroCondition(FineTunedCondition):
    """Fine-tuning from a LoRA that changes nothing: A as PEFT draws it, by seed and sample, and B zero."""

    name = "lora_from_zero"

    def start_from(self, prepared: PreparedSample) -> LoraWeights:
        hypernetwork, targets = self.model.hypernetwork, self.model.targets
        rank, layers = hypernetwork.rank * (1 + hypernetwork.use_static_lora), len(targets.layer_indices)
        digest = hashlib.sha256(f"{self.seed} {prepared.sample.id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        lora_A, lora_B = {}, {}
        for name in targets.module_names:
            d_in, d_out = targets.in_features[name], targets.out_features[name]
            uniform = torch.rand(1, layers, rank, d_in, generator=generator)
            lora_A[name] = (2 * uniform - 1) / d_in**0.5
            lora_B[name] = torch.zeros(1, layers, rank, d_out)
        return LoraWeights(lora_A, lora_B, 1.0, (rank,))


class LoraFromAdapterCondition(FineTunedCondition):
    """Fine-tuning from the generated adapter: what a few gradient steps add to it."""

    name = "lora_from_adapter"

    def start_from(self, prepared: PreparedSample) -> LoraWeights:
        return self.internalize([[prepared.internalization]], batch_size=1)[0][0]
