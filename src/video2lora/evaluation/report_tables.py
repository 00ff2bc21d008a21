"""Evaluation: the sections of a run's report, as data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from . import report_format as form
from .efficiency_results import Cost, break_even
from .paper import PRINTED_RESULTS, SIZES, PrintedResult
from .report_document import Block, Bullets, Case, Figure, Heading, Link, Section, Table, Text
from .report_frames import ClipFrames, pick_cases
from .report_numbers import Effect, RunNumbers
from .scoring import Verdict, remarks

PAPER_FILE = "paper_verdicts.md"
PAPER_NAMES = {
    "activitynet_captions": "ActivityNet Captions",
    "plm_rcap": "PLM-RCap",
    "plm_rdcap": "PLM-RDCap",
    "vdc": "VDC",
    "carebench": "CaReBench",
    "nextqa": "NExT-QA (open)",
    "activitynet_qa": "ActivityNet-QA",
    "plm_sgqa": "PLM-SGQA",
    "vidcapbench": "VidCapBench",
}
"""The paper's names of our benchmarks."""
SHOWN_ERRORS, SHOWN_NOTES = 50, 6


def plot_file(kind: str, metric: str) -> str:
    """Where a plot of a metric lies, relative to the report."""
    return f"plots/{kind}_{re.sub(r'[^A-Za-z0-9_-]', '_', metric)}.png"


# --- what was run ----------------------------------------------------------------------------------------------------


def what_was_run(numbers: RunNumbers) -> Section:
    """Everything that was declared before the first answer, and how the numbers are made."""
    settings = numbers.settings
    rows = [(name, value) for name, value in _declared(numbers) if value]
    conditions = [
        (
            condition["name"] + (" (baseline)" if condition["name"] == numbers.baseline else ""),
            _settings_text(condition["settings"]) or form.NONE,
        )
        for condition in settings["conditions"]
    ]
    blocks: list[Block] = [
        Table(("", ""), rows, numbers_from=2),
        Table(("condition", "settings"), conditions, numbers_from=2),
    ]
    if numbers.baseline not in numbers.conditions:
        blocks.append(Text(f"The baseline, {numbers.baseline}, was not run: nothing is compared with it."))
    metrics = []
    for name in numbers.quality_metrics + numbers.degeneration_metrics:
        margin, spec = settings["margins"].get(name), numbers.specs.get(name)
        better = "" if spec is None else "higher is better" if spec.higher_is_better else "lower is better"
        declared = "none" if margin is None else f"{margin:g}"
        if name not in settings["metrics"]:
            declared += " (scored later)"
        metrics.append((name, declared, better, "" if spec is None else spec.definition))
    blocks += [Table(("metric", "margin declared", "", "definition"), metrics, numbers_from=4), Text(_method(numbers))]
    return Section("What was run", blocks)


def _declared(numbers: RunNumbers) -> list[tuple[str, str]]:
    settings = numbers.settings
    benchmark, model, base = settings["benchmark"], settings["model"], settings["base"]
    sampling, decoding, environment = settings["sampling"], settings["decoding"], settings["environment"]
    dataset = benchmark.get("dataset")
    where = [dataset, benchmark.get("revision") if dataset else None, benchmark.get("split")]
    frames = f"{sampling['fps']:g} a second" if sampling.get("fps") else f"{sampling['num_frames']}"
    edge = sampling.get("longest_edge")
    identity = model.get("hypernetwork_revision") or model.get("hypernetwork_sha256")
    skipped = ", ".join(f"{count} {reason}" for reason, count in (benchmark.get("skipped") or {}).items())
    return [
        ("benchmark", f"{benchmark['title']} ({benchmark['name']}, version {benchmark['version']})"),
        ("data", ", ".join(str(item) for item in where if item)),
        (
            "questions",
            f"{form.counted(benchmark['num_questions'], 'question')} about "
            f"{form.counted(benchmark['num_samples'], 'video')} or spans, of {benchmark.get('num_available', '?')} "
            f"available, drawn with seed {benchmark.get('seed')}",
        ),
        ("skipped before the draw", skipped),
        ("digest of the rows", benchmark["digest"]),
        ("model", " at ".join(filter(None, (form.public_name(model.get("id")), identity)))),
        ("adapter", _settings_text({k: model[k] for k in ("rank", "lora_scaling", "target_modules") if k in model})),
        ("numbers", ", ".join(str(model[k]) for k in ("dtype", "attn_implementation") if model.get(k))),
        ("base", " at ".join(filter(None, (form.public_name(base.get("id")), base.get("revision"))))),
        ("frames", frames + (f", longest edge {edge} px" if edge else "") + f"; really used: {_frames_used(numbers)}"),
        ("decoding", _settings_text(decoding)),
        ("judge", _settings_text(numbers.run.judge or {})),
        ("device", str(environment.get("device_name") or "")),
        ("libraries", ", ".join(f"{name} {number}" for name, number in environment["versions"].items())),
    ]


