"""Trainer: what a run leaves for people: answers at every evaluation, a learning curve, and the model's card."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from ..data.files import write_atomically
from ..hub_cards import GENERATED, model_card
from ..video import VideoError
from .card import collect_facts, describe_checkpoint
from .curve import CURVE_FILE, draw_learning_curve

if TYPE_CHECKING:
    from .trainer import Video2LoraTrainer

logger = logging.get_logger(__name__)

SAMPLES_FOLDER = "samples"
COLUMNS = ("row", "question", "target", "answer")


def add_run_callbacks(trainer: Video2LoraTrainer, train_dataset: Any, eval_dataset: Any) -> ModelCardCallback:
    """Give a trainer the callbacks of this file.

    Args:
        trainer: the trainer.
        train_dataset, eval_dataset: the data as the user gave it: a path has a name, which rows in memory lack.

    Returns:
        The one that writes the card, which the trainer's `create_model_card` asks too.
    """
    card = ModelCardCallback(trainer, train_dataset, eval_dataset)
    for callback in (SamplesCallback(trainer), LearningCurveCallback(), card):  # the card shows the curve
        trainer.add_callback(callback)
    return card


class SamplesCallback(TrainerCallback):
    """At every evaluation, lets the model answer the first question of the first `num_eval_samples` rows.

    The answers, greedy, go to `samples/step-N.md` (`step-N-NAME.md` for one of several evaluation sets), as text to
    TensorBoard, W&B and trackio where they are on, and to a terminal. Only the main process works, and it exchanges
    nothing with the others meanwhile; random states are left as they are.
    """

    def __init__(self, trainer: Video2LoraTrainer) -> None:
        self.trainer = trainer
        self._rows: dict[str, list[Any]] = {}

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if not args.num_eval_samples or not state.is_world_process_zero or trainer.eval_dataset is None:
            return
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            logger.warning_once("no samples: the main process alone cannot run a model that is sharded over all.")
            return
        name = self._set_name(metrics or {})
        if name is None:
            return
        rows = self._first_rows(name, args.num_eval_samples)
        table = [
            (row["id"], row["queries"][0]["prompt"], row["queries"][0]["response"], answer)
            for row, answer in zip(rows, self.answers(rows), strict=True)
        ]
        text = markdown_table(COLUMNS, table)
        path = Path(args.output_dir) / SAMPLES_FOLDER / f"step-{state.global_step}{'-' * bool(name)}{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode("utf-8"))
        self._report(args, state, control, f"eval_{name}_samples" if name else "eval_samples", text)
        if sys.stderr.isatty():
            tqdm.write(f"\nstep {state.global_step}\n{text}", file=sys.stderr)

    def answers(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The model's answer to the first question of each row, or why its video cannot be read."""
        model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        device = self.trainer.args.device
        on_cpu = device.type == "cpu"
        was_training = model.training
        model.eval()
        try:
            with (
                torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type),
                torch.no_grad(),
                self.trainer.accelerator.autocast(),
            ):
                return [self._answer(model, row) for row in rows]
        finally:
            if was_training:
                model.train()

    def _answer(self, model: Any, row: Mapping[str, Any]) -> str:
        processor = self.trainer.processor
        try:
            frames = processor.load_video(row["video"], start=row.get("start"), end=row.get("end"))
        except VideoError as error:
            return f"(the video cannot be read: {error})"
        adapters = model.internalize(**processor(frames))
        question = processor(text=row["queries"][0]["prompt"]).to(model.vlm.device)
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1}
        output = model.generate(
            **question, adapters=adapters, max_new_tokens=self.trainer.args.eval_max_new_tokens, **options
        )
        return processor.decode(output[0, question["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def _set_name(self, metrics: Mapping[str, Any]) -> str | None:
        """Which of the evaluation sets was evaluated; empty if there is only one, `None` if none of them was."""
        if not isinstance(self.trainer.eval_dataset, dict):
            return ""
        return next((name for name in self.trainer.eval_dataset if f"eval_{name}_loss" in metrics), None)

    def _first_rows(self, name: str, count: int) -> list[Any]:
        if name not in self._rows:
            datasets: Any = self.trainer.eval_dataset
            dataset = datasets[name] if name else datasets
            if hasattr(dataset, "__len__"):  # of torch's map-style datasets not all can be iterated over
                self._rows[name] = [dataset[i] for i in range(min(count, len(dataset)))]
            else:
                self._rows[name] = list(islice(iter(dataset), count))
        return self._rows[name]

    def _report(self, args: Any, state: TrainerState, control: TrainerControl, name: str, text: str) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, (TensorBoardCallback, WandbCallback, TrackioCallback)):
                callback.on_log(args, state, control, model=self.trainer.model, logs={name: text})


class LearningCurveCallback(TrainerCallback):
    """Draws `learning_curve.png` in the output folder when training ends."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and find_spec("matplotlib") is None:  # now, when it still can be installed
            logger.warning(f"there will be no {CURVE_FILE}: it needs matplotlib (pip install 'video2lora[train]').")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero or find_spec("matplotlib") is None:
            return
        with _nothing_lost(CURVE_FILE):
            if not draw_learning_curve(state.log_history, Path(args.output_dir) / CURVE_FILE):
                logger.warning(f"no {CURVE_FILE}: nothing was logged (logging_steps is {args.logging_steps}).")


class ModelCardCallback(TrainerCallback):
    """Writes the model's card, `README.md` in the output folder, when training ends and before anything is pushed."""

    def __init__(self, trainer: Video2LoraTrainer, train_dataset: Any, eval_dataset: Any) -> None:
        self.trainer = trainer
        self.sources = {"train": train_dataset, "eval": eval_dataset}
        self.began_with = describe_checkpoint(trainer.accelerator.unwrap_model(trainer.model))
        self.first_step = 0
        self._started: float | None = None
        self._finished: float | None = None

    @property
    def seconds(self) -> float | None:
        """How long this process has trained; `None` if it has not."""
        return None if self._started is None else (self._finished or time.monotonic()) - self._started

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.first_step, self._started, self._finished = state.global_step, time.monotonic(), None

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._finished = time.monotonic()
        with _nothing_lost("README.md"):
            self.trainer.create_model_card()

    def on_push_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        with _nothing_lost("README.md"):
            self.trainer.create_model_card()

    def write(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **_: Any,
    ) -> None:
        """Write the card, on the main process; a card that somebody has made their own stays.

        Args:
            language, license, tags, model_name: as in transformers' `Trainer.create_model_card`; the other arguments
                of that are known from the run.
        """
        trainer = self.trainer
        if not trainer.is_world_process_zero():
            return
        path = Path(str(trainer.args.output_dir)) / "README.md"
        if path.exists() and GENERATED not in path.read_text(encoding="utf-8"):
            logger.warning(f"{path} stays as it is: somebody has written it (it has no line {GENERATED!r}).")
            return
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        name = trainer.hub_model_id or trainer.args.hub_model_id or model_name or path.absolute().parent.name
        config = copy(model.config)
        config.bundle_base = model.bundles_base  # as its checkpoints are saved; a model may come from another kind
        card = model_card(
            name,
            config,
            facts=collect_facts(trainer, self),
            language=language,
            license=license,
            tags=[tags] if isinstance(tags, str) else tags,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, card.encode("utf-8"))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; what a cell may not hold is escaped, line breaks become spaces."""
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    text = "" if value is None else "".join(c if c.isprintable() else " " for c in str(value))
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


@contextmanager
def _nothing_lost(what: str) -> Iterator[None]:
    """Tell of a failure and go on: no picture and no card is worth a training that is over but not saved."""
    try:
        yield
    except Exception:
        logger.exception(f"{what} could not be written; the training is not touched by this.")
