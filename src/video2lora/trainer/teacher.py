"""Trainer: targets from the frozen base that sees the video: its answers and, for KL, its top-k logits."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import DatasetError, load_rows
from ..data.rows import COLUMNS
from ..modeling.processor import Video2LoraProcessor
from ..video import VideoError
from ..video.ahead import prepare_ahead
from .teacher_files import TeachFolder, TeachSummary
from .teacher_logits import TeacherLogits
from .teacher_queries import Teacher

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TeachSummary", "TeacherLogits", "distributed_state", "teach"]

logger = logging.getLogger(__name__)


def teach(
    vlm: PreTrainedModel,
    processor: Video2LoraProcessor,
    rows: Any,
    output_dir: str | os.PathLike[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    top_k: int | None = None,
    num_workers: int = 4,
    overwrite_responses: bool = False,
    max_bad_fraction: float = 0.05,
    base_revision: str | None = None,
) -> TeachSummary:
    """Let the base, with the video in its context, answer every query without a response, greedily.

    `output_dir` gets `manifest.jsonl`, rows that `load_rows` reads, in their order (a generated query also has the
    `token_ids` the base generated, whether they were `truncated` at `max_new_tokens`, and whether the text is
    `retokenized` to others in training); `skipped.jsonl`, rows whose video cannot be read, with the `error`;
    `teach.json`, what made it; and with `top_k` what [`TeacherLogits`] reads, for every query.

    Training tokenises the text of a response, so the logits are those of a second pass over the very tokens of
    `processor.encode_turn`, end of turn included, with the video before them. Text is stripped of white space at its
    ends, and of anything that would be tokenised as a special token.

    Called again on the same folder it goes on where it was stopped, even by kill -9, and the manifest is byte for byte
    that of a run never stopped. For this, which queries share a batch depends on the rows and `batch_size` alone, not
    on what is done already or on how many processes there are: in another batch rounding could turn a near tie. The
    same hardware and library versions are needed too. Rows that were skipped are tried again by a run that goes on.

    Launched with accelerate or torchrun, processes take units of about `batch_size` queries in turn, wait for each
    other only before the first and after the last, and the main one merges what they wrote. One launch a folder.

    Args:
        vlm: the frozen base, on the device to use. Its generation config counts, but nothing is sampled.
        processor: made from the base's: `Video2LoraProcessor(AutoProcessor.from_pretrained(name))`; its `num_frames`,
            `longest_edge` and `prompt_timestamps` count.
        rows: what `load_rows` returned, or anything it takes; not streaming, since their order must be known.
        output_dir: made if missing; of several machines, on a disk they share.
        max_new_tokens: of an answer.
        batch_size: queries answered together, in each process.
        top_k: also keep so many of the largest logits for each response token, of given responses too.
        num_workers: threads that decode ahead of the model. A video is decoded once for all its queries.
        overwrite_responses: answer also queries that have a response.
        max_bad_fraction: stop when more than this part of the rows to be read cannot be.
        base_revision: commit hash of the base, to be written down; a model does not know its own.

    Returns:
        What lies in the folder, in every process.

    Raises:
        DatasetError: too many bad videos, another run's folder, streaming rows, placeholders in a prompt, or, with
            `top_k`, the same id in two rows.
        ValueError: a number makes no sense.
    """
    vocab_size = vlm.get_output_embeddings().weight.shape[0]
    _check_numbers(max_new_tokens, batch_size, top_k, num_workers, max_bad_fraction, vocab_size)
    rows = _as_dataset(rows)
    teacher = Teacher(
        vlm.eval(), processor, rows, max_new_tokens, batch_size, top_k, overwrite_responses, base_revision
    )
    units = plan_units([len(teacher.wanted(row["queries"])) for row in rows.select_columns("queries")], batch_size)
    state = distributed_state(vlm.device.type == "cpu")
    folder = TeachFolder(Path(output_dir), teacher.settings(), state.process_index)
    if folder.finished:
        if state.is_main_process:
            folder.drop_parts()
        return folder.summary()
    done = folder.open(state.num_processes)
    state.wait_for_everyone()  # nobody counts bad videos of an earlier run
    limit = max_bad_fraction * sum(map(len, units))
    try:
        own = [(number, units[number]) for number in range(state.process_index, len(units), state.num_processes)]
        _work(teacher, folder, own, done, num_workers, limit, show=state.is_main_process)
    finally:
        folder.close()
    state.wait_for_everyone()
    if (bad := folder.count_bad(0)) > limit:
        raise DatasetError(
            f"{bad} of {sum(map(len, units))} videos cannot be read, more than max_bad_fraction={max_bad_fraction:g}, "
            f"such as that of {folder.first_error(rows)} Correct or remove them (`check_rows` lists them all) and "
            "start again: what is done is kept."
        )
    if state.is_main_process:
        folder.merge(rows, len(units), top_k, vocab_size)
    state.wait_for_everyone()  # so that every process finds the manifest
    return folder.summary()


def distributed_state(cpu: bool) -> PartialState:
    """This process's place among those of the launch; one may wait long for another at the end of the work."""
    return PartialState(cpu=cpu, timeout=timedelta(days=7))


