"""What a check of a dataset found: counts, a readable summary, JSON, and an error to raise."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import DatasetError
from .files import write_atomically

_EXAMPLES = 3  # rows named for each kind in the summary
WARNINGS = ("end_after_video", "damaged_video", "placeholder")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one row.

    Attributes:
        row: index of the row, from 0.
        id: the row's id (given or hashed).
        field: the field it is about, such as "video" or "conversations[1]"; "" for the row as a whole.
        kind: a short name to count by, such as "missing_file".
        message: a sentence with the value and what was expected.
        where: how to find the row: "row 3", or "train.jsonl:4".
    """

    row: int
    id: str
    field: str
    kind: str
    message: str
    where: str

    @property
    def level(self) -> Literal["error", "warning"]:
        """Whether training would lose the row (or fail), or goes on with it."""
        return "warning" if self.kind in WARNINGS else "error"


@dataclass
class DatasetReport:
    """The result of `check_rows`.

    Attributes:
        num_rows: rows that were checked.
        num_queries: prompts in them that could be read.
        num_missing_responses: of these, how many have no response yet (for a teacher to fill).
        num_videos: different videos among them.
        decode: how the videos were checked: "none", "probe" or "full".
        problems: everything wrong, by row.
    """

    num_rows: int = 0
    num_queries: int = 0
    num_missing_responses: int = 0
    num_videos: int = 0
    decode: str = "probe"
    problems: list[Problem] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How many problems of each kind, errors first, then the most frequent first."""
        levels = {problem.kind: problem.level for problem in self.problems}
        counts = Counter(problem.kind for problem in self.problems)
        return dict(sorted(counts.items(), key=lambda item: (levels[item[0]] != "error", -item[1], item[0])))

    @property
    def errors(self) -> list[Problem]:
        """The problems that are more than a warning."""
        return [problem for problem in self.problems if problem.level == "error"]

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings are allowed."""
        return not self.errors

    def raise_for_errors(self) -> None:
        """Raise the summary as an error if there is one.

        Raises:
            DatasetError: some row has an error.
        """
        if not self.ok:
            raise DatasetError(f"the dataset has errors; correct or drop these rows.\n{self}")

    def to_json(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write counts and problems as JSON, all or nothing.

        Raises:
            FileExistsError: the file exists and `overwrite` is not set.
        """
        if not overwrite and Path(path).exists():
            raise FileExistsError(f"{os.fspath(path)} exists; name a new file or pass overwrite=True.")
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=2, ensure_ascii=False).encode() + b"\n")

    def to_dict(self) -> dict[str, Any]:
        """Everything in the report as plain values."""
        problems = [{**asdict(problem), "level": problem.level} for problem in self.problems]
        numbers = {name: value for name, value in vars(self).items() if name != "problems"}
        return {"ok": self.ok, **numbers, "counts": self.counts, "problems": problems}

    def __str__(self) -> str:
        errors, rows = len(self.errors), len({problem.row for problem in self.errors})
        how = {"none": "not opened", "probe": "opened", "full": "decoded"}[self.decode]
        warnings = len(self.problems) - errors
        lines = [
            f"{self.num_rows} rows, {self.num_queries} prompts ({self.num_missing_responses} without a response), "
            f"{self.num_videos} videos ({how}): {errors} errors in {rows} rows, {warnings} warnings."
        ]
        by_kind: dict[str, list[Problem]] = {}
        for problem in self.problems:
            by_kind.setdefault(problem.kind, []).append(problem)
        width = max(map(len, by_kind), default=0)
        for kind, count in self.counts.items():
            for i, problem in enumerate(by_kind[kind][:_EXAMPLES]):
                head = f"{kind:<{width}}  {count:>7}" if i == 0 else " " * (width + 9)
                lines.append(f"{head}  {_place(problem)}: {problem.message}")
            if count > _EXAMPLES:
                lines.append(" " * (width + 11) + f"... and {count - _EXAMPLES} more")
        return "\n".join(lines)


def _place(problem: Problem) -> str:
    row = f"row {problem.row}"
    found = "" if problem.where == row else f", {problem.where}"
    return f"{row} (id {problem.id}{found})"
