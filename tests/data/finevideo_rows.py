"""Synthetic FineVideo: rows in the published schema, with as many scenes as wanted."""

from __future__ import annotations

from typing import Any


def stamp(seconds: float) -> str:
    return f"{int(seconds // 3600):02d}:{int(seconds // 60) % 60:02d}:{seconds % 60:06.3f}"


def scene(start: float, end: float) -> dict[str, Any]:
    stamps = {"start_timestamp": stamp(start), "end_timestamp": stamp(end)}
    return {"sceneId": 1, "title": "A scene", "timestamps": stamps}


def metadata(name: str, num_scenes: int = 5, seconds: float = 10.0) -> dict[str, Any]:
    return {
        "original_video_filename": f"{name}.mp4",
        "original_json_filename": f"{name}.json",
        "duration_seconds": int(num_scenes * seconds),
        "content_metadata": {"scenes": [scene(i * seconds, (i + 1) * seconds) for i in range(num_scenes)]},
    }


def rows(count: int, num_scenes: int = 5) -> list[dict[str, Any]]:
    return [{"mp4": b"video %d" % i, "json": metadata(f"clip_{i:04d}", num_scenes)} for i in range(count)]
