"""Efficiency: the tables of a sweep as Markdown, from its folder alone."""

from __future__ import annotations

from pathlib import Path

from ..data.files import write_atomically
from . import efficiency_paper as paper
from .efficiency_results import Cell, Results, break_even, decode_key, preprocess_key, query_key
from .report_document import markdown_table

REPORT_FILE = "report.md"
NONE = "-"
BEYOND = "†"


def write_report(results: Results, output_dir: Path) -> Path:
    """Write `report.md` into a folder; return its path."""
    path = output_dir / REPORT_FILE
    write_atomically(path, report(results).encode())
    return path


def report(results: Results) -> str:
    """Everything measured, in tables; what is missing says why."""
    settings = results.settings
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    parts = [
        f"# Efficiency: {settings['model']}",
        f"{settings['device']}, {settings['dtype']}, weights: {settings['weights']}; {versions}. Medians after "
        f"warm-up, quartiles in brackets; answers of {1 + settings['new_tokens']} tokens, greedy, by transformers' "
        "`generate` with its growing cache. GB are 10^9 bytes, peak above the weights and the pixels. Time to the "
        "first token counts from frames that are preprocessed and on the device.",
        f"{BEYOND} more than the {settings['trained_context']:,} positions the text model was trained for: speed is "
        "measured, what would be answered is not to be trusted.",
        "## Questions without a video in their context",
        _queries(results),
        "## The video in the context, and making an adapter of it",
        "Resolutions of one row are the same work on the device. Above forward: what internalizing takes more than a "
        "cold first token; less than nothing where leaving out the last layer saves more than the hypernetwork takes.",
        _cases(results),
        "## Before the device: decoding and preprocessing",
        _cpu(results),
        "## From how many questions on an adapter takes less time",
        f"On the device: by whole answers of {1 + settings['new_tokens']} tokens, and by the time to the first token "
        "alone; attached / merged (merging included). The first question with a reused cache is answered cold and "
        "leaves it.",
        _break_even(results),
        _verdict(results),
    ]
    size = paper.size_of(str(settings["model"]))
    if size is not None:
        parts += ["## Against the paper", _paper_text(), _paper(results, size)]
    return "\n\n".join(part for part in parts if part) + "\n"


def cases_of(results: Results) -> list[tuple[Cell, str]]:
    """One cell of each case, and the columns that share it, in order."""
    shared: dict[str, list[Cell]] = {}
    for cell in results.cells:
        shared.setdefault(cell.case, []).append(cell)
    return [(cells[0], ", ".join(cell.column for cell in cells)) for cells in shared.values()]


def _queries(results: Results) -> str:
    rows = []
    for name in ("text_only", "adapter_attached", "adapter_merged"):
        row = results.rows.get(query_key(name))
        if row is None or row["status"] != "ok":
            rows.append([_title(name), row["status"] if row else "not measured", *[NONE] * 5])
            continue
        size = row.get("adapter_bytes")
        rows.append(
            [
                _title(name),
                f"{row['context_tokens']:,}",
                _spread(row["first_token"]),
                _spread(row["per_token"]),
                _gigabytes(row["peak_bytes"]),
                NONE if size is None else f"{size / 1e6:.2f}",
                _spread(row.get("merge")),
            ]
        )
    header = ["", "tokens", "first token ms", "ms a token", "peak GB", "adapter MB (bfloat16 file)", "merging ms"]
    return markdown_table(header, rows)