def plan_units(wanted: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut rows into units of work: consecutive rows with up to `batch_size` queries together, or one row with more.

    Args:
        wanted: number of queries each row wants answered; rows with none are in no unit.
        batch_size: queries.
    """
    units: list[list[int]] = []
    size = 0
    for row, count in enumerate(wanted):
        if not count:
            continue
        if not units or size + count > batch_size:
            units.append([])
            size = 0
        units[-1].append(row)
        size += count
    return units


def _work(
    teacher: Teacher,
    folder: TeachFolder,
    units: Sequence[tuple[int, list[int]]],
    done: Mapping[int, Mapping[str, Any]],
    num_workers: int,
    limit: float,
    show: bool,
) -> None:
    """Do this process's units that are not done, and look again for the videos that were skipped in those that are."""
    todo = [(number, rows, done.get(number)) for number, rows in units]
    todo = [(number, rows, record) for number, rows, record in todo if record is None or record["skipped"]]
    tried = [rows if record is None else [int(row) for row in record["skipped"]] for _, rows, record in todo]
    # while the model is at one batch, the next is made ready
    ahead = num_workers + max(map(len, tried), default=0)
    prepared = prepare_ahead(teacher.prepare, (row for rows in tried for row in rows), num_workers, ahead)
    total, left = sum(len(rows) for _, rows in units), sum(map(len, tried))
    hide = None if show else True  # None: unless stderr is a terminal
    with closing(prepared), tqdm(desc="Teaching", unit="row", total=total, initial=total - left, disable=hide) as bar:
        for (number, rows, record), first in zip(todo, tried, strict=True):
            if folder.count_bad(0) > limit:
                break  # of other processes, too: all come to the end
            items = list(islice(prepared, len(first)))
            if record is not None and not all(isinstance(item, VideoError) for item in items):
                items = [teacher.prepare(row) for row in rows]
                record = {"attempt": record["attempt"] + 1}
            elif record is not None:
                folder.count_bad(len(items))
                bar.update(len(items))
                continue
            bad = {row: str(item) for row, item in zip(rows, items, strict=True) if isinstance(item, VideoError)}
            for row, error in bad.items():
                logger.warning("row %s is skipped: %s", teacher.rows[row]["id"], error)
            queries = [query for item in items if not isinstance(item, VideoError) for query in item]
            answers, targets = teacher.answer(queries)
            attempt = 0 if record is None else record["attempt"]
            folder.append({"unit": number, "attempt": attempt, "rows": answers, "skipped": bad}, targets)
            folder.count_bad(len(bad))
            bar.update(len(first))


def _as_dataset(rows: Any) -> Dataset:
    from datasets import Dataset

    if not isinstance(rows, Dataset) or set(COLUMNS) - set(rows.column_names):
        rows = load_rows(rows)
    if not isinstance(rows, Dataset):
        raise DatasetError(
            f"teach has to know the order of all rows, but this is {type(rows).__name__}: write them to a JSONL file, "
            "or load them without streaming."
        )
    return rows


def _check_numbers(
    max_new_tokens: int, batch_size: int, top_k: int | None, num_workers: int, max_bad_fraction: float, vocab_size: int
) -> None:
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 1),
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must be from 1 to the {vocab_size} tokens of the vocabulary, got {top_k}.")
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction must be from 0 to 1, got {max_bad_fraction}.")
