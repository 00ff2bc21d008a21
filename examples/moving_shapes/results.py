"""Moving shapes: results.md and its plots, from the records of the runs alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from train_hypernetwork import HELD_OUT_TASKS  # noqa: E402

from video2lora.data.moving_shapes import facts_right, make_scene  # noqa: E402
from video2lora.evaluation.records import EvaluationRun, read_run  # noqa: E402
from video2lora.evaluation.statistics import compare  # noqa: E402

PRETTY = {"video": "video in context", "no_adapter": "no adapter", "other_adapter": "another video's adapter",
          "caption": "own caption as text"}  # fmt: skip


def write_results(folder: Path, declared: Mapping[str, Any], margin: float, output: Path) -> None:
    """Write the page and the plots beside it, of the runs that are finished; what is missing is said."""
    runs = {name: read_run(folder / name) for name in declared if (folder / name / "records.parquet").exists()}
    missing = [name for name in declared if name not in runs]
    parts = ["# Moving shapes: results", f"Margin, declared before the runs: {margin} of exact match; alpha 0.025."]
    if missing:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    if "main" in runs:
        parts += main_section(runs["main"], margin)
    for name, title in (("phrasings", "Phrasings never trained on"), ("combinations", "Pairs never trained on")):
        if name in runs:
            parts += [f"## {title}", against_table(runs[name], ["adapter"], margin)]
    for prefix, title in (("frames_", "Frames"), ("pixels_", "Pixels of frames given as pictures")):
        swept = {int(name.removeprefix(prefix)): run for name, run in runs.items() if name.startswith(prefix)}
        if prefix == "frames_" and "main" in runs:
            swept[12] = runs["main"]
        if swept:
            parts += sweep_section(title, dict(sorted(swept.items())), output.with_name(f"{prefix}accuracy.png"))
    for name in ("composition", "across_2", "across_4", "across_8"):
        if name in runs:
            parts += composition_section(name, runs[name])
    part = output.with_suffix(".part")
    part.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    part.replace(output)


def main_section(run: EvaluationRun, margin: float) -> list[str]:
    """Every condition, by task, at the number of frames that was trained on."""
    rows = []
    for task in run.tasks:
        accuracy = [f"{mean(run.scores('exact_match', condition, task)):.3f}" for condition in run.conditions]
        told = f"{task} (never trained on)" if task in HELD_OUT_TASKS else task
        chance = [f"{value:.3f}" for value in chances(run, task)]
        rows.append([told, str(run.num_questions(task)), *accuracy, *chance])
    header = ["task", "videos", *(PRETTY.get(name, name) for name in run.conditions), "prior", "agreement"]
    facts = [[PRETTY.get(name, name), *(f"{v:.3f}" for v in caption_facts(run, name))] for name in run.conditions]
    spoilt = [
        [
            PRETTY.get(name, name),
            *(f"{mean(run.scores(metric, name)):.4f}" for metric in ("repetition", "empty", "unended")),
        ]
        for name in run.conditions
    ]
    others = [name for name in run.conditions if name != "video"]
    return [
        "## 12 frames: exact match",
        table(header, rows),
        "Prior: how often the commonest answer is right. Agreement: how often the true answer of the video whose "
        "adapter was put on, to its own question of the task, is the true answer here.",
        "## Facts of captions: stated, true, and whole captions right",
        table(["condition", "recall", "precision", "exact"], facts),
        "## Against the video in context",
        against_table(run, others, margin),
        "## Degeneration",
        table(["condition", "repeated 4-grams", "empty", "not ended"], spoilt),
    ]


def against_table(run: EvaluationRun, conditions: Sequence[str], margin: float) -> str:
    """Paired differences to the video in context, with what they show."""
    rows = []
    for task in run.tasks:
        for condition in conditions:
            mine, theirs, clips = run.paired_scores("exact_match", condition, "video", task)
            result = compare(mine, theirs, margin=margin, clusters=clips)
            claims = [
                claim
                for claim, holds in (
                    ("equivalent", result.equivalent),
                    ("non-inferior", result.non_inferior),
                    ("superior", result.superior),
                )
                if holds
            ]
            low, high = result.interval
            effect = f"{result.effect:+.3f} [{low:+.3f}, {high:+.3f}]"
            numbers = [f"{np.mean(theirs):.3f}", f"{np.mean(mine):.3f}", effect]
            rows.append([task, PRETTY.get(condition, condition), *numbers, ", ".join(claims) or "-"])
    return table(["task", "condition", "video", "condition's", "difference, 95 %", "shown"], rows)


def sweep_section(title: str, runs: Mapping[int, EvaluationRun], plot: Path) -> list[str]:
    """Accuracy of video and adapter against frames or pixels; questions that so many frames do not decide are out."""
    tasks = list(dict.fromkeys(task for run in runs.values() for task in run.tasks))
    rows = []
    for task in tasks:
        for condition in ("video", "adapter"):
            values = [mean(run.scores("exact_match", condition, task)) for run in runs.values()]
            shown = ["-" if np.isnan(value) else f"{value:.3f}" for value in values]
            rows.append([task, PRETTY.get(condition, condition), *shown])
    draw_sweep(title, runs, tasks, plot)
    return [f"## {title}", table(["task", "condition", *map(str, runs)], rows), f"![{title}]({plot.name})"]


def draw_sweep(title: str, runs: Mapping[int, EvaluationRun], tasks: Sequence[str], plot: Path) -> None:
    """A small plot a task."""
    columns = 4
    figure, axes = plt.subplots(-(-len(tasks) // columns), columns, figsize=(12, 8), sharex=True, sharey=True)
    for task, axis in zip(tasks, axes.flat, strict=False):
        for condition, style in (("video", "o--"), ("adapter", "s-")):
            values = [mean(run.scores("exact_match", condition, task)) for run in runs.values()]
            axis.plot(list(runs), values, style, label=PRETTY.get(condition, condition), markersize=4)
        axis.set(title=task, xscale="log", ylim=(-0.02, 1.02))
        axis.set_xticks(list(runs), labels=[str(number) for number in runs], fontsize=7)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.supxlabel(title.lower())
    figure.supylabel("exact match")
    figure.tight_layout()
    figure.savefig(plot, dpi=100, metadata={"Software": None})
    plt.close(figure)


def composition_section(name: str, run: EvaluationRun) -> list[str]:
    """Composed adapters against the whole video's adapter."""
    rows = []
    for task in run.tasks:
        whole = mean(run.scores("exact_match", "adapter", task))
        row = [task, str(run.num_questions(task))]
        for condition in run.conditions:
            value = mean(run.scores("exact_match", condition, task))
            kept = f" ({value / whole:.0%})" if condition.startswith("adapter_") and whole else ""
            row.append(f"{value:.3f}{kept}")
        rows.append(row)
    what = "questions of all tasks" if name == "composition" else f"order across {name.split('_')[1]} segments"
    names = [PRETTY.get(condition, condition.replace("_", " ")) for condition in run.conditions]
    return [f"## Composition: {what}", table(["task", "videos", *names], rows)]


