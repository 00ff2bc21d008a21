"""Evaluation: the paper's printed results (arXiv 2606.04351, tables 1a, 1b, 4a, 4b), and whether its verdicts follow.

The numbers are the paper's, the check is ours: the rule of `statistics.interval_verdicts` on each printed interval. It
needs no model, no data and no optional library.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .report_document import markdown_table
from .statistics import Verdicts, interval_verdicts

__all__ = [
    "MARGINS",
    "PRINTED_RESULTS",
    "PrintedResult",
    "differing_verdicts",
    "how_averaged",
    "large_losses",
    "paper_verdicts_markdown",
]

MARGINS = {"judge": 0.15, "token_f1": 0.05}  # of the LLM judge on 0-1, and of token-F1
LARGE_LOSS = 0.15  # part of the baseline that is worth a remark beside a verdict of equivalence
ROUNDING = 0.0011  # two numbers printed with three decimals, and what was made of them

AVERAGE = "Average"
TITLES = {
    "1a": "captioning, LLM judge",
    "1b": "captioning, token-F1",
    "4a": "question answering, LLM judge",
    "4b": "question answering, token-F1",
}
METRICS = {"1a": "judge", "1b": "token_f1", "4a": "judge", "4b": "token_f1"}
SIZES = ("500M", "2.2B")
QUESTIONS = {"VidCapBench": 1523}  # of table 4; 500 for the others

# Per benchmark and model size: video in context, adapter, their difference, its 95 % interval, verdicts (Eq, NI).
_Cells = tuple[float, float, float, float, float, str]
_TABLES: dict[str, tuple[tuple[str, _Cells, _Cells], ...]] = {
    "1a": (
        (
            "ActivityNet Captions",
            (0.428, 0.356, -0.072, -0.104, -0.041, "YY"),
            (0.576, 0.492, -0.084, -0.113, -0.057, "YY"),
        ),
        ("PLM-RDCap", (0.308, 0.263, -0.045, -0.069, -0.021, "YY"), (0.326, 0.316, -0.010, -0.032, 0.012, "YY")),
        ("PLM-RCap", (0.252, 0.242, -0.011, -0.031, 0.009, "YY"), (0.270, 0.287, 0.017, 0.001, 0.034, "YY")),
        ("VDC", (0.515, 0.406, -0.108, -0.118, -0.098, "YY"), (0.539, 0.511, -0.028, -0.037, -0.019, "YY")),
        ("CaReBench", (0.334, 0.278, -0.056, -0.067, -0.045, "YY"), (0.437, 0.369, -0.068, -0.078, -0.058, "YY")),
        (AVERAGE, (0.367, 0.309, -0.058, -0.078, -0.039, "YY"), (0.430, 0.395, -0.035, -0.052, -0.018, "YY")),
    ),
    "1b": (
        (
            "ActivityNet Captions",
            (0.236, 0.243, 0.007, 0.002, 0.012, "YY"),
            (0.263, 0.256, -0.007, -0.012, -0.002, "YY"),
        ),
        ("PLM-RDCap", (0.189, 0.198, 0.009, 0.005, 0.013, "YY"), (0.198, 0.207, 0.009, 0.005, 0.013, "YY")),
        ("PLM-RCap", (0.177, 0.203, 0.026, 0.021, 0.031, "YY"), (0.199, 0.204, 0.005, 0.001, 0.010, "YY")),
        ("VDC", (0.315, 0.288, -0.027, -0.030, -0.025, "YY"), (0.297, 0.304, 0.007, 0.003, 0.010, "YY")),
        ("CaReBench", (0.295, 0.275, -0.020, -0.023, -0.017, "YY"), (0.292, 0.279, -0.013, -0.015, -0.010, "YY")),
        (AVERAGE, (0.243, 0.242, -0.001, -0.005, 0.003, "YY"), (0.250, 0.250, 0.000, -0.004, 0.004, "YY")),
    ),
    "4a": (
        ("NExT-QA (open)", (0.501, 0.547, 0.046, 0.007, 0.084, "YY"), (0.597, 0.610, 0.013, -0.022, 0.048, "YY")),
        ("ActivityNet-QA", (0.524, 0.541, 0.016, -0.031, 0.064, "YY"), (0.627, 0.531, -0.096, -0.144, -0.049, "YY")),
        ("PLM-SGQA", (0.390, 0.317, -0.074, -0.113, -0.034, "YY"), (0.493, 0.295, -0.198, -0.236, -0.161, "--")),
        ("VidCapBench", (0.502, 0.451, -0.050, -0.071, -0.030, "YY"), (0.551, 0.475, -0.076, -0.096, -0.055, "YY")),
        (AVERAGE, (0.487, 0.460, -0.027, -0.043, -0.011, "YY"), (0.562, 0.477, -0.085, -0.101, -0.069, "YY")),
    ),
    "4b": (
        ("NExT-QA (open)", (0.129, 0.068, -0.061, -0.076, -0.046, "--"), (0.140, 0.076, -0.063, -0.079, -0.048, "--")),
        ("ActivityNet-QA", (0.197, 0.023, -0.174, -0.199, -0.149, "--"), (0.149, 0.013, -0.136, -0.156, -0.117, "--")),
        ("PLM-SGQA", (0.081, 0.225, 0.145, 0.131, 0.158, "-Y"), (0.092, 0.203, 0.111, 0.098, 0.124, "-Y")),
        ("VidCapBench", (0.216, 0.209, -0.007, -0.019, 0.004, "YY"), (0.196, 0.218, 0.022, 0.010, 0.033, "YY")),
        (AVERAGE, (0.156, 0.131, -0.024, -0.041, -0.008, "YY"), (0.144, 0.128, -0.017, -0.032, -0.002, "YY")),
    ),
}


@dataclass(frozen=True)
class PrintedResult:
    """One row of a table for one model size: the adapter against the video in context, as printed.

    Attributes:
        table: "1a", "1b", "4a" or "4b".
        benchmark: the paper's name of it, or "Average".
        size: "500M" or "2.2B".
        baseline, candidate: mean score with the video in context, and with the adapter.
        effect, interval: candidate - baseline and its 95 % interval.
        equivalent, non_inferior: the paper's verdicts.
    """

    table: str
    benchmark: str
    size: str
    baseline: float
    candidate: float
    effect: float
    interval: tuple[float, float]
    equivalent: bool
    non_inferior: bool

    @property
    def metric(self) -> str:
        return METRICS[self.table]

    @property
    def margin(self) -> float:
        return MARGINS[self.metric]

    @property
    def verdicts(self) -> Verdicts:
        """What our rule says of the printed interval."""
        return interval_verdicts(self.interval, self.margin)

    @property
    def retention(self) -> float:
        return self.candidate / self.baseline

    @property
    def direction(self) -> str:
        """Where the interval lies: wholly below 0 "worse", wholly above "better", else empty."""
        low, high = self.interval
        return "worse" if high < 0 else "better" if low > 0 else ""

    @property
    def name(self) -> str:
        return f"{self.table} {self.benchmark} {self.size}"


def _results() -> Iterable[PrintedResult]:
    for table, rows in _TABLES.items():
        for benchmark, *cells in rows:
            for size, (baseline, candidate, effect, low, high, marks) in zip(SIZES, cells, strict=True):
                eq, ni = (mark == "Y" for mark in marks)
                yield PrintedResult(table, benchmark, size, baseline, candidate, effect, (low, high), eq, ni)


PRINTED_RESULTS: tuple[PrintedResult, ...] = tuple(_results())


def differing_verdicts(results: Iterable[PrintedResult] = PRINTED_RESULTS) -> list[str]:
    """Verdicts that do not follow from the printed interval and margin, by name; empty if all do."""
    return [
        f"{result.name}: printed {verdict} = {_mark(printed)}, by the rule {_mark(ours)}"
        for result in results
        for verdict, printed, ours in (
            ("equivalent", result.equivalent, result.verdicts.equivalent),
            ("non-inferior", result.non_inferior, result.verdicts.non_inferior),
        )
        if printed != ours
    ]


def large_losses(least: float = LARGE_LOSS, results: Iterable[PrintedResult] = PRINTED_RESULTS) -> list[PrintedResult]:
    """Rows the paper calls equivalent although at least this part of the baseline is lost, largest loss first."""
    found = [result for result in results if result.equivalent and 1 - result.retention >= least]
    return sorted(found, key=lambda result: result.retention)


def how_averaged(table: str, size: str) -> str:
    """What the numbers of an average row agree with, to the printed digits, of the rows above it.

    Returns:
        "benchmarks": the means of the rows, bounds of the interval included (an interval of the average of independent
            benchmarks would be shorter).
        "questions": the means of the rows weighted by their questions, the interval's bounds not included.
        "unknown": neither.
    """
    *rows, average = (result for result in PRINTED_RESULTS if (result.table, result.size) == (table, size))
    weights = [QUESTIONS.get(row.benchmark, 500) for row in rows]
    printed = (average.baseline, average.candidate, average.effect)

    def agree(weights: list[int], with_bounds: bool) -> bool:
        def mean(row: PrintedResult) -> tuple[float, ...]:
            return (row.baseline, row.candidate, row.effect, *(row.interval if with_bounds else ()))

        columns = zip(*map(mean, rows), strict=True)
        means = [sum(x * w for x, w in zip(column, weights, strict=True)) / sum(weights) for column in columns]
        expected = printed + (average.interval if with_bounds else ())
        return all(abs(ours - theirs) <= ROUNDING for ours, theirs in zip(means, expected, strict=True))

    if agree([1] * len(rows), with_bounds=True):
        return "benchmarks"
    return "questions" if table.startswith("4") and agree(weights, with_bounds=False) else "unknown"


def paper_verdicts_markdown() -> str:
    """A Markdown section: each printed interval with our verdict beside the paper's, and what a verdict hides."""
    differing = differing_verdicts()
    total = 2 * len(PRINTED_RESULTS)
    lines = [
        "## The paper's verdicts, checked",
        "",
        "Equivalent: the printed 95 % interval of adapter - video in context lies inside the margin (each one-sided "
        "test at alpha 0.025). Non-inferior: it lies above minus the margin. Margins: "
        f"{MARGINS['judge']:g} for the judge (0-1), {MARGINS['token_f1']:g} for token-F1. "
        f"Of {total} printed verdicts {total - len(differing)} follow from this.",
        "",
        *([f"- does not follow: {text}" for text in differing] or ["No printed verdict differs from the rule."]),
    ]
    for table in TITLES:
        lines += ["", f"### Table {table}: {TITLES[table]}", "", _table(table)]
    return "\n".join([*lines, "", "### Beside the verdicts", "", *_remarks(), ""])