def _frames_used(numbers: RunNumbers) -> str:
    name = numbers.baseline if numbers.baseline in numbers.conditions else numbers.conditions[0]
    return form.count_range(numbers.values(name, "num_frames"))


def _settings_text(settings: dict[str, Any]) -> str:
    texts = {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
             for name, value in settings.items() if value is not None}  # fmt: skip
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def _method(numbers: RunNumbers) -> str:
    alpha = numbers.settings["alpha"]
    text = (
        f"Intervals are {numbers.level} BCa bootstrap intervals ({numbers.resamples:,} resamples, seed "
        f"{numbers.settings['seed']}); whole videos are resampled, with all questions about them. Equivalent: the "
        "interval of the difference to the baseline lies inside the margin; non-inferior: above minus the margin; "
        f"superior: above 0; each a one-sided test at alpha {alpha:g}. What is not shown is not thereby refuted. "
        "Kept is the condition's mean over the baseline's."
    )
    if len(numbers.tasks) > 1:
        text += (
            " After Holm: what is left when the tasks count as one family of tests. The row of all questions is a "
            "mean over questions, not over tasks; it is no test of its own and is not corrected."
        )
    return text


# --- scores ----------------------------------------------------------------------------------------------------------


def in_short(numbers: RunNumbers) -> Section:
    """One row for each condition, over all questions, in the metrics that have a margin, or else the main one."""
    metrics = [name for name in numbers.quality_metrics if name in numbers.settings["margins"]]
    metrics = metrics or numbers.quality_metrics[:1]
    rows = []
    for metric in metrics:
        for condition in numbers.conditions:
            effect = numbers.effect(metric, condition)
            row = [metric, condition, form.mean(numbers.mean(metric, condition))]
            rows.append(row + (_effect_cells(effect) if effect else [form.NONE] * 4))
    if not rows:
        return Section("In short", [Text("No metric was scored.")])
    columns = ("metric", "condition", "mean", "effect", "interval", "kept", "verdict")
    blocks: list[Block] = [Table(columns, rows, numbers_from=2)]
    if remarked := remarks([
        Verdict(effect.metric, effect.condition, numbers.baseline, effect.comparison)
        for metric in metrics if metric in numbers.settings["margins"]
        for effect in numbers.effects(metric) if effect.task is None
    ]):  # fmt: skip
        blocks.append(Bullets(remarked))
    return Section("In short", blocks)


def scores(numbers: RunNumbers) -> list[Section]:
    """For each metric of quality: means of tasks and conditions, and the effects."""
    return [_metric_section(numbers, metric) for metric in numbers.quality_metrics]


def _metric_section(numbers: RunNumbers, metric: str) -> Section:
    margin = numbers.settings["margins"].get(metric)
    declared = "no margin was declared" if margin is None else f"the declared margin is {margin:g}"
    blocks: list[Block] = [
        Text(f"Mean and {numbers.level} interval; {declared}."),
        means_table(numbers, metric),
        Figure(plot_file("heat", metric), f"{metric} by task and condition"),
    ]
    if numbers.others:
        blocks += [
            Heading(f"{metric} against {numbers.baseline}"),
            effects_table(numbers, metric),
            Figure(plot_file("effects", metric), f"effects on {metric} with intervals"),
        ]
        blocks += [Bullets(notes)] if (notes := _notes(numbers.effects(metric))) else []
    return Section(f"Scores: {metric}", [block for block in blocks if not _is_empty(block)])


