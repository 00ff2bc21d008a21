"""Moving shapes, stage 3: the numbers of the results, all of them from what was declared and the records."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from proof_runs import ALPHA, MARGIN, METRICS, Run, queries_of

from video2lora.data.moving_shapes import (
    COLOURS,
    NUM_SLOTS,
    POSITIONS,
    SHAPES,
    answerable,
    make_scene,
    sample_times,
)
from video2lora.data.moving_shapes import make_queries as queries_about
from video2lora.data.moving_shapes.facts import caption_right
from video2lora.data.moving_shapes.language import PLURALS
from video2lora.evaluation.records import EvaluationError, read_run
from video2lora.evaluation.statistics import PairedComparison, compare, holm

RESAMPLES = 10_000  # of every bootstrap
GUESSER_SCENES = 6_000
NOT_RUN = "-"
SAME = ("model", "base", "conditions", "decoding", "sampling", "metrics", "margins", "alpha", "seed")
COLUMNS = ("condition", "question_id", "sample_id", "task", "prompt", "references", "answer", "extra", *METRICS)
VERDICTS = {"equivalent": "p_equivalence", "non-inferior": "p_non_inferiority", "superior": "p_superiority"}
_NAME = re.compile(rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})\b")
_MASKS = (
    (re.compile(rf"\b(?:{'|'.join(COLOURS)})\b"), "COLOUR"),
    (re.compile(rf"\b(?:{'|'.join([*PLURALS.values(), *SHAPES])})\b"), "SHAPE"),
    (re.compile("|".join(POSITIONS)), "POSITION"),
)


class Asked(NamedTuple):
    """A question of a run."""

    id: str
    sample: str
    task: str
    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """Something declared before the runs: whether it holds, and the numbers that say so.

    Attributes:
        what: the claim.
        holds: None where it was not run, or nothing can be said.
        told: the numbers in a line.
        failures: what of it does not hold, if anything.
        refuted: of a claim that does not hold: whether the numbers say otherwise, not only too little.
    """

    what: str
    holds: bool | None
    told: str
    failures: list[str] = field(default_factory=list)
    refuted: bool = True

    @property
    def verdict(self) -> str:
        if self.holds is None:
            return "not run" if self.told == NOT_RUN else "open"
        return "PASS" if self.holds else "**FAIL**" if self.refuted else "not shown"


class Numbers:
    """A finished run: its shards put together.

    Args:
        name: of the run.
        run: as declared.
        folders: of its shards, all finished.

    Raises:
        EvaluationError: the shards were answered by different models or with different settings.
    """

    def __init__(self, name: str, run: Run, folders: Sequence[Path]) -> None:
        shards = [read_run(folder, COLUMNS) for folder in folders]
        self.name, self.run, self.settings = name, run, shards[0].settings
        self.dates = sorted(shard.settings["environment"]["date"] for shard in shards)
        for shard in shards[1:]:
            for key in SAME:
                mine, theirs = ({k: v for k, v in s.items() if k != "id"} if isinstance(s, dict) else s
                                for s in (self.settings[key], shard.settings[key]))  # fmt: skip
                if mine != theirs:
                    raise EvaluationError(
                        f"{shard.path} and {shards[0].path} are parts of one run, but their {key} differs: "
                        f"{theirs} and {mine}. Run one of them again in another folder."
                    )
        records = pa.concat_tables([shard.records for shard in shards])
        self.conditions = shards[0].conditions
        self._tables = {name: records.filter(pc.equal(records["condition"], name)) for name in self.conditions}
        names = ("question_id", "sample_id", "task", "prompt", "references")
        columns = (self.column(name, self.conditions[0]) for name in names)
        self.asked = [Asked(a, b, c, d, tuple(e)) for a, b, c, d, e in zip(*columns, strict=True)]

    @cached_property
    def tasks(self) -> list[str]:
        """In the order in which they first come."""
        return list(dict.fromkeys(asked.task for asked in self.asked))

    @cached_property
    def num_clips(self) -> int:
        return len({asked.sample for asked in self.asked})

    def column(self, name: str, condition: str) -> list[Any]:
        """Of the records, in the order of `asked`."""
        return self._tables[condition][name].to_pylist()

    @lru_cache(maxsize=256)  # noqa: B019 - lives as long as the report
    def scores(self, condition: str, metric: str = "exact_match") -> np.ndarray:
        """One for each question, in order; not a number where there is none."""
        return self._tables[condition][metric].to_numpy().astype(float)

    @lru_cache(maxsize=64)  # noqa: B019
    def of_task(self, task: str | None) -> np.ndarray:
        """Which questions are of a task; all for None."""
        return self._tasks == task if task is not None else np.ones(len(self.asked), dtype=bool)

    def mean(self, condition: str, task: str | None = None, metric: str = "exact_match", kept: Any = True) -> float:
        """Mean score; not a number of nothing."""
        return mean(self.scores(condition, metric)[self.of_task(task) & kept])

    @cached_property
    def _tasks(self) -> np.ndarray:
        return np.array([asked.task for asked in self.asked])

    @cached_property
    def samples(self) -> np.ndarray:
        """The clip of each question, as a number."""
        numbers = {sample: number for number, sample in enumerate(dict.fromkeys(asked.sample for asked in self.asked))}
        return np.array([numbers[asked.sample] for asked in self.asked])

    def against(
        self, candidate: np.ndarray, baseline: np.ndarray, kept: np.ndarray, margin: float = MARGIN
    ) -> PairedComparison:
        """Paired comparison over some of the questions; whole clips are resampled."""
        return compare(
            candidate[kept],
            baseline[kept],
            margin=margin,
            alpha=ALPHA,
            clusters=self.samples[kept].tolist(),
            num_resamples=RESAMPLES,
        )

    @lru_cache(maxsize=16)  # noqa: B019
    def by_task(self, candidate: str, baseline: str) -> dict[str, PairedComparison]:
        """A condition against another, task by task."""
        scores = self.scores(candidate), self.scores(baseline)
        return {task: self.against(*scores, self.of_task(task)) for task in self.tasks}

    def aligned(self, other: Numbers, condition: str) -> np.ndarray:
        """Scores of another run's condition on the questions of this one; not a number where it has them not."""
        theirs = dict(zip((asked.id for asked in other.asked), other.scores(condition), strict=True))
        return np.array([theirs.get(asked.id, np.nan) for asked in self.asked])

    @cached_property
    def decided(self) -> np.ndarray:
        """Which questions the sampled frames decide."""
        if self.run.num_frames >= NUM_SLOTS:
            return np.ones(len(self.asked), dtype=bool)
        times, found = sample_times(self.run.num_frames, self.run.length), {}
        for sample in dict.fromkeys(asked.sample for asked in self.asked):
            scene = scene_of(sample)
            for number, query in enumerate(queries_of(self.run, scene)):
                found[f"{sample}/{number}"] = answerable(scene, query, times=times)
        return np.array([found[asked.id] for asked in self.asked])

    @cached_property
    def guesses(self) -> np.ndarray:
        """Whether the commonest answer to such a question, among training scenes, is right here: the answer prior."""
        commonest = guesser()
        right = [unname(asked.prompt, commonest.get(kind(asked.prompt), "")) in asked.references
                 for asked in self.asked]  # fmt: skip
        return np.array(right, dtype=float)

    @cached_property
    def agreement(self) -> np.ndarray:
        """Whether the video whose adapter was put on has the same true answer to its own question of the task."""
        answers = {(asked.sample, asked.task): asked.references[0] for asked in self.asked}
        partners = self.column("extra", "other_adapter")
        theirs = [answers.get((partner, asked.task)) for partner, asked in zip(partners, self.asked, strict=True)]
        return np.array([np.nan if answer is None else float(answer == asked.references[0])
                         for answer, asked in zip(theirs, self.asked, strict=True)])  # fmt: skip

    @lru_cache(maxsize=16)  # noqa: B019
    def facts(self, condition: str) -> dict[str, float]:
        """Of captions: recall and precision of facts, and the share of captions right to the letter."""
        said = zip(self.asked, self.column("answer", condition), strict=True)
        # the right answer to a question for a caption is the scene's own: no scene has to be drawn again
        scores = [
            caption_right(answer or "", asked.references[0]) for asked, answer in said if asked.task == "caption"
        ]
        recall, precision, exact = (mean(np.array([float(s[i]) for s in scores])) for i in range(3))
        return {"recall": recall, "precision": precision, "exact": exact}


