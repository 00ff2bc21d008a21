"""Moving shapes, ablations: the table and its plot, from the results of the runs alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from ablate_data import CLIP_FRAMES, CUT, FORMS, MAX_SEGMENTS, SETTINGS, WHOLE, Budget  # noqa: E402
from batches import FRAMES  # noqa: E402
from results_text import table  # noqa: E402
from scipy.stats import t as student  # noqa: E402
from train_hypernetwork import HELD_OUT_TASKS, TRAINED_TASKS  # noqa: E402

from video2lora.data.files import write_atomically  # noqa: E402

CONFIDENCE = 0.95
LEARNT = 0.05  # above the base that sees nothing
KINDS = {"trained": TRAINED_TASKS, "never trained": HELD_OUT_TASKS}
Accuracy = Mapping[str, Mapping[str, Sequence[int]]]


@dataclass(frozen=True)
class Noise:
    """The default's runs in one column.

    Attributes:
        values: one a seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Between seeds; not a number with fewer than two."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    @property
    def bound(self) -> float:
        """How far from the mean another run of the default may well fall (95 % prediction interval).

        Infinite where the noise is not known: with fewer than three seeds, or where they are all alike by chance.
        """
        k = len(self.values)
        if k < 3 or not self.deviation > 0:
            return math.inf
        quantile = float(student.ppf((1 + CONFIDENCE) / 2, k - 1))
        return quantile * self.deviation * math.sqrt(1 + 1 / k)

    def differs(self, value: float) -> bool:
        """Whether a run differs from the default by more than the seeds do."""
        return abs(value - self.mean) > self.bound

    def in_deviations(self, value: float) -> str:
        """A difference to the mean, in deviations."""
        if not self.deviation > 0:
            return "-"
        return f"{(value - self.mean) / self.deviation:+.1f} σ"


def write_table(folder: Path, variants: Mapping[str, Any], output: Path) -> None:
    """Write the page and the plot beside it, of the runs that are done; what is missing is said.

    Raises:
        SystemExit: nothing is done.
    """
    found = {name: folder / "results" / f"{name}.json" for name in variants}
    results = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    if not results:
        raise SystemExit(f"no result in {folder / 'results'}: run `ablate.py run` first.")
    prepared, blind = folder / SETTINGS, folder / "results" / "base.json"
    for path in (prepared, blind):
        if not path.exists():
            raise SystemExit(f"{path} is missing, which `ablate.py prepare` writes: run it to its end.")
    budget, base = Budget(**json.loads(prepared.read_text())["budget"]), json.loads(blind.read_text())
    seeds = [name for name in results if not variants[name].subject]
    noise = {
        (form, kind): Noise(tuple(accuracy(results[name]["accuracy"], form, tasks) for name in seeds))
        for form in FORMS
        for kind, tasks in KINDS.items()
    }
    plot = output.with_suffix(".png")
    missing = [name for name in variants if name not in results]
    parts = ["# Moving shapes: ablations", setting(budget, results)]
    parts += [f"Not run yet: {', '.join(missing)}."] if missing else []
    parts += hardly_learnt([results[name]["accuracy"] for name in seeds], base)
    parts += below_the_base([results[name]["accuracy"] for name in seeds], base)
    parts += [main_table(variants, results, base, noise), f"![Ablations]({plot.name})"]
    parts += ["## What differs by more than the seeds do", *claims(variants, results, noise)]
    parts += [part for form in FORMS for part in (f"## By task: {form}", task_table(variants, results, base, form))]
    draw(variants, results, noise, plot)
    write_atomically(output, ("\n\n".join(parts) + "\n").encode())


def accuracy(counts: Accuracy, form: str, tasks: Sequence[str]) -> float:
    """Mean over tasks of the share of questions answered to the letter."""
    shares = [counts[form][task][0] / counts[form][task][1] for task in tasks if task in counts.get(form, {})]
    return sum(shares) / len(shares) if shares else math.nan


