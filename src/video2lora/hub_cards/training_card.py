"""Hub cards: how a checkpoint was trained, as a section of its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult
from jinja2 import Environment

from .adapter_card import _inline

GENERATED = "<!-- written by video2lora: take this line out to keep your own changes -->"
"""A card with this line may be written again."""


@dataclass(frozen=True)
class DataFacts:
    """A data set.

    Attributes:
        name: a file's name or a Hub id; `None` for rows in memory.
        hub_id: its id on the Hub, if it is from there.
        num_rows, num_queries: its size; `None` where it is streamed.
    """

    name: str | None
    hub_id: str | None = None
    num_rows: int | None = None
    num_queries: int | None = None

    def __str__(self) -> str:
        text = f"`{_inline(self.name)}`" if self.name else "rows in memory"
        if self.num_rows is None:
            return f"{text}, streamed"
        sizes = [_count(self.num_rows, "row"), _count(self.num_queries or 0, "query", "queries")]
        return f"{text}: {', '.join(sizes if self.num_queries else sizes[:1])}"


@dataclass(frozen=True)
class Evaluation:
    """The losses of an evaluation set.

    Attributes:
        name: which of several sets; empty for the only one.
        losses: (step, loss), by step; not empty.
    """

    name: str
    losses: Sequence[tuple[int, float]]

    @property
    def last(self) -> tuple[int, float]:
        return self.losses[-1]

    @property
    def best(self) -> tuple[int, float]:
        return min(self.losses, key=lambda point: point[1])

    def at(self, step: int) -> tuple[int, float]:
        """The loss at a step, or the last one before it (the first where there is none)."""
        return next((point for point in reversed(self.losses) if point[0] <= step), self.losses[0])


@dataclass(frozen=True)
class TrainingFacts:
    """A training run, in numbers and words.

    Attributes:
        train, evals: the data; evaluation sets by name, empty for the only one.
        step, max_steps, first_step: steps done, planned, and done before this process went on.
        epochs: passes over the data.
        weights_step: the step the weights beside the card are of.
        seconds: how long this process trained, on `device`.
        per_device_batch, accumulation, processes: videos, batches a step, processes.
        optimisation, loss, precision: in words.
        began_with: the checkpoint whose weights the run began with, in words; `None` for new ones.
        num_videos, num_skipped: videos taken by this process's run, and those of them that could not be read.
        hyperparameters: arguments that are not the default.
        curve, samples: files beside the card.
    """

    train: DataFacts | None
    evals: Mapping[str, DataFacts]
    step: int
    max_steps: int
    first_step: int
    epochs: float | None
    weights_step: int
    seconds: float | None
    device: str
    per_device_batch: int
    accumulation: int
    processes: int
    optimisation: str
    loss: str
    precision: str
    seed: int
    evaluations: Sequence[Evaluation] = ()
    began_with: str | None = None
    num_videos: int = 0
    num_skipped: int = 0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    curve: str | None = None
    samples: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def global_batch(self) -> int:
        """Videos in a step, over all processes and accumulated batches."""
        return self.per_device_batch * self.accumulation * self.processes

    @property
    def hub_datasets(self) -> list[str]:
        """Hub ids of the data."""
        data = [self.train, *self.evals.values()]
        return sorted({facts.hub_id for facts in data if facts is not None and facts.hub_id is not None})


def training_section(facts: TrainingFacts) -> str:
    """The Markdown of a run: data, steps, optimisation, losses, hyperparameters, versions."""
    template = (files("video2lora.hub_cards") / "templates" / "training_section.md").read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    section = environment.from_string(template).render(
        facts=facts,
        time=None if facts.seconds is None else _duration(facts.seconds),
        hyperparameters={name: _inline(str(value)) for name, value in facts.hyperparameters.items()},
    )
    return section.strip()


def eval_results(facts: TrainingFacts) -> list[EvalResult]:
    """The evaluation losses of the weights beside the card, for the card's metadata."""
    results = []
    for evaluation in facts.evaluations:
        data = facts.evals.get(evaluation.name, DataFacts(None))
        results.append(
            EvalResult(
                task_type="video-text-to-text",
                dataset_type=data.hub_id or "unknown",
                dataset_name=data.name or evaluation.name or "evaluation set",
                dataset_config=evaluation.name or None,  # metadata joins results that differ in the name alone
                metric_type="loss",
                metric_name="evaluation loss",
                metric_value=round(evaluation.at(facts.weights_step)[1], 6),
            )
        )
    return results


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