def _cases(results: Results) -> str:
    header = ["frames", "resolution", "tokens", "visual", "encode ms", "cold: first token ms", "cached frames ms"]
    header += ["KV cache ms", "ms a token", "internalize ms", "above forward ms", "peak GB cold", "peak GB KV"]
    header += ["peak GB internalize", "KV cache MB"]
    rows = []
    for cell, columns in cases_of(results):
        cold, making = results.seconds(cell, "video_cold"), results.seconds(cell, "internalize", "seconds")
        above = NONE if cold is None or making is None else f"{1e3 * (making - cold):+.1f}"
        size = results.get(cell, "kv_cache", "kv_cache_bytes")
        rows.append(
            [
                f"{cell.frames:,}",
                f"{columns} ({cell.tiles} tile{'s' * (cell.tiles > 1)})",
                f"{cell.context_tokens:,}{BEYOND * results.beyond_training(cell)}",
                f"{cell.visual_tokens:,}",
                _spread(results.get(cell, "video_cold", "encode")),
                _measured(results, cell, "video_cold", "first_token"),
                _measured(results, cell, "video_cached", "first_token"),
                _measured(results, cell, "kv_cache", "first_token"),
                _spread(results.get(cell, "kv_cache", "per_token")),
                _measured(results, cell, "internalize", "seconds"),
                above,
                *(_gigabytes(results.get(cell, c, "peak_bytes")) for c in ("video_cold", "kv_cache", "internalize")),
                NONE if size is None else f"{size / 1e6:,.1f}",
            ]
        )
    return markdown_table(header, rows)


def _cpu(results: Results) -> str:
    settings = results.settings
    columns = list(dict.fromkeys((cell.path, cell.longest_edge, cell.column) for cell in results.cells))
    rows, scaled, about = [], set(), None
    for frames in sorted({cell.frames for cell in results.cells}):
        decode = results.rows.get(decode_key(frames))
        about = about or (decode or {}).get("video")
        used = f"{decode['frames_used']:,}" if decode else NONE
        line = [f"{frames:,}", used, _spread((decode or {}).get("seconds"))]
        for path, edge, _ in columns:
            row = results.rows.get(preprocess_key(path, frames, edge))
            scaled |= {row["scaled_from"]} if row and "scaled_from" in row else set()
            line.append(("~" if row and "scaled_from" in row else "") + _spread((row or {}).get("seconds")))
        rows.append(line)
    header = ["frames", "really used", "decode ms", *(f"preprocess ms, {column}" for *_, column in columns)]
    notes = []
    if about:
        seconds = about["frames"] / about["fps"]
        notes.append(
            f"An H.264 file of {about['width']} x {about['height']} pixels, {about['frames']:,} frames in "
            f"{seconds:.1f} s, {about['bytes'] / 1e6:.1f} MB, made by the benchmark, decoded with PyAV and shrunk to "
            f"{max(settings['longest_edges'])} pixels. SmolVLM2's own sampler would take {paper.most_frames(seconds)} "
            f"frames of it, however many were asked for. {settings['threads']} threads."
        )
    if scaled:
        notes.append(f"~: reckoned from {max(scaled)} frames, of which each costs the same.")
    return " ".join(notes) + "\n\n" + markdown_table(header, rows)


def _break_even(results: Results) -> str:
    rivals = {"video_cold": "cold", "video_cached": "cached frames", "kv_cache": "KV cache"}
    header = ["frames", "resolution", *rivals.values(), *(f"{rival}, first token" for rival in rivals.values())]
    header.append("KV / adapter bytes")
    adapter = (results.rows.get(query_key("adapter_attached")) or {}).get("adapter_bytes")
    rows = []
    for cell, columns in cases_of(results):
        if "adapter_attached" not in results.costs(cell) or "video_cold" not in results.costs(cell):
            continue
        line = [f"{cell.frames:,}", columns]
        for costs in (results.costs(cell), results.costs(cell, more_tokens=0)):
            for rival in rivals:
                ours = ("adapter_attached", "adapter_merged")
                both = [break_even(costs[name], costs[rival]) for name in ours if name in costs and rival in costs]
                line.append(" / ".join("never" if n is None else f"{n:,}" for n in both) or NONE)
        cache = results.get(cell, "kv_cache", "kv_cache_bytes")
        line.append(NONE if not adapter or not cache else f"{cache / adapter:,.0f}x")
        rows.append(line)
    return markdown_table(header, rows)


