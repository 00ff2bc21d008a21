"""Trainer: the frozen base that sees the video, asked query by query: its answers and its logits at their tokens."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import DatasetError
from ..data.forms import PLACEHOLDERS
from ..modeling.processor import IGNORE_INDEX, Video2LoraProcessor
from ..modeling.streaming import keep_rope_deltas
from ..video import VideoError
from .teacher_logits import NAMES, top_k_targets

if TYPE_CHECKING:
    from datasets import Dataset

_FORMAT = 1
_PROMPT_RULE = "the chat template's user turn of the video and the prompt behind it, then the generation prompt"


@dataclass
class TeacherQuery:
    """A query with the video in its context, ready for the model."""

    row: int
    number: int
    prompt: str
    response: str | None
    inputs: dict[str, Tensor]


class Teacher:
    """Prepares rows, in any thread, and answers their queries, in one."""

    def __init__(
        self,
        vlm: PreTrainedModel,
        processor: Video2LoraProcessor,
        rows: Dataset,
        max_new_tokens: int,
        batch_size: int,
        top_k: int | None,
        overwrite_responses: bool,
        base_revision: str | None = None,
    ) -> None:
        self.vlm, self.processor, self.rows = vlm, processor, rows
        self.base_revision = base_revision
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.top_k, self.overwrite_responses = top_k, overwrite_responses
        self._visual = {
            name for kind in ("image_token", "video_token") if (name := getattr(processor.vlm_processor, kind, None))
        }
        added = getattr(processor.tokenizer, "added_tokens_decoder", {}).values()
        self._special = sorted(self._visual | {token.content for token in added if token.special})
        self._pristine, self._lock, self._thread = copy.deepcopy(processor), threading.Lock(), threading.local()
        eos = vlm.generation_config.eos_token_id
        self._ends = processor.end_token_ids if eos is None else {eos} if isinstance(eos, int) else set(eos)
        self._check_rows()

    def wanted(self, queries: Sequence[Mapping[str, Any]]) -> list[int]:
        """Numbers of the queries of a row that need the model."""
        every = self.overwrite_responses or self.top_k is not None
        return [number for number, query in enumerate(queries) if every or query["response"] is None]

    def settings(self) -> dict[str, Any]:
        """What decides the result."""
        names = ["id", "start", "end", "queries"]
        located = getattr(self.rows.features["video"], "dtype", None) == "string"
        digest = hashlib.sha256()
        for row in self.rows.select_columns(names + ["video"] * located):  # of videos in the rows the ids tell enough
            if located and "://" not in row["video"]:
                row["video"] = os.path.abspath(row["video"])
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        template = json.dumps(self.processor.chat_template)
        generation = self.vlm.generation_config.to_diff_dict()
        settings = {
            "format": _FORMAT,
            "base": self.vlm.name_or_path or None,
            "base_revision": self.base_revision,
            "dtype": str(self.vlm.dtype).removeprefix("torch."),
            "device": self.vlm.device.type,
            "attn_implementation": self.vlm.config._attn_implementation,
            "generation_config": {k: v for k, v in generation.items() if k != "transformers_version"},
            "decoding": "greedy",
            "prompt_rule": _PROMPT_RULE,
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "prompt_timestamps": self.processor.prompt_timestamps,
            "num_frames": self.processor.num_frames,
            "longest_edge": self.processor.longest_edge,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "top_k": self.top_k,
            "overwrite_responses": self.overwrite_responses,
            "num_rows": len(self.rows),
            "rows_sha256": digest.hexdigest(),
        }
        return json.loads(json.dumps(settings, default=str))  # as they will be read again

    def prepare(self, index: int) -> list[TeacherQuery] | VideoError:
        """Decode a row's video and put it before each of its queries; an error of the video is returned."""
        if not hasattr(self._thread, "processor"):
            with self._lock:  # tokenizers may not be entered twice at once: each thread gets its own
                self._thread.processor = copy.deepcopy(self._pristine)
        processor: Video2LoraProcessor = self._thread.processor
        row = self.rows[index]
        try:
            frames = processor.load_video(row["video"], start=row["start"], end=row["end"])
        except VideoError as error:
            return error
        queries: list[TeacherQuery] = []
        for number in self.wanted(row["queries"]):
            query = row["queries"][number]
            inputs = processor.encode_video(frames, query["prompt"], add_generation_prompt=True)
            if queries:  # the same pixels need not be held twice
                first = queries[0].inputs
                inputs = {k: first[k] if torch.equal(v, first[k]) else v for k, v in inputs.items()}
            response = None if self.overwrite_responses else query["response"]
            queries.append(TeacherQuery(index, number, query["prompt"], response, inputs))
        return queries

    @torch.no_grad()
    def answer(
        self, queries: Sequence[TeacherQuery]
    ) -> tuple[dict[int, list[dict[str, Any]]], dict[str, Tensor] | None]:
        """Answers by row, and the targets of all their tokens one after the other, to which `tokens` points."""
        answers: dict[int, list[dict[str, Any]]] = {}
        targets: list[dict[str, Tensor]] = []
        position = 0
        for begin in range(0, len(queries), self.batch_size):
            batch = queries[begin : begin + self.batch_size]
            unanswered = [query for query in batch if query.response is None]
            generated = self.generate([query.inputs for query in unanswered]) if unanswered else []
            results = {id(query): self.read(query, ids) for query, ids in zip(unanswered, generated, strict=True)}
            found = self.targets(batch) if self.top_k is not None else [None] * len(batch)
            for query, target in zip(batch, found, strict=True):
                answer = {"query": query.number, "result": results.get(id(query), {})}
                if target is not None:
                    targets.append(target)
                    answer["tokens"] = [position, position + len(target["labels"])]
                    position += len(target["labels"])
                answers.setdefault(query.row, []).append(answer)
        joined = {name: torch.cat([target[name] for target in targets]) for name in NAMES} if targets else None
        return answers, joined

    def generate(self, items: Sequence[Mapping[str, Tensor]]) -> list[list[int]]:
        """Token ids the base answers with, the end of turn included where it came to it."""
        inputs = self._to_vlm(self.processor.pad(items, left=True))
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": self.max_new_tokens}
        generate: Any = self.vlm.generate
        with keep_rope_deltas(self.vlm):
            output = generate(
                **inputs, **options, eos_token_id=sorted(self._ends), pad_token_id=self.processor.pad_token_id
            )
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        ends = [next((i + 1 for i, token in enumerate(row) if token in self._ends), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    def read(self, query: TeacherQuery, token_ids: list[int]) -> dict[str, Any]:
        """Set a query's response from the tokens generated, and return what the manifest says of it."""
        truncated = not token_ids or token_ids[-1] not in self._ends
        text = self.processor.decode(token_ids, skip_special_tokens=True)
        # the limit may fall in the middle of a character
        query.response = self._clean(text.rstrip("\ufffd") if truncated else text)
        _, labels = self.processor.encode_turn(query.prompt, query.response)
        trained = [token for token in labels if token != IGNORE_INDEX]
        retokenized = trained[: len(trained) - truncated] != token_ids
        facts = {"token_ids": token_ids, "truncated": truncated, "retokenized": retokenized}
        return {"response": query.response, **facts}

    def targets(self, queries: Sequence[TeacherQuery]) -> list[dict[str, Tensor]]:
        """What is stored of the base's logits at each query's labels."""
        assert self.top_k is not None
        logits, labels = self.label_logits(queries)
        found = zip(logits.split([len(tokens) for tokens in labels]), labels, strict=True)
        return [top_k_targets(rows, tokens, self.top_k) for rows, tokens in found]

    def label_logits(self, queries: Sequence[TeacherQuery]) -> tuple[Tensor, list[Tensor]]:
        """Logits `[labelled tokens, vocabulary]` of the base that sees the video, and each query's labels."""
        turns = [self._append_response(query) for query in queries]
        inputs = self._to_vlm(self.processor.pad([inputs for inputs, _ in turns]))
        lengths = [inputs["input_ids"].shape[1] for inputs, _ in turns]
        labels = [tokens for _, tokens in turns]
        places = [torch.arange(n - len(tokens) - 1, n - 1) for n, tokens in zip(lengths, labels, strict=True)]
        batch = torch.repeat_interleave(torch.arange(len(turns)), torch.tensor([len(tokens) for tokens in labels]))

        def select(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            # before the head, whose output some bases scale or cap: no logits over the video's tokens
            return (args[0][batch.to(args[0].device), torch.cat(places).to(args[0].device)][None],)

        handle = self.vlm.get_output_embeddings().register_forward_pre_hook(select)
        try:
            with keep_rope_deltas(self.vlm):
                logits = self.vlm(**inputs, use_cache=False).logits[0]
        finally:
            handle.remove()
        return logits, labels

    def _append_response(self, query: TeacherQuery) -> tuple[dict[str, Tensor], Tensor]:
        """A query's inputs with the tokens of its response, as training has them, behind; and those tokens."""
        assert query.response is not None
        inputs = self.processor.append_response(query.inputs, query.prompt, query.response)
        labels = inputs.pop("labels")
        return inputs, labels[labels != IGNORE_INDEX]

    def _to_vlm(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors on the base's device; pixels in its dtype, but not a number for each video."""
        return {
            name: value.to(self.vlm.device, self.vlm.dtype if value.is_floating_point() and value.dim() > 1 else None)
            for name, value in inputs.items()
        }

    def _clean(self, text: str) -> str:
        """Text without anything that spells a special token, which training would read as one."""
        while True:
            cleaned = text
            for token in self._special:
                cleaned = cleaned.replace(token, "")
            if cleaned == text:
                return text.strip()
            text = cleaned

    def _check_rows(self) -> None:
        """Refuse, before anything is decoded, what would fail in the middle."""
        marks = sorted({*PLACEHOLDERS, *self._visual})
        seen: set[str] = set()
        for row in self.rows.select_columns(["id", "queries"]):
            if self.top_k is not None and row["id"] in seen:
                raise DatasetError(f"two rows have the id {row['id']!r}, which finds their logits: give each its own.")
            seen.add(row["id"])
            for query in (row["queries"][number] for number in self.wanted(row["queries"])):
                given = None if self.overwrite_responses else query["response"]
                found = [mark for mark in marks if mark in query["prompt"] or mark in (given or "")]
                if found:
                    raise DatasetError(
                        f"row {row['id']!r} has {found[0]} in a text, but the video has its own place: take it out."
                    )
