"""The forms a training row is written in, and the one form they are brought to. Plain Python: no I/O, no datasets."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

PLACEHOLDERS = ("<video>", "<image>")
_PLACEHOLDER_AT_AN_END = re.compile(r"^(?:\s*<(?:video|image)>)+\s*|\s*(?:<(?:video|image)>\s*)+$")
_CONVERSATIONS = ("conversations", "messages", "queries")
_USER, _ASSISTANT = {"user", "human"}, {"assistant", "gpt"}
# What a `metadata` field of a published row may call its span.
_SUFFIXES = ("", "_time", "_seconds", "_sec", "_s")
_CLOCK = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:[.,]\d+)?)")


@dataclass(frozen=True)
class FormProblem:
    """Why a row is not in any known form: the field, a kind to count by, and a sentence."""

    field: str
    kind: str
    message: str


@dataclass
class ParsedRow:
    """A row in the one form, as far as it could be read, and what was wrong with it.

    Attributes:
        id: the given one, or a hash of the row's content.
        id_given: whether the row named its own.
        video: a path or URL, or `{"path", "bytes"}`; None when there is none.
        start: seconds, or None for the start of the video.
        end: seconds, or None for its end.
        queries: `{"prompt": str, "response": str | None}` each.
    """

    id: str = ""
    id_given: bool = False
    video: str | dict[str, Any] | None = None
    start: float | None = None
    end: float | None = None
    queries: list[dict[str, str | None]] = field(default_factory=list)
    problems: list[FormProblem] = field(default_factory=list)

    def report(self, field: str, kind: str, message: str) -> None:
        """Note a problem."""
        self.problems.append(FormProblem(field, kind, message))


def parse_row(row: Any, root: str | None = None) -> ParsedRow:
    """Bring one row to the one form; never raises, what is wrong stands in `problems`.

    Read are `video` (or `video_path`), `start` and `end` (seconds; else those of `metadata`, see `_metadata_time`),
    and one of: `prompt` with `response` (or `target_text`); `conversations` (or `messages`, `queries`): prompt and
    response pairs, chat messages (`role`, `content`) or `from` / `value` turns. Turns are taken pair by pair: each
    question about the video stands alone, without the turns before it. Other fields are ignored.

    Args:
        row: a mapping of field to value; None counts as absent.
        root: folder that a relative video path is resolved against; None leaves it.
    """
    parsed = ParsedRow()
    if not isinstance(row, Mapping):
        parsed.report("", "wrong_type", f"the row is {_a(row)}, expected an object with video, prompt and response")
        return parsed
    written = _parse_video(row, root, parsed)
    parsed.start, parsed.end = _parse_time(row, "start", parsed), _parse_time(row, "end", parsed)
    parsed.queries = _parse_queries(row, parsed)
    given = row.get("id")
    if isinstance(given, (str, int)) and not isinstance(given, bool) and given != "":
        parsed.id, parsed.id_given = str(given), True
        return parsed
    if given not in (None, ""):
        parsed.report("id", "wrong_type", f"id is {_a(given)}, expected a string")
    content = [written, parsed.start, parsed.end, [[query["prompt"], query["response"]] for query in parsed.queries]]
    parsed.id = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return parsed


def video_key(video: str | Mapping[str, Any]) -> str:
    """Tell videos apart: the location, or the SHA-256 of the bytes where the row carries them."""
    if isinstance(video, str):
        return video
    data = video.get("bytes")
    return str(video.get("path")) if data is None else "sha256:" + hashlib.sha256(data).hexdigest()


def parse_clock(value: Any) -> float | None:
    """Seconds of "HH:MM:SS.mmm", "MM:SS", "SS" or a number; None for anything else."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    match = _CLOCK.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return None
    hours, minutes, seconds = int(match[1] or 0), int(match[2] or 0), float(match[3].replace(",", "."))
    if (match[1] is not None and minutes > 59) or (match[2] is not None and seconds >= 60):
        return None
    return 3600 * hours + 60 * minutes + seconds


def _parse_video(row: Mapping[str, Any], root: str | None, parsed: ParsedRow) -> str | None:
    """Fill `parsed.video`; return how the row wrote it, which does not depend on the machine."""
    name = "video" if row.get("video") is not None or "video_path" not in row else "video_path"
    video = row.get(name)
    video = getattr(video, "_hf_encoded", video)  # what `datasets` leaves on the torchcodec decoders it hands out
    if video is None or video == "":
        parsed.report(name, "missing_field", f"there is no {name}")
    elif isinstance(video, (str, os.PathLike)):
        written = os.fspath(video)
        parsed.video = _resolve(written, root)
        return written
    elif isinstance(video, (bytes, bytearray, memoryview)):
        parsed.video = {"path": None, "bytes": bytes(video)}
        return video_key(parsed.video)
    elif isinstance(video, Mapping) and (video.get("bytes") is not None or video.get("path")):
        data, path, written = video.get("bytes"), video.get("path"), video_key(video)
        parsed.video = {"path": path if data is not None else _resolve(str(path), root), "bytes": data}
        return written
    elif isinstance(video, Mapping):
        parsed.report(name, "missing_field", f"{name} has neither 'path' nor 'bytes'")
    else:
        parsed.report(name, "wrong_type", f"{name} is {_a(video)}, expected a path, a URL or {{'path', 'bytes'}}")
    return None