def _verdict(results: Results) -> str:
    """Where the KV cache is the better choice by time."""
    better: dict[str, list[str]] = {"adapter_attached": [], "adapter_merged": []}
    measured = 0
    for cell, columns in cases_of(results):
        costs = results.costs(cell)
        if "kv_cache" not in costs or "adapter_merged" not in costs:
            continue
        measured += 1
        for name, cells in better.items():
            if costs["kv_cache"][1] <= costs[name][1]:
                cells.append(f"{cell.frames:,} frames at {columns}")
    if not measured:
        return ""
    lines = []
    for name, cells in better.items():
        where = "nowhere" if not cells else f"in {len(cells)} of {measured} cases ({'; '.join(cells)})"
        lines.append(f"A question on the reused KV cache takes no longer than on the {_title(name)} {where}.")
    return " ".join(lines)


def _paper_text() -> str:
    return (
        "How many times sooner the first token comes on an attached adapter than with the video in the context, cold: "
        "on the device alone / with decoding and preprocessing, which cold answers need again for every question; in "
        "brackets what the paper prints (6-80x by its text). Then how many times fewer tokens a question has (paper: "
        "up to 1,500x). Here every frame asked for is really used; the paper's sampler takes a frame a second and "
        "saturates near 43 frames a clip, so its rows from 128 frames up all measure the same."
    )


def _paper(results: Results, size: str) -> str:
    edges = list(dict.fromkeys(cell.longest_edge for cell in results.cells if cell.path == "images"))
    cells = {(cell.frames, cell.longest_edge): cell for cell in results.cells if cell.path == "images"}
    attached = results.query_seconds("adapter_attached")
    rows = []
    for frames in sorted({frames for frames, _ in cells}):
        line = [f"{frames:,}"]
        for edge in edges:
            cell = cells.get((frames, edge))
            cold = None if cell is None else results.seconds(cell, "video_cold")
            if cell is None or edge is None or cold is None or attached is None:
                line.append(NONE if cell is None else results.status(cell, "video_cold"))
                continue
            reading = results.reading_seconds(cell)
            whole = NONE if reading is None else f"{(cold + reading) / attached:.1f}x"
            line.append(f"{cold / attached:.1f}x / {whole} ({_times(paper.speed_up(size, frames, edge))})")
        for edge in edges:
            cell = cells.get((frames, edge))
            if cell is None or edge is None:
                line.append(NONE)
                continue
            fewer = cell.context_tokens / results.settings["text_tokens"]
            line.append(f"{fewer:,.0f}x ({_times(paper.token_reduction(size, frames, edge))})")
        rows.append(line)
    header = ["frames", *(f"sooner, {edge} px" for edge in edges), *(f"fewer tokens, {edge} px" for edge in edges)]
    return markdown_table(header, rows)


def _title(condition: str) -> str:
    return {
        "text_only": "base alone (text only)",
        "adapter_attached": "adapter attached",
        "adapter_merged": "adapter merged",
    }[condition]


def _measured(results: Results, cell: Cell, condition: str, name: str) -> str:
    status = results.status(cell, condition)
    return _spread(results.get(cell, condition, name)) if status == "ok" else status


def _spread(timing: dict[str, float] | None) -> str:
    """Milliseconds: the median and, where there were several runs, the quartiles."""
    if timing is None:
        return NONE
    median, low, high = (1e3 * timing[name] for name in ("median", "low", "high"))
    digits = 1 if median < 1000 else 0
    spread = f" [{low:,.{digits}f}, {high:,.{digits}f}]" if timing["runs"] > 1 else ""
    return f"{median:,.{digits}f}{spread}"


def _gigabytes(size: int | None) -> str:
    return NONE if size is None else f"{size / 1e9:.2f}"


def _times(number: int | None) -> str:
    return NONE if number is None else f"{number:,}x"
