"""Evaluation: a run's folder while it is answered: what was declared, and the journal of answers, a unit at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.files import remove_parts, write_atomically
from ..data.journal import Journal
from .records import ANSWERS, RECORDS, SETTINGS, EvaluationError, read_settings

INFORMATIVE = {"environment", "model.id"}
"""What `run.json` tells that decides nothing: where a run was begun, and what its model is called."""

logger = logging.getLogger(__name__)


@dataclass
class Attempt:
    """The last attempt at a group of samples: what is the same for all conditions, and the answers of those done.

    Attributes:
        number: counts from 0; a group is tried again when a video that could not be read now can.
        errors: by sample, why its video could not be read.
        partners: by sample, the id of the other one whose video a condition may show in its place.
        answers: by condition and sample, a list with an answer (a dict) for each question.
    """

    number: int
    errors: dict[int, str]
    partners: dict[int, str]
    answers: dict[str, dict[int, list[dict[str, Any]]]] = field(default_factory=dict)

    def same_videos(self, samples: Collection[int], errors: Mapping[int, str], partners: Mapping[int, str]) -> bool:
        """Whether the videos of these samples, and those shown in their place, are what they were in this attempt."""
        return all(
            (sample in errors) == (sample in self.errors) and partners.get(sample) == self.partners.get(sample)
            for sample in samples
        )


class RunFolder:
    """The folder of a run as one process sees it.

    Its `Journal` gets a line for each unit (one condition, one group of samples). The files stay when the run is
    finished: what the records are made of is never removed.

    Args:
        path: the folder.
        settings: what is declared; that of an earlier start must be the same, but for `INFORMATIVE`.
        rank: of this process.

    Raises:
        EvaluationError: the folder holds another run, or answers that nothing is known of.
    """

    def __init__(self, path: Path, settings: dict[str, Any], rank: int) -> None:
        self.path, self.rank = path, rank
        self._answers = path / ANSWERS
        self._journal = Journal(self._answers, rank)
        self._declared = self._check(settings)
        self.settings = self._declared or settings

    @property
    def finished(self) -> bool:
        """Whether all is answered and the records are written."""
        return (self.path / RECORDS).exists()

    def open(self, num_processes: int) -> dict[int, Attempt]:
        """Declare the run, make this process's files ready, and return what is done, by group.

        What a kill left of a last line is cut off. No process may work before all have come here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            remove_parts(self.path)
            if self._declared is None:
                document = json.dumps(self.settings, indent=2, ensure_ascii=False).encode() + b"\n"
                write_atomically(self.path / SETTINGS, document)
        self._journal.open(num_processes)
        return self.attempts()

    def close(self) -> None:
        """Close this process's file."""
        self._journal.close()

    def drop_counts(self) -> None:
        """Take away the counts of bad videos, which are in the records once those are written."""
        self._journal.drop_counts()

    def append(self, group: int, condition: str, attempt: Attempt) -> None:
        """Bring a unit, the answers of `condition` in `attempt`, to the disk."""
        record = {
            "group": group,
            "attempt": attempt.number,
            "condition": condition,
            "errors": attempt.errors,
            "partners": attempt.partners,
            "answers": attempt.answers[condition],
        }
        self._journal.append(record)

    def count_bad(self, more: int) -> int:
        """Note that this process met so many more bad videos; return how many all processes of this run have met."""
        return self._journal.count_bad(more)

    def attempts(self) -> dict[int, Attempt]:
        """The last attempt at each group, from the complete lines of all processes, also of those of earlier starts.

        Raises:
            EvaluationError: a line is damaged.
        """
        found: dict[int, Attempt] = {}
        for path, number, line in self._journal.lines():
            try:
                record = json.loads(line)
                group, attempt = record["group"], record["attempt"]
                last = found.get(group)
                if last is None or last.number < attempt:
                    errors, partners = _by_sample(record["errors"]), _by_sample(record["partners"])
                    last = found[group] = Attempt(attempt, errors, partners)
                if last.number == attempt:
                    last.answers[record["condition"]] = _by_sample(record["answers"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise EvaluationError(
                    f"{path}, line {number} is damaged ({type(error).__name__}: {error}). Remove that line and "
                    "start again: what it held is answered again."
                ) from error
        return found

    def complete(self, num_groups: int, conditions: Sequence[str]) -> dict[int, Attempt]:
        """The attempts at all groups, with all conditions.

        Raises:
            EvaluationError: something is missing.
        """
        attempts = self.attempts()
        for group in range(num_groups):
            done = attempts[group].answers if group in attempts else {}
            if missing := [name for name in conditions if name not in done]:
                raise EvaluationError(
                    f"{self._answers} lacks group {group} of {', '.join(missing)}: was a file taken away? Start again "
                    "to have it answered."
                )
        return attempts

    def _check(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """What an earlier start declared; refused if it was anything else."""
        there = read_settings(self.path)
        if there is None:
            records = self.path / RECORDS
            if found := records if records.exists() else self._journal.written():
                raise EvaluationError(
                    f"{found} is there but no {SETTINGS} beside it, so what made it is not known. Name another folder."
                )
            return None
        for name, value in settings.items():
            if difference := _difference(name, there.get(name), value):
                more = " (`score_run` scores its answers by other metrics.)" if name == "metrics" else ""
                raise EvaluationError(
                    f"{self.path} holds an evaluation with {difference} was asked for. What was declared before the "
                    f"first answer stays: use the same settings to go on, or name another folder.{more}"
                )
        for name in ("versions", "device_name"):
            before, now = (document.get("environment", {}).get(name) for document in (there, settings))
            if before != now and not self.finished:
                logger.warning("%s was begun with %s: the rest may be rounded otherwise.", self.path, before)
        return there


def _difference(name: str, there: Any, asked: Any) -> str | None:
    """The first value in which two settings differ, as "name=there, but asked"; None if they are the same."""
    if name in INFORMATIVE:
        return None
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in dict.fromkeys([*asked, *there]):
            if found := _difference(f"{name}.{key}", there.get(key), asked.get(key)):
                return found
        return None
    return None if there == asked else f"{name}={there!r}, but {asked!r}"


def _by_sample(values: Mapping[str, Any]) -> dict[int, Any]:
    return {int(sample): value for sample, value in values.items()}