def _notes(effects: Sequence[Effect]) -> list[str]:
    """What is to be known of rows, each note once; pairs left out are counted in the table."""
    found: dict[str, list[str]] = {}
    for effect in effects:
        for note in effect.comparison.notes:
            if not note.startswith("pairs left out"):
                found.setdefault(note, []).append(f"{effect.condition} on {form.task_name(effect.task)}")
    return [
        f"{note}: {'; '.join(rows[:SHOWN_NOTES])}" + (f"; {len(rows) - SHOWN_NOTES} more" * (len(rows) > SHOWN_NOTES))
        for note, rows in found.items()
    ]


def _is_empty(block: Block) -> bool:
    return isinstance(block, Table) and not block.rows


def means_table(numbers: RunNumbers, metric: str) -> Table:
    """Tasks against conditions."""
    rows = []
    for scope in numbers.scopes:
        some = numbers.select(numbers.conditions[0], scope)
        size = f"{len(some):,} ({len({row['video_id'] for row in some}):,})"
        cells = [form.mean(numbers.mean(metric, condition, scope)) for condition in numbers.conditions]
        rows.append([form.task_name(scope), size, *cells])
    return Table(("task", "questions (videos)", *numbers.conditions), rows)


def effects_table(numbers: RunNumbers, metric: str) -> Table:
    """Every condition against the baseline, on the questions that both have a score for."""
    declared, several = metric in numbers.settings["margins"], len(numbers.tasks) > 1
    rows = []
    for effect in numbers.effects(metric):
        c = effect.comparison
        row = [effect.condition, form.task_name(effect.task), f"{c.n:,} ({c.num_clusters:,})"]
        row += [
            form.score(c.candidate_mean),
            form.score(c.baseline_mean),
            *_effect_cells(effect)[: 4 if declared else 3],
        ]
        row += [form.holm_verdict(effect)] if declared and several else []
        row += [form.p_values(effect)] if declared else []
        rows.append(row)
    columns = ["condition", "task", "pairs (videos)", "mean", "baseline", "effect", "interval", "kept"]
    if declared:
        columns += ["verdict", *(["after Holm"] if several else [])]
        columns += ["p equivalent / non-inferior / superior" + (" (of tasks after Holm)" if several else "")]
    return Table(columns, rows, numbers_from=2)


def _effect_cells(effect: Effect) -> list[str]:
    c = effect.comparison
    return [form.signed(c.effect), form.interval(c.interval, "+.3f"), form.retention(c), form.verdict(effect)]


def degeneration(numbers: RunNumbers) -> Section:
    """How far answers are none: loops, empty ones, ones that do not end."""
    metrics = numbers.degeneration_metrics
    rows = []
    for condition in numbers.conditions:
        cells = [form.mean(numbers.mean(metric, condition)) for metric in metrics]
        ended, tokens = numbers.values(condition, "ended"), numbers.values(condition, "num_tokens")
        cut = [] if "unended" in metrics else [form.share([not done for done in ended])]
        rows.append([condition, f"{len(ended):,}", *cells, *cut, form.count_range(tokens)])
    unended = () if "unended" in metrics else ("cut off at the limit",)
    columns = ("condition", "answers", *metrics, *unended, "tokens: median (least to most)")
    return Section("Degeneration", [Table(columns, rows)])


def context(numbers: RunNumbers) -> Section:
    """What the language model had in its context."""
    rows = [
        [condition, *(form.count_range(numbers.values(condition, name)) for name in
                      ("context_tokens", "visual_tokens", "num_frames"))]
        for condition in numbers.conditions
    ]  # fmt: skip
    columns = ("condition", "context tokens", "visual tokens", "frames of the video used")
    text = (
        "Median (least to most). Frames are those that went into the context or into what was prepared from the video."
    )
    return Section("Context", [Text(text), Table(columns, rows)])


