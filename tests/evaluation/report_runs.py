"""Synthetic finished runs for the tests of reports, numbers from a seed; and what a reader sees of a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt

from video2lora.evaluation.records import FORMAT_VERSION, make_records, with_scores, write_records

CONDITIONS = ("video", "adapter", "no_adapter", "kv_cache")
METRICS = ("token_f1", "exact_match", "repetition", "empty")
MEANS = {"video": 0.6, "adapter": 0.56, "no_adapter": 0.2, "kv_cache": 0.6}
PREPARE = {"video": 0.0, "adapter": 0.5, "no_adapter": 0.0, "kv_cache": 0.9}
ANSWER = {"video": 0.8, "adapter": 0.1, "no_adapter": 0.1, "kv_cache": 0.12}

Change = Callable[[dict[str, Any]], None]


def settings(conditions: Sequence[str] = CONDITIONS, **changes: Any) -> dict[str, Any]:
    """What `run.json` holds; `changes` by dotted name, such as `benchmark__name`."""
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "benchmark": {
            "name": "made_up",
            "version": 1,
            "title": "Made up",
            "dataset": "somebody/made-up",
            "revision": "main",
            "split": "test",
            "seed": 42,
            "num_available": 999,
            "tasks": ["colour", "count"],
            "digest": "d" * 64,
            "num_samples": 40,
            "num_questions": 120,
            "skipped": {"row that is there twice": 2},
        },
        "model": {
            "id": "/home/somebody/models/video2lora-500M",
            "hypernetwork_revision": None,
            "hypernetwork_sha256": "e" * 64,
            "rank": 16,
            "lora_scaling": 128.0,
            "target_modules": ["down_proj"],
            "dtype": "bfloat16",
            "attn_implementation": "sdpa",
            "device": "cpu",
        },
        "base": {
            "id": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
            "revision": "abc",
            "generation_config": {},
            "chat_template_sha256": "f" * 64,
        },
        "conditions": [{"name": name, "settings": {}} for name in conditions],
        "decoding": {"strategy": "greedy", "max_new_tokens": 64, "batch_size": 8},
        "sampling": {"fps": None, "num_frames": 12, "longest_edge": 384, "internalization_prompt": "Internalize."},
        "environment": {
            "versions": {"video2lora": "0.1.0", "torch": "2.15.0"},
            "device_name": "cpu",
            "date": "2026-01-01T00:00:00+00:00",
        },
        "seed": 0,
        "metrics": ["token_f1", "exact_match", "repetition", "empty"],
        "margins": {"token_f1": 0.05},
        "alpha": 0.025,
        "baseline": "video",
        "judge": None,
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        part = document
        for key in path:
            part = part[key]
        part[last] = value
    return document


def write_run(
    folder: Path,
    *,
    num_samples: int = 40,
    per_sample: int = 3,
    tasks: Sequence[str] = ("colour", "count"),
    conditions: Sequence[str] = CONDITIONS,
    means: Mapping[str, float] = MEANS,
    unreadable: Sequence[int] = (),
    seed: int = 0,
    slower: float = 1.0,
    change: Change | None = None,
    **changes: Any,
) -> Path:
    """Write `run.json` and `records.parquet` of a finished run.

    Args:
        folder: of the run.
        num_samples, per_sample: videos, and questions about each.
        tasks: of the questions in turn.
        conditions, means: names, and about what they score in token-F1.
        unreadable: places of videos that could not be read.
        seed: of the scores.
        slower: factor of all times.
        change: may change each row, which holds its scores too.
        changes: of the settings.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for sample in range(num_samples):
        level = rng.normal(0, 0.1)
        for number in range(per_sample):
            question = sample * per_sample + number
            for name in conditions:
                row: dict[str, Any] = {
                    "condition": name,
                    "sample_id": f"video-{sample}",
                    "video_id": f"video-{sample}",
                    "question_id": f"q{question}",
                    "task": tasks[question % len(tasks)],
                    "prompt": f"What is to be seen, {question}?",
                    "question": None,
                    "references": [f"thing {question}", "a thing"],
                }
                score = float(np.clip(means.get(name, 0.5) + level + rng.normal(0, 0.15), 0, 1))
                repetition = float(rng.random() < 0.1) * 0.5
                tokens = int(rng.integers(2, 30))
                wobble = slower * (1 + 0.2 * rng.random())
                if sample in unreadable:
                    row |= {"error": "cannot be read", "scores": dict.fromkeys(METRICS)}
                else:
                    row |= {
                        "answer": f"{name} says {question}",
                        "num_tokens": tokens,
                        "ended": tokens < 28,
                        "context_tokens": 900 + question if name == "video" else 20,
                        "visual_tokens": 800 if name == "video" else 0,
                        "num_frames": 0 if name == "no_adapter" else 12,
                        "prepare_seconds": PREPARE.get(name, 1.0) * slower,
                        "answer_seconds": ANSWER.get(name, 0.3) * wobble,
                        "scores": {
                            "token_f1": score,
                            "exact_match": float(score > 0.6),
                            "repetition": repetition,
                            "empty": 0.0,
                        },
                    }
                if change is not None:
                    change(row)
                rows.append(row)
    scores = [row.pop("scores") for row in rows]
    table = make_records(rows)
    for metric in scores[0]:
        table = with_scores(table, metric, [score[metric] for score in scores])
    folder.mkdir(parents=True)
    document = settings(conditions, **changes)
    document["benchmark"] |= {"num_samples": num_samples, "num_questions": num_samples * per_sample}
    (folder / "run.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    write_records(folder, table)
    return folder


def table_after(text: str, title: str, number: int = 0) -> list[dict[str, str]]:
    """Rows of the tables of Markdown behind a heading, as a reader of Markdown sees them."""
    tokens = MarkdownIt().enable("table").parse(text[text.index(title) :])
    tables: list[list[list[str]]] = []
    for place, token in enumerate(tokens):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("td_open", "th_open"):
            children = tokens[place + 1].children or []
            # hard line breaks in a cell are <br>
            tables[-1][-1].append("".join("\n" if c.content == "<br>" else c.content for c in children))
    header, *body = tables[number]
    return [dict(zip(header, row, strict=True)) for row in body]


def files_of(
    folder: Path, names: Iterable[str] = ("report.md", "report.html", "plots", "paper_verdicts.md")
) -> dict[str, bytes]:
    """Bytes of a report's files, without the frames."""
    paths = [
        p for name in names for p in ((folder / name).rglob("*") if (folder / name).is_dir() else [folder / name])
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}