def _table(table: str) -> str:
    columns = (
        "Benchmark",
        "Model",
        "Video",
        "Adapter",
        "Effect",
        "95 % interval",
        "Kept",
        "Margin / video",
        "Interval excludes 0",
        "Eq paper",
        "Eq rule",
        "NI paper",
        "NI rule",
    )
    rows = []
    for result in PRINTED_RESULTS:
        if result.table == table:
            cells = (
                result.benchmark,
                result.size,
                f"{result.baseline:.3f}",
                f"{result.candidate:.3f}",
                f"{result.effect:+.3f}",
                "[{:+.3f}, {:+.3f}]".format(*result.interval),
                f"{result.retention:.1%}",
                f"{result.margin / result.baseline:.0%}",
                result.direction or "-",
                _mark(result.equivalent),
                _mark(result.verdicts.equivalent),
                _mark(result.non_inferior),
                _mark(result.verdicts.non_inferior),
            )
            rows.append(cells)
    return markdown_table(columns, rows)


def _remarks() -> list[str]:
    """What stands beside the verdicts, all of it computed from the printed numbers."""
    rows = [result for result in PRINTED_RESULTS if result.benchmark != AVERAGE]
    equivalent = [result for result in rows if result.equivalent]
    worse = sum(result.direction == "worse" for result in equivalent)
    better = sum(result.direction == "better" for result in equivalent)
    losses = [f"{result.name} -{1 - result.retention:.0%}" for result in large_losses()]
    widest = max(equivalent, key=lambda result: result.margin / result.baseline)
    qa = [result for result in rows if result.table == "4b"]
    below = [f"{result.benchmark} {result.size}" for result in qa if not result.verdicts.non_inferior]
    remarks = [
        f"Of {len(equivalent)} benchmark rows called equivalent, {worse} have their whole interval below 0 and "
        f"{better} above it: a difference within the margin, not none.",
        f"Called equivalent with a loss of {LARGE_LOSS:.0%} or more of the score: {'; '.join(losses)}.",
        "The margin is absolute, so low scores have room to fall: it would let "
        f"{widest.margin / widest.baseline:.0%} of the score go on {widest.name}.",
        f"Non-inferiority in token-F1 of answers fails in {len(below)} of {len(qa)} rows: {', '.join(below)}.",
    ]
    for table in TITLES:
        for size in SIZES:
            remarks.append(_average_remark(table, size))
    return [f"- {remark}" for remark in remarks]


def _average_remark(table: str, size: str) -> str:
    *rows, average = (result for result in PRINTED_RESULTS if (result.table, result.size) == (table, size))
    how = {
        "benchmarks": "agrees with the mean of its benchmarks, and its interval with the mean of their bounds: too "
        "wide for an average of independent benchmarks",
        "questions": "agrees with a mean weighted by questions; the plain mean of the effects is "
        f"{sum(row.effect for row in rows) / len(rows):+.3f}, not {average.effect:+.3f}",
        "unknown": "agrees with no mean of its rows",
    }[how_averaged(table, size)]
    failing = sum(not row.verdicts.equivalent for row in rows)
    text = f"Average of {table}, {size} ({average.retention:.1%} kept): {how}."
    if average.verdicts.equivalent and failing:
        text += f" It passes as equivalent; of its {len(rows)} benchmarks {failing} do not."
    return text


def _mark(verdict: bool) -> str:
    return "yes" if verdict else "no"