def errors(numbers: RunNumbers) -> Section:
    """Videos that could not be read, and answers without a score."""
    blocks: list[Block] = []
    found = numbers.run.errors
    total = numbers.run.num_samples
    if found:
        unread = sum(row["error"] is not None for row in numbers.rows[numbers.conditions[0]])
        blocks.append(
            Text(
                f"{len(found):,} of {total:,} videos could not be read; {form.counted(unread, 'question')} about them "
                "count in no mean."
            )
        )
        shown = [(sample, form.without_folders(error)) for sample, error in list(found.items())[:SHOWN_ERRORS]]
        blocks.append(Table(("sample", "error"), shown, numbers_from=2))
        if len(found) > len(shown):
            blocks.append(Text(f"And {len(found) - len(shown):,} more, in records.parquet."))
    else:
        blocks.append(Text(f"All {total:,} videos could be read."))
    rows = [
        (metric, condition, f"{failed:,} of {len(numbers.answered(condition)):,}")
        for metric in numbers.quality_metrics + numbers.degeneration_metrics
        for condition in numbers.conditions
        if (failed := numbers.unscored(metric, condition)) or metric == "judge"
    ]
    if rows:
        blocks.append(
            Text("Answers without a score (of the judge: those it gave no valid grade); they count in no mean:")
        )
        blocks.append(Table(("metric", "condition", "without a score"), rows, numbers_from=2))
    else:
        blocks.append(Text("Every answer has a score in every metric."))
    return Section("Errors", blocks)


# --- samples ---------------------------------------------------------------------------------------------------------


def samples(numbers: RunNumbers, frames: ClipFrames) -> Section:
    """Best, worst and median questions, with frames and every condition's answer."""
    metric = numbers.main_metric
    chosen = {} if metric is None else pick_cases(numbers, metric)
    if metric is None or not chosen:
        return Section("Samples", [Text("No question has scores to choose samples by.")])
    by = f"{numbers.candidate} minus {numbers.baseline}" if numbers.others else f"the score of {numbers.candidate}"
    blocks: list[Block] = [Text(f"Chosen by {by} in {metric}; as few of one video as can be.")]
    for name, places in chosen.items():
        for number, place in enumerate(places, 1):
            blocks.append(_case(numbers, metric, f"{name.capitalize()}, {number} of {len(places)}", place, frames))
    return Section("Samples", blocks)


def _case(numbers: RunNumbers, metric: str, title: str, place: int, frames: ClipFrames) -> Case:
    first = numbers.rows[numbers.conditions[0]][place]
    file, note = frames.sheet(first["sample_id"])
    answers = []
    for condition in numbers.conditions:
        row = numbers.rows[condition][place]
        answer = row["answer"] if row["error"] is None else f"(no answer: {form.without_folders(row['error'])})"
        answers.append((condition, answer or "(empty)", form.score(row[metric])))
    task = f" ({first['task']})" if first["task"] else ""
    return Case(
        title=f"{title}: {first['question_id']}{task}",
        frames=file,
        note=note,
        question=first["prompt"],
        references=first["references"],
        answers=answers,
    )


# --- the paper -------------------------------------------------------------------------------------------------------


def paper(numbers: RunNumbers) -> Section | None:
    """The paper's numbers of this benchmark and size beside ours; None for benchmarks it does not have."""
    name = PAPER_NAMES.get(numbers.settings["benchmark"]["name"])
    if name is None:
        return None
    link = Link(PAPER_FILE, "The paper's verdicts, checked against its printed intervals")
    base = form.public_name(numbers.settings["base"].get("id")) or ""
    size = next((size for size in SIZES if size in base), None)
    if size is None:
        text = f"The paper has {name} for models of {' and '.join(SIZES)}; this base ({base or 'unnamed'}) is neither."
        return Section("Against the paper", [Text(text), link])
    rows = []
    for printed in PRINTED_RESULTS:
        if (printed.benchmark, printed.size) == (name, size) and printed.metric in numbers.quality_metrics:
            rows += [_paper_row(printed), _own_row(numbers, printed.metric)]
    if not rows:
        return Section("Against the paper", [Text(f"No metric of the paper's ({name}) was scored."), link])
    columns = (
        "metric",
        "from",
        "video",
        "adapter",
        "effect",
        "interval",
        "kept",
        "verdict",
    )
    text = (
        f"{name}, SmolVLM2 {size}. The paper: 500 samples a benchmark (VidCapBench: 1,523 questions), 12 frames of at "
        "most 384 px, judge Qwen3-VL-30B-A3B-Thinking, token-F1 with a normalisation it does not state. Its samples, "
        "prompts and rubric are not published as data, so rows differ in more than the checkpoint."
    )
    return Section("Against the paper", [Text(text), Table(columns, rows, numbers_from=2), link])