def read_runs(folder: Path, runs: Mapping[str, Run], jobs: Callable[..., Any]) -> tuple[dict[str, Numbers], list[str]]:
    """The runs that are finished, and which are not, with how much of them is done.

    Shards of a run that was cut otherwise may have the names of these: so clips are counted.
    """
    found, missing = {}, []
    for name, run in runs.items():
        shards = jobs(name, run, folder)
        done = [job for job in shards if job.finished]
        if len(done) == len(shards):
            numbers = Numbers(name, run, [job.output for job in shards])
            if numbers.num_clips == run.clips:
                found[name] = numbers
            else:
                missing.append(f"{name} (its shards have {numbers.num_clips:,} clips, not {run.clips:,})")
        else:
            missing.append(f"{name} ({len(done)} of {len(shards)} shards)" if done else name)
    return found, missing


@lru_cache(maxsize=8192)
def scene_of(sample: str) -> Any:
    """The scene of a sample's id."""
    *_, split, seed, number = sample.split("-")
    return make_scene(int(number), split, seed=int(seed))


def kind(prompt: str) -> str:
    """A question without what it names."""
    for pattern, mask in _MASKS:
        prompt = pattern.sub(mask, prompt)
    return prompt


@lru_cache(maxsize=1)
def guesser() -> dict[str, str]:
    """The commonest answer to each kind of question among training scenes; objects that it names by their number."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for number in range(GUESSER_SCENES):
        for query in queries_about(make_scene(number, "train", seed=1), phrasings=("train", "held_out")):
            names = [f"the {name}" for name in _NAME.findall(query.prompt)]
            response = query.response
            counts[kind(query.prompt)][f"#{names.index(response)}" if response in names else response] += 1
    # of equally common ones the first in the alphabet, so that nothing depends on the order of scenes
    return {prompt: min(found, key=lambda answer: (-found[answer], answer)) for prompt, found in counts.items()}


def unname(prompt: str, answer: str) -> str:
    """An answer whose object is a number, with the name that this question gives to it."""
    names = _NAME.findall(prompt)
    return f"the {names[int(answer[1:])]}" if answer.startswith("#") and int(answer[1:]) < len(names) else answer


def after_holm(effects: Mapping[str, PairedComparison]) -> dict[str, list[str]]:
    """What is shown of each task when all are claimed together: Holm's correction, for each kind of claim."""
    shown: dict[str, list[str]] = {task: [] for task in effects}
    for verdict, p_value in VERDICTS.items():
        for task, result in holm({task: getattr(e, p_value) for task, e in effects.items()}, ALPHA).items():
            if result.rejected:
                shown[task].append(verdict)
    return shown


def mean(values: Iterable[float] | np.ndarray) -> float:
    """Of the numbers there are; not a number without any."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else float("nan")


def wilson(share: float, number: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval)."""
    if not number:
        return float("nan"), float("nan")
    z = 1.96
    centre = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * np.sqrt(share * (1 - share) / number + z * z / (4 * number**2))
    return max(0.0, centre - half), min(1.0, centre + half)