def setting(budget: Budget, results: Mapping[str, Any]) -> str:
    """What was done, in words."""
    devices = sorted({result["device"] for result in results.values()})
    beside = sorted({result["beside"] for result in results.values()})
    rates = sorted({result["learning_rate"] for result in results.values()})
    asked = sum(count for _, count in next(iter(results.values()))["accuracy"][WHOLE].values())
    clips = budget.validation_batches * budget.clips
    return (
        "One option is changed at a time (a rank brings its multiplier along, 2 rank^1.5: 5.7 at 2, 128 at 16). Every "
        f"run: {budget.steps} steps of {budget.clips} clips, {budget.queries} questions about each "
        "(one, of its caption, where only captions are asked for), learning rate "
        f"{', '.join(map(str, rates))}; {FRAMES} frames of clips of {CLIP_FRAMES} seconds, {CUT:.0%} of them given as "
        f"2 to {MAX_SEGMENTS} segments of {FRAMES} frames each. All runs see the very same clips, in an order that "
        f"the seed decides. Scored on {asked} questions about {clips} validation clips, whole and composed of "
        "segments, to the letter: every token of the right answer is the likeliest after those before it, just when "
        f"greedy generation gives that answer. Never trained: {', '.join(HELD_OUT_TASKS)}. σ is the standard "
        f"deviation of the default's seeds. Seconds of training on {', '.join(devices)} with up to "
        f"{', '.join(map(str, beside))} runs at once."
    )


def hardly_learnt(seeds: Sequence[Accuracy], base: Mapping[str, Accuracy]) -> list[str]:
    """Trained tasks of which the default knows little more than the base that sees nothing: they tell nothing."""
    if not seeds:
        return []
    means = {task: float(np.mean([accuracy(each, WHOLE, [task]) for each in seeds])) for task in TRAINED_TASKS}
    blind = {task: accuracy(base["no adapter"], WHOLE, [task]) for task in TRAINED_TASKS}
    tasks = [f"{task} ({means[task]:.3f})" for task in TRAINED_TASKS if means[task] - blind[task] < LEARNT]
    if not tasks:
        return []
    told = (
        f"At this budget the default has hardly learnt {', '.join(tasks)}: less than {LEARNT} above the base that "
        "sees nothing. What differs here differs early in training, and need not after more of it."
    )
    return [told]


def below_the_base(seeds: Sequence[Accuracy], base: Mapping[str, Accuracy]) -> list[str]:
    """Whether adapters are worse than nothing at what was never trained."""
    if not seeds:
        return []
    own = float(np.mean([accuracy(each, WHOLE, HELD_OUT_TASKS) for each in seeds]))
    blind = accuracy(base["no adapter"], WHOLE, HELD_OUT_TASKS)
    if not own < blind:
        return []
    told = (
        f"Of what was never trained the default gets {own:.3f}, less than the base that sees nothing ({blind:.3f}): "
    )
    return [told + "an adapter answers with what it was trained to say."]


def main_table(
    variants: Mapping[str, Any], results: Mapping[str, Any], base: Mapping[str, Accuracy], noise: Mapping[Any, Noise]
) -> str:
    """A row for every run: accuracy, with its distance from the default's mean, and sizes."""
    columns = [f"{form}: {kind}" for form in FORMS for kind in KINDS]
    header = ["run", "changed (default)", *columns, "adapter", "hypernetwork", "seconds"]
    rows = [[name, "", *_shares(counts), "-", "-", "-"] for name, counts in base.items()]
    means = [
        f"{each.mean:.3f} ± {each.deviation:.3f}" if len(each.values) > 1 else _number(each.mean)
        for each in noise.values()
    ]
    rows.append([f"default, {len(next(iter(noise.values())).values)} seeds", "", *means, "", "", ""])
    for name, result in results.items():
        cells = []
        for (form, kind), each in noise.items():
            value = accuracy(result["accuracy"], form, KINDS[kind])
            if not variants[name].subject:
                cells.append(f"{value:.3f}")
                continue
            away = f" ({each.in_deviations(value)})"
            cells.append(f"**{value:.3f}**{away}" if each.differs(value) else f"{value:.3f}{away}")
        adapter = f"rank {result['adapter_rank']}, {result['adapter_parameters']:,} ({_size(result)})"
        hypernetwork = f"{result['hypernetwork_parameters'] / 1e6:.2f} M"
        rows.append([name, variants[name].subject, *cells, adapter, hypernetwork, f"{result['seconds']:.0f}"])
    note = (
        "Adapter: rank of a whole clip's, parameters, size in bfloat16. Bold: differs by more than the seeds do. A "
        "run on captions alone was trained on none of the other tasks either."
    )
    return table(header, rows) + "\n\n" + note