def _paper_row(printed: PrintedResult) -> list[str]:
    verdict = "equivalent" if printed.equivalent else "non-inferior" if printed.non_inferior else "none"
    worse = f" ({printed.direction})" if printed.direction else ""
    return [
        printed.metric,
        f"paper, table {printed.table}",
        form.score(printed.baseline),
        form.score(printed.candidate),
        form.signed(printed.effect),
        form.interval(printed.interval, "+.3f"),
        f"{printed.retention:.1%}",
        verdict + worse,
    ]


def _own_row(numbers: RunNumbers, metric: str) -> list[str]:
    effect = numbers.effect(metric, "adapter") if numbers.baseline == "video" else None
    if effect is None:
        means = (numbers.mean(metric, c) if c in numbers.conditions else None for c in ("video", "adapter"))
        return [
            metric,
            "this run",
            *(form.NONE if m is None else form.score(m.value) for m in means),
            *[form.NONE] * 4,
        ]
    c = effect.comparison
    return [metric, "this run", form.score(c.baseline_mean), form.score(c.candidate_mean), *_effect_cells(effect)]


# --- times -----------------------------------------------------------------------------------------------------------


def costs(numbers: RunNumbers) -> dict[str, Cost]:
    """Median seconds once for a video, and for each question, of the conditions that answered anything."""
    found = {name: (numbers.prepare_seconds(name), numbers.answer_seconds(name)) for name in numbers.conditions}
    return {name: (once.median, each.median) for name, (once, each) in found.items() if once.n and each.n}


def times(numbers: RunNumbers, plot: str | None) -> Section:
    """Seconds for a video and a question, and from how many questions on preparing pays."""
    rows = [
        [name, form.seconds(numbers.prepare_seconds(name)), form.seconds(numbers.answer_seconds(name))]
        for name in numbers.conditions
    ]
    environment = numbers.settings["environment"]
    blocks: list[Block] = [
        Text(
            f"Median [quartiles] in seconds on {environment.get('device_name')}, of a run begun "
            f"{environment.get('date')}. Prepared once for a video: adapter, prefix, caption, training. A question: "
            "an equal share of its batch, the whole answer, as many tokens as the condition said. Decoding and "
            "preprocessing of the video are the same for all and not counted; video2lora benchmark measures them, and "
            "first tokens."
        ),
        Table(("condition", "prepare, a video", "answer, a question"), rows),
    ]
    paid = costs(numbers)
    rivals = [name for name in dict.fromkeys((numbers.baseline, "video", "kv_cache")) if name in paid]
    if rivals and len(paid) > 1:
        table = []
        for name in paid:
            if paid[name][0] > 0:
                cells = [form.NONE if rival == name else _break_even(paid[name], paid[rival]) for rival in rivals]
                table.append([name, *cells])
        if table:
            blocks += [
                Text("Questions about one video from which on a condition takes less time in all, by medians:"),
                Table(("condition", *(f"against {rival}" for rival in rivals)), table),
            ]
    if plot is not None:
        blocks.append(Figure(plot, "seconds a question against the number of questions about a video"))
    return Section("Times", blocks, timed=True)


def _break_even(ours: Cost, theirs: Cost) -> str:
    number = break_even(ours, theirs)
    return "never" if number is None else f"{number:,}"
