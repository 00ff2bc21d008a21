"""Moving shapes, ablations: what the frozen base says with the clip in its context, and who is right."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ablate_data import (
    WHOLE,
    Clips,
    PreparedBatches,
    Turn,
    batch_file,
    embed,
    in_context,
    lay_out,
    pack,
    teacher_inputs,
    write_tensors,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from video2lora import Video2LoraProcessor
from video2lora.modeling.processor import IGNORE_INDEX

ROWS_AT_ONCE = 512  # with a clip in their context
ANSWERS_AT_ONCE = 4096  # generated together
FILES_AT_ONCE = 64
MAX_NEW_TOKENS = 96


class Scores:
    """Questions right and asked, by task."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}

    def add(self, tasks: Iterable[str], right: Iterable[bool]) -> None:
        for task, is_right in zip(tasks, right, strict=True):
            counts = self.counts.setdefault(task, [0, 0])
            counts[0] += is_right
            counts[1] += 1


def exact(label_logits: Tensor, labels: Tensor) -> list[bool]:
    """Which answers are right to the letter.

    Every token of the right answer is the likeliest after those before it: just then greedy generation gives it.

    Args:
        label_logits: `[labelled tokens, vocabulary]`, in row order.
        labels: `[queries, tokens]`, -100 where there is none.
    """
    wanted = labels != IGNORE_INDEX
    wrong = label_logits.argmax(-1) != labels[wanted]
    return (torch.bincount(wanted.nonzero()[:, 0], wrong.float(), minlength=len(labels)) == 0).tolist()


@torch.no_grad()
def right(vlm: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> list[bool]:
    """Which turns the base gets right by itself."""
    found: list[bool] = []
    for start in range(0, len(labels), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        wanted = labels[rows].to(vlm.device)
        part = {name: value[rows].to(vlm.device) for name, value in inputs.items()}
        found += exact(vlm(**part, use_cache=False).logits[:, :-1][wanted[:, 1:] != IGNORE_INDEX], wanted)
    return found


def right_in_context(vlm: Any, inputs: Mapping[str, Tensor]) -> list[bool]:
    """Which turns of `teacher_inputs` the base gets right with the clip in its context."""
    embedded = embed(vlm, inputs)
    labels = embedded.pop("labels")
    return right(vlm, embedded, labels)


def score_base(vlm: Any, data: PreparedBatches, batches: int) -> dict[str, dict[str, Any]]:
    """Accuracy of the base with the clip in its context, and with nothing but the question."""
    seen, guessed = Scores(), Scores()
    for number in range(batches):
        batch, tasks = data.validation(number, WHOLE)
        clips = Clips(batch_file(data.folder, "validation", number))
        seen.add(tasks, right_in_context(vlm, teacher_inputs(clips, data.image_token_id)))
        alone = {name: batch[name] for name in ("input_ids", "attention_mask")}
        guessed.add(tasks, right(vlm, alone, batch["labels"]))
    return {"video in context": {WHOLE: seen.counts}, "no adapter": {WHOLE: guessed.counts}}


class TeacherInputs(Dataset):
    """The base's inputs for the true answers of each prepared batch."""

    def __init__(self, folder: Path, image_token_id: int) -> None:
        self.folder, self.image_token_id = folder, image_token_id

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return teacher_inputs(Clips(batch_file(self.folder, "train", number)), self.image_token_id)


def prepare_answers(
    vlm: Any, processor: Video2LoraProcessor, folder: Path, steps: int, workers: int, until: float
) -> bool:
    """Write the base's own greedy answers to the questions of the batches that have none yet.

    Where it gets the true answer right, that is its answer; only the others are generated.

    Returns:
        Whether all are there.
    """
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(steps) if not batch_file(folder, "answers", i).exists()]
    loader = DataLoader(
        TeacherInputs(folder, vlm.config.image_token_id),
        sampler=missing,
        batch_size=None,
        num_workers=min(workers, len(missing)),
    )
    waiting: dict[int, list[bool]] = {}
    for number, inputs in zip(missing, loader, strict=True):
        waiting[number] = right_in_context(vlm, inputs)
        late = time.time() > until
        if len(waiting) == FILES_AT_ONCE or number == missing[-1] or late:
            write_answers(vlm, processor, folder, waiting)
            waiting = {}
        if late:
            return number == missing[-1]
    return True


def write_answers(vlm: Any, processor: Video2LoraProcessor, folder: Path, right: Mapping[int, list[bool]]) -> None:
    """Generate the answers that are not right, of several batches together, and write those of each."""
    answers: dict[int, list[Tensor | None]] = {}
    asked: list[tuple[int, int, Turn, tuple[Tensor, Tensor]]] = []
    for number, is_right in right.items():
        clips = Clips(batch_file(folder, "train", number))
        rows = in_context(clips, vlm.config.image_token_id)
        answers[number] = [turn.answer if good else None for (turn, *_), good in zip(rows, is_right, strict=True)]
        asked += [(number, i, turn, (ids, v)) for i, (turn, ids, v) in enumerate(rows) if not is_right[i]]
    asked.sort(key=lambda item: item[2].answer.shape[0])  # those that end together, together
    for start in range(0, len(asked), ANSWERS_AT_ONCE):
        part = asked[start : start + ANSWERS_AT_ONCE]
        generated = generate(vlm, processor, [row for *_, row in part])
        for (number, place, *_), answer in zip(part, generated, strict=True):
            answers[number][place] = answer
    for number, rows_of in answers.items():
        write_tensors(batch_file(folder, "answers", number), pack("answers", rows_of))


@torch.no_grad()
def generate(vlm: Any, processor: Video2LoraProcessor, rows: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The base's greedy answers to questions behind clips, with the token that ends them where they came to it."""
    inputs = embed(vlm, lay_out(rows, vlm.config.image_token_id, left=True))
    ends = processor.end_token_ids
    output = vlm.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=sorted(ends),
        pad_token_id=processor.pad_token_id,
    ).cpu()
    ended = torch.isin(output, torch.tensor(sorted(ends))).long()
    lengths = torch.where(ended.any(1), ended.argmax(1) + 1, output.shape[1]).tolist()
    return [row[:length] for row, length in zip(output, lengths, strict=True)]