def chances(run: EvaluationRun, task: str) -> tuple[float, float]:
    """What knowing nothing, and what knowing another video gives: the prior and the agreement."""
    columns = (run.records[name].to_pylist() for name in ("condition", "task", "sample_id", "references", "extra"))
    rows = [row for row in zip(*columns, strict=True) if row[0] == "other_adapter" and row[1] == task]
    answers = {sample: references[0] for _, _, sample, references, _ in rows}
    if not answers:
        return float("nan"), float("nan")
    prior = max(Counter(answers.values()).values()) / len(answers)
    pairs = [(references[0], answers[partner]) for *_, references, partner in rows if partner in answers]
    return prior, mean([float(mine == theirs) for mine, theirs in pairs])


def caption_facts(run: EvaluationRun, condition: str) -> tuple[float, float, float]:
    """Recall and precision of facts, and the share of whole captions right."""
    names = ("condition", "task", "question_id", "answer")
    scores = []
    for name, task, question, said in zip(*(run.records[column].to_pylist() for column in names), strict=True):
        if name == condition and task == "caption":
            _, _, split, seed, number = question.split("/")[0].split("-")
            scores.append(facts_right(said or "", make_scene(int(number), split, seed=int(seed))))
    return tuple(mean([float(score[place]) for score in scores]) for place in range(3))  # type: ignore[return-value]


def mean(values: Iterable[float | None]) -> float:
    """Of the scores there are; not a number without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
