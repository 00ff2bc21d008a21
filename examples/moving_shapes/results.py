"""Moving shapes, stage 3: results.md and its plots, from what was declared and the records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clips import FRAME_NUMBERS
from proof_numbers import NOT_RUN, Claim, Numbers, read_runs
from proof_plots import draw_bars, draw_composition, draw_sweep
from proof_runs import SEGMENTS
from results_main import (
    against_section,
    caption_claims,
    captions_only_section,
    control_claims,
    inferiority_claims,
    learnt_claim,
    main_section,
    wrong_answers,
)
from results_sweeps import (
    composition_claims,
    composition_kept,
    composition_section,
    degeneration_section,
    loss_claims,
    order_section,
    sweep_section,
)
from results_text import table

Section = tuple[list[Claim], list[str]]
TRAINED_FRAMES = (min(FRAME_NUMBERS), max(FRAME_NUMBERS))


def write_results(folder: Path, output: Path, captions_only: Path | None = None) -> None:
    """Write the page and the plots beside it, of the runs that are finished; what is missing is said."""
    from prove import Job, read_declared

    declared, wanted = read_declared(folder)
    runs, missing = read_runs(folder, wanted, Job.all_of)
    other: Numbers | None = None
    if captions_only is not None:
        found, _ = read_runs(captions_only, {"main": read_declared(captions_only)[1]["main"]}, Job.all_of)
        other = found.get("main")
        if other is None:
            missing.append(f"main of {captions_only.name}")
    output.parent.mkdir(parents=True, exist_ok=True)
    claims, parts = [], []
    for section in (_main, _unseen, _frames, _pixels, _composition):
        more, text = section(runs, output)
        claims += more
        parts += text
    if other is not None and "main" in runs:
        parts += captions_only_section(runs["main"], other)
    page = [*head(declared, claims, missing), *failing(claims, runs), *parts, *settings_section(runs)]
    part = output.with_suffix(".part")
    part.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    part.replace(output)


def head(declared: dict[str, Any], claims: Sequence[Claim], missing: Sequence[str]) -> list[str]:
    """The title, what was declared, and whether each claim holds."""
    told = (
        f"Declared on {declared['date'][:10]}, before the first answer: a difference of {declared['margin']} of exact "
        f"match to the video in context does not matter; an adapter may lose {declared['loss']} from its accuracy at "
        f"12 frames; a composed one keeps {declared['kept']:.0%} of the whole video's; the VLM itself answers "
        f"{declared['learnt']:.0%}. Alpha {declared['alpha']} for each one-sided test, 95 % intervals, Holm's "
        "correction where several tasks are claimed together. FAIL: the numbers say otherwise; not shown: they say "
        "too little, the interval reaching over the margin; measured: by the number itself, as are what the VLM "
        "answers and facts of captions. Answers are generated greedily and compared as a whole; "
        "every clip is held out. Written by `python prove.py report` from the records of all answers."
    )
    rows = [[claim.what, claim.verdict, claim.told] for claim in claims]
    parts = ["# Moving shapes: results", told, "## In short", table(["claim", "verdict", "numbers"], rows, 3)]
    return [*parts, f"Not run, or not finished: {', '.join(missing)}."] if missing else parts


def failing(claims: Sequence[Claim], runs: dict[str, Numbers]) -> list[str]:
    """Every claim that does not hold, or not of every part, with its numbers, and some wrong answers."""
    lines = []
    for claim in claims:
        if claim.holds is False or claim.failures:
            but = ". It holds over all, but not of each:" if claim.holds else ""
            lines.append(f"- **{claim.what}** ({claim.verdict.strip('*')}): {claim.told}{but}")
            lines += [f"  - {failure}" for failure in claim.failures]
    nothing = "Every declared claim of the runs that are finished holds."
    parts = ["## What fails, or is not shown", "\n".join(lines) or nothing]
    return parts + wrong_answers(runs["main"]) if "main" in runs else parts


def _main(runs: dict[str, Numbers], output: Path) -> Section:
    if "main" not in runs:
        return [Claim("12 frames", None, NOT_RUN)], []
    run, plot = runs["main"], output.with_name("main_accuracy.png")
    draw_bars(run, plot)
    claims = [
        learnt_claim(run, "Video in context"),
        *inferiority_claims(run, "12 frames"),
        *control_claims(run),
        *caption_claims(run),
    ]
    return claims, main_section(run, plot)


def _unseen(runs: dict[str, Numbers], output: Path) -> Section:
    claims, parts = [], []
    for name, title in (
        ("phrasings", "Phrasings that the hypernetwork was never trained on"),
        ("combinations", "Pairs of colour and shape that neither model was ever trained on"),
    ):
        if name not in runs:
            claims.append(Claim(title, None, NOT_RUN))
            continue
        claims += [learnt_claim(runs[name], title), *inferiority_claims(runs[name], title)]
        parts += against_section(runs[name], title)
    return claims, parts


def _sweep(
    runs: dict[str, Numbers], prefix: str, title: str, told: str, output: Path, trained: Sequence[int]
) -> Section:
    swept = {int(name.removeprefix(prefix)): run for name, run in runs.items() if name.startswith(prefix)}
    base = runs.get("main")
    if base is None or not swept:
        return [Claim(title, None, NOT_RUN)], []
    if prefix == "frames_":
        swept[12] = base
    swept = dict(sorted(swept.items()))
    plot = output.with_name(f"{prefix}accuracy.png")
    draw_sweep(title.lower(), swept, trained, plot)
    others = {number: run for number, run in swept.items() if run is not base}
    return loss_claims(others, base, title), sweep_section(title, told, swept, base, plot)


def _frames(runs: dict[str, Numbers], output: Path) -> Section:
    told = (
        "Where fewer than 12 frames are sampled, some answers are not in them; `decided` counts only questions whose "
        "answer every scene that fits the frames shares. Longer clips are the same 12 seconds shown in more frames. "
        f"Shaded in the plot: {TRAINED_FRAMES[0]} to {TRAINED_FRAMES[1]} frames, which training draws from."
    )
    claims, parts = _sweep(runs, "frames_", "Frames", told, output, TRAINED_FRAMES)
    swept = {run.run.num_frames: run for name, run in runs.items() if name.startswith("frames_") or name == "main"}
    return claims, parts + (degeneration_section(dict(sorted(swept.items()))) if parts else [])


def _pixels(runs: dict[str, Numbers], output: Path) -> Section:
    told = (
        "The path of pictures: each of 12 frames is given as a picture of so many pixels a side, which the processor "
        "cuts into tiles of 64 (1, 1, 5 and 17 a frame). The video path, on which the hypernetwork is trained, brings "
        "every frame to 64 pixels, so there is nothing to sweep on it. Losses are from the 12 frames of video."
    )
    return _sweep(runs, "pixels_", "Pixels of frames given as pictures", told, output, ())


def _composition(runs: dict[str, Numbers], output: Path) -> Section:
    claims, parts = [], []
    names = ["composition", *(f"across_{n}" for n in SEGMENTS)]
    found = {name: runs[name] for name in names if name in runs}
    for name in names:
        claims += composition_claims(found[name]) if name in found else [Claim(f"Composition: {name}", None, NOT_RUN)]
    kept = {what: values for name, run in found.items() for what, values in composition_kept(run).items()}
    if found:
        parts.append("## Composition")
        plot = output.with_name("composition.png")
        joined: dict[str, dict[int, tuple[float, float, float]]] = {}
        for (what, segments), values in kept.items():
            joined.setdefault(what, {})[segments] = values
        full = {what: values for what, values in joined.items() if set(values) == set(SEGMENTS)}
        if full:
            draw_composition(full, plot)
            parts.append(f"![What composed adapters keep]({plot.name})")
        for run in found.values():
            parts += composition_section(run)
        parts += order_section(found)
    return claims, parts


def settings_section(runs: dict[str, Numbers]) -> list[str]:
    """What was run, on how many clips, when and with what."""
    rows: list[list[str]] = []
    made: dict[str, list[str]] = {}
    for name, run in runs.items():
        declared, environment = run.run, run.settings["environment"]
        pixels = f"pictures of {declared.longest_edge}" if declared.longest_edge else "video, 64"
        rows.append(
            [name, declared.split, f"{declared.num_frames} of {declared.length}", pixels, f"{run.num_clips:,}",
             f"{len(run.asked):,}", str(len(run.conditions)), str(run.settings["decoding"]["batch_size"]),
             run.dates[0][:10]]
        )  # fmt: skip
        versions = ", ".join(f"{package} {number}" for package, number in environment["versions"].items())
        model = run.settings["model"]
        identity = ", ".join(f"{key} {value}" for key, value in model.items() if key != "id" and value is not None)
        made.setdefault(f"{environment['device_name']}; {versions}; {identity}", []).append(name)
    header = ["run", "split", "frames", "pixels", "clips", "questions", "conditions", "batch", "date"]
    lines = "\n".join(
        f"- {', '.join(names) if len(made) > 1 else 'All runs'}: {what}." for what, names in made.items()
    )
    return ["## Settings", table(header, rows, 4, 1), lines] if rows else []