def _shares(counts: Accuracy) -> list[str]:
    return [_number(accuracy(counts, form, tasks)) for form in FORMS for tasks in KINDS.values()]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _size(result: Mapping[str, Any]) -> str:
    return f"{2 * result['adapter_parameters'] / 1000:.0f} kB"


def claims(variants: Mapping[str, Any], results: Mapping[str, Any], noise: Mapping[Any, Noise]) -> list[str]:
    """What is above the noise, and what is not."""
    seeds = len(next(iter(noise.values())).values)
    others = [name for name in results if variants[name].subject]
    if seeds < 3:
        return [f"Nothing can be claimed: the default was run with {seeds} seeds, and the noise takes 3."]
    lines, level = [], []
    for name in others:
        told = []
        for (form, kind), each in noise.items():
            value = accuracy(results[name]["accuracy"], form, KINDS[kind])
            if each.differs(value):
                told.append(f"{form}, {kind} {value - each.mean:+.3f} ({each.in_deviations(value)})")
        if told:
            lines.append(f"- {name}: {'; '.join(told)}")
        else:
            level.append(name)
    tests = len(others) * len(noise)
    how = (
        f"Differs: falls outside the interval in which another run of the default falls with {CONFIDENCE:.0%} "
        f"(Student's t over {seeds} seeds; they stand for the noise of the variants too, each of which was run once). "
        f"Of {tests} comparisons {tests * (1 - CONFIDENCE):.1f} would do so by chance if nothing mattered."
    )
    parts = [how, "\n".join(lines) if lines else "Nothing does."]
    return parts + ([f"Not told apart from the default anywhere: {', '.join(level)}."] if level else [])


def task_table(
    variants: Mapping[str, Any], results: Mapping[str, Any], base: Mapping[str, Accuracy], form: str
) -> str:
    """Accuracy of every run in every task."""
    tasks = [task for kind in KINDS.values() for task in kind]
    header = ["run", *(f"{task} (never trained)" if task in HELD_OUT_TASKS else task for task in tasks)]
    counts = {name: each for name, each in base.items() if form in each}
    counts |= {name: result["accuracy"] for name, result in results.items()}
    rows = [[name, *(_number(accuracy(each, form, [task])) for task in tasks)] for name, each in counts.items()]
    seeds = [results[name]["accuracy"] for name in results if not variants[name].subject]
    if len(seeds) > 1:
        each_task = [Noise(tuple(accuracy(each, form, [task]) for each in seeds)) for task in tasks]
        spread = ["default, mean ± σ", *(f"{noise.mean:.3f} ± {noise.deviation:.3f}" for noise in each_task)]
        rows.insert(len(counts) - len(results), spread)
    return table(header, rows)


def draw(variants: Mapping[str, Any], results: Mapping[str, Any], noise: Mapping[Any, Noise], plot: Path) -> None:
    """Accuracy of every run in each form; the band is where another run of the default would fall."""
    names = list(results)[::-1]
    figure, axes = plt.subplots(1, len(FORMS), figsize=(13, 1.5 + 0.3 * len(names)), sharey=True)
    for axis, form in zip(axes, FORMS, strict=True):
        for (kind, tasks), colour, marker in zip(KINDS.items(), ("tab:blue", "tab:orange"), ("o", "s"), strict=True):
            each = noise[form, kind]
            if math.isfinite(each.bound):
                axis.axvspan(each.mean - each.bound, each.mean + each.bound, color=colour, alpha=0.12, lw=0)
                axis.axvspan(each.mean - each.deviation, each.mean + each.deviation, color=colour, alpha=0.25, lw=0)
            values = [accuracy(results[name]["accuracy"], form, tasks) for name in names]
            axis.plot(values, range(len(names)), marker, color=colour, label=kind, markersize=5)
        axis.set(title=form, xlabel="exact match, mean over tasks")
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(names)), labels=names, fontsize=8)
    axes[0].legend(fontsize=8)
    figure.text(0.01, 0.01, "bands: the default's seeds, ± σ and 95 % prediction interval", fontsize=7)
    figure.tight_layout()
    figure.savefig(plot, dpi=100, metadata={"Software": None})
    plt.close(figure)