def _resolve(path: str, root: str | None) -> str:
    return path if root is None or "://" in path or os.path.isabs(path) else os.path.normpath(os.path.join(root, path))


def _parse_time(row: Mapping[str, Any], name: str, parsed: ParsedRow) -> float | None:
    value = row.get(name)
    if value is None:
        return _metadata_time(row, name, parsed)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        parsed.report(name, "wrong_type", f"{name} is {_a(value)}, expected a finite number of seconds")
        return None
    return float(value)


def _metadata_time(row: Mapping[str, Any], name: str, parsed: ParsedRow) -> float | None:
    """A span in a published row's `metadata` (an object, or one as a JSON string).

    Read is the first of `start`, `start_time`, `start_seconds`, `start_sec`, `start_s` that is there (`end` alike), as
    a number of seconds or "HH:MM:SS.mmm", on the timeline of the row's own video file.
    """
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            return None
    if not isinstance(metadata, Mapping):
        return None
    for key in (name + suffix for suffix in _SUFFIXES):
        if metadata.get(key) is not None:
            seconds = parse_clock(metadata[key])
            if seconds is None:
                message = f"metadata.{key} is {_a(metadata[key])}, expected seconds or HH:MM:SS.mmm"
                parsed.report(f"metadata.{key}", "wrong_type", message)
            return seconds
    return None


def _parse_queries(row: Mapping[str, Any], parsed: ParsedRow) -> list[dict[str, str | None]]:
    given = [name for name in _CONVERSATIONS if row.get(name) is not None]
    if len(given) + (row.get("prompt") is not None) > 1:
        names = ", ".join(given + ["prompt"] * (row.get("prompt") is not None))
        parsed.report(given[0], "ambiguous", f"the row has {names}; give one of them")
        return []
    if not given:
        response = "response" if row.get("response") is not None or "target_text" not in row else "target_text"
        query = _query(row.get("prompt"), row.get(response), ("prompt", response), parsed)
        return [query] if query else []
    name = given[0]
    turns = row[name]
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)):
        parsed.report(name, "wrong_type", f"{name} is {_a(turns)}, expected a list")
        return []
    if not turns:
        parsed.report(name, "missing_field", f"{name} is empty, expected at least one prompt")
        return []
    if not all(isinstance(turn, Mapping) for turn in turns):
        parsed.report(name, "wrong_type", f"{name} holds something that is not an object")
        return []
    if any(turn.get("role") is not None or turn.get("from") is not None for turn in turns):
        return _pair_up(turns, name, parsed)
    queries = []
    for i, turn in enumerate(turns):
        fields = f"{name}[{i}].prompt", f"{name}[{i}].response"
        queries.append(_query(turn.get("prompt"), turn.get("response"), fields, parsed))
    return [query for query in queries if query]


def _query(prompt: Any, response: Any, fields: tuple[str, str], parsed: ParsedRow) -> dict[str, str | None] | None:
    if prompt is None:
        parsed.report(fields[0], "missing_field", f"there is no {fields[0]}")
        return None
    values = zip(fields, (prompt, response), strict=True)
    wrong = [(name, value) for name, value in values if value is not None and not isinstance(value, str)]
    for name, value in wrong:
        parsed.report(name, "wrong_type", f"{name} is {_a(value)}, expected a string")
    return None if wrong else {"prompt": prompt, "response": response}


def _pair_up(turns: Sequence[Mapping[str, Any]], name: str, parsed: ParsedRow) -> list[dict[str, str | None]]:
    """Chat turns as queries; an answer that is null, or missing at the end, is left for a teacher."""
    queries: list[dict[str, str | None]] = []
    asked = False
    for i, turn in enumerate(turns):
        where, speaker = f"{name}[{i}]", turn.get("role") if turn.get("role") is not None else turn.get("from")
        if speaker not in (_ASSISTANT if asked else _USER):
            expected = "an assistant" if asked else "a user"
            advice = "; put a system text into the prompt" if speaker == "system" else ""
            message = f"{where} is a turn of {speaker!r} where one of {expected} was expected{advice}"
            parsed.report(where, "bad_conversation", message)
            return queries
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        text = None if asked and content is None else _text(content, where, parsed)
        if asked:
            queries[-1]["response"] = text
        elif text is None:
            return queries
        else:
            queries.append({"prompt": _PLACEHOLDER_AT_AN_END.sub("", text), "response": None})
        asked = not asked
    return queries


def _text(content: Any, where: str, parsed: ParsedRow) -> str | None:
    """A turn's text; of a list of parts the text parts, since the video has a column of its own."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        parsed.report(where, "wrong_type", f"{where} says {_a(content)}, expected a string or a list of text parts")
        return None
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind == "text" and isinstance(text, str):
            texts.append(text)
        elif kind != "video":
            parsed.report(where, "wrong_type", f"{where} has a part that is neither text nor the video: {_a(part)}")
            return None
    return "\n".join(texts)


def _a(value: Any) -> str:
    """A value for an error message, shortened."""
    if value is None:
        return "null"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
