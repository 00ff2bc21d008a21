"""Evaluation: what lmms-eval's requests ask, as queries about videos. Does not import lmms-eval."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..data.forms import PLACEHOLDERS
from ..video import is_frame
from .lmms_eval_answers import Answerer, Generation, Query

MAX_NEW_TOKENS = 1024
"""Where a task does not say: what most of lmms-eval's own models take."""

# They say how to sample, or how LLaVA cuts pictures: nothing that greedy decoding of text would heed.
_WITHOUT_EFFECT = {"top_p", "top_k", "seed", "image_aspect_ratio"}
_NEUTRAL: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}

_PLACEHOLDER = "(?:" + "|".join(map(re.escape, PLACEHOLDERS)) + ")"
_PLACEHOLDERS_AT_AN_END = re.compile(rf"^(?:\s*{_PLACEHOLDER})+\s*|\s*(?:{_PLACEHOLDER}\s*)+$")

Visuals = Callable[[], Any]


def parse_generation_kwargs(kwargs: Mapping[str, Any]) -> Generation:
    """What a task's `generation_kwargs` ask for.

    Greedy decoding is `do_sample: false`, or a temperature of 0, or neither word; empty `until` strings count as none.

    Raises:
        ValueError: they ask for sampling, beams, or anything else that would not be done; it names them all.
    """
    rest = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
    until, max_new_tokens = rest.pop("until", None) or [], rest.pop("max_new_tokens", None)
    do_sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
    wrong = {name: value for name, value in rest.items() if value is not None and _NEUTRAL.get(name) != value}
    if do_sample or (do_sample is None and temperature):
        wrong |= {"do_sample": do_sample, "temperature": temperature}
    if wrong:
        raise ValueError(
            f"generation_kwargs {wrong}: answers are greedy, and stop at `until` or after `max_new_tokens`; nothing "
            "else is supported. Override them, as in --gen_kwargs do_sample=False,temperature=0,num_beams=1."
        )
    strings = (until,) if isinstance(until, str) else tuple(until)
    limit = MAX_NEW_TOKENS if max_new_tokens is None else int(max_new_tokens)
    if limit < 1:
        raise ValueError(f"generation_kwargs max_new_tokens={max_new_tokens}: expected at least 1.")
    return Generation(limit, tuple(string for string in strings if string))


def generation_queries(requests: Sequence[Any], task_dict: Mapping[str, Any]) -> list[Query]:
    """Queries of `generate_until` requests: `(context, generation_kwargs, doc_to_visual, doc_id, task, split)`.

    Args:
        requests: what has such `args`.
        task_dict: `task_dict[task][split][doc_id]` is a row of a task's data.

    Raises:
        ValueError: visuals that are no video, or generation arguments that are not supported.
    """
    docs = _Docs(task_dict)
    queries = []
    for request in requests:
        context, kwargs, doc_to_visual, *place = request.args
        queries.append(docs.query(context, doc_to_visual, place, generation=parse_generation_kwargs(kwargs)))
    return queries


def scoring_queries(requests: Sequence[Any], task_dict: Mapping[str, Any]) -> list[Query]:
    """Queries of `loglikelihood` requests: `(context, continuation, doc_to_visual, doc_id, task, split)`.

    The continuation is text (a choice of a multiple-choice task), or what gives it when called with the row; one with
    nothing behind it has no video.

    Raises:
        ValueError: visuals that are no video.
    """
    docs = _Docs(task_dict)
    queries = []
    for request in requests:
        context, continuation, *rest = request.args
        doc_to_visual, *place = rest or [None]
        if not isinstance(continuation, str):
            continuation = str(continuation(docs.row(place)))
        queries.append(docs.query(context, doc_to_visual, place, continuation=continuation))
    return queries


def answer_rounds(answerer: Answerer, requests: Sequence[Any], task_dict: Mapping[str, Any]) -> list[list[str]]:
    """Answer `generate_until_multi_round` requests, all of them round by round so that they share batches.

    A request is `(context, generation_kwargs, doc_to_visual, doc_to_text, doc_id, task, split)`. After each round
    `doc_to_text(row, previous_output=, round_idx=, previous_round_info=)` gives the next one's visuals and text,
    whether it is over, the outputs so far, and what it wants to be told again.

    Returns:
        For each request its outputs, one a round.

    Raises:
        ValueError: as `generation_queries`.
    """
    docs = _Docs(task_dict)
    outputs: list[list[str]] = [[] for _ in requests]
    infos: list[Any] = [None] * len(requests)
    places = [request.args[4:] for request in requests]
    options = [parse_generation_kwargs(request.args[1]) for request in requests]
    queries = {
        index: docs.query(request.args[0], request.args[2], places[index], generation=options[index])
        for index, request in enumerate(requests)
    }
    round_idx = 0
    while queries:
        for index, answer in zip(queries, answerer.generate(list(queries.values())), strict=True):
            outputs[index].append(answer.text)
        round_idx += 1
        following = {}
        for index in queries:
            visuals, text, over, said, infos[index] = requests[index].args[3](
                docs.row(places[index]),
                previous_output=list(outputs[index]),
                round_idx=round_idx,
                previous_round_info=infos[index],
            )
            outputs[index] = list(said)
            if not over:
                following[index] = make_query(text, partial(_same, visuals), generation=options[index])
        queries = following
    return outputs


def _same(value: Any) -> Any:
    return value


class _Docs:
    """Rows of tasks; the several requests about one row look at its visuals once to find out which video it is."""

    def __init__(self, task_dict: Mapping[str, Any]) -> None:
        self._task_dict = task_dict
        self._last: tuple[Any, str | None] | None = None

    def row(self, place: Sequence[Any]) -> Any:
        doc_id, task, split = place
        return self._task_dict[task][split][doc_id]

    def query(self, context: str, doc_to_visual: Any, place: Sequence[Any], **wanted: Any) -> Query:
        if doc_to_visual is None:
            return make_query(context, None, **wanted)

        def load() -> Any:
            return doc_to_visual(self.row(place))

        known = self._last[1] if self._last is not None and self._last[0] == (doc_to_visual, *place) else ""
        query = make_query(context, load, known, **wanted)
        self._last = ((doc_to_visual, *place), query.key)
        return query


def make_query(text: str, visuals: Visuals | None, key: str | None = "", **wanted: Any) -> Query:
    """A query of a task's text and what loads its visuals.

    Args:
        text: what is asked. A placeholder of the video at an end is dropped, since the video has a place of its own.
        visuals: gives what a task's `doc_to_visual` gives.
        key: of the video, where it is known already.
        wanted: `generation` or `continuation` of the query.

    Raises:
        ValueError: the visuals are no video, or a placeholder stands in the middle of the text.
    """
    prompt = _without_placeholder(text)
    if visuals is None or key is None:
        return Query(prompt, **wanted)
    if key == "":
        key = key_of(as_video(visuals()))
    return Query(prompt, key, None if key is None else lambda: as_video(visuals()), **wanted)


def as_video(visuals: Any) -> Any:
    """The one video among a task's visuals: a path or URL, or a list of frames (one picture is one frame); or None.

    Raises:
        ValueError: there are several videos, or something else.
    """
    items = _flatten(visuals)
    if not items:
        return None
    if all(is_frame(item) for item in items):
        return items
    if len(items) == 1 and isinstance(items[0], (str, os.PathLike)):
        return items[0]
    if len(items) == 1 and getattr(items[0], "ndim", 0) == 4:
        return items[0]
    kinds = ", ".join(sorted({type(item).__name__ for item in items}))
    raise ValueError(
        f"{len(items)} visuals of type {kinds}: expected one video as a path, or its frames as pictures of one size. "
        "Several videos at once, and audio, are not supported."
    )


def key_of(video: Any) -> str | None:
    """What two videos have in common if and only if they are known to be one: the file's place, or the pixels."""
    if video is None:
        return None
    if isinstance(video, (str, os.PathLike)):
        name = os.fspath(video)
        return name if "://" in name or name.startswith("data:") else os.path.realpath(name)
    digest = hashlib.sha256()
    for frame in video:
        pixels = np.asarray(frame.convert("RGB") if hasattr(frame, "convert") else frame)
        digest.update(f"{pixels.shape} {pixels.dtype} ".encode())
        digest.update(np.ascontiguousarray(pixels).data)
    return f"frames {digest.hexdigest()}"


def _flatten(visuals: Any) -> list[Any]:
    if visuals is None:
        return []
    if isinstance(visuals, (list, tuple)):
        return [item for part in visuals for item in _flatten(part)]
    return [visuals]


def _without_placeholder(text: str) -> str:
    stripped = _PLACEHOLDERS_AT_AN_END.sub("", text)
    found = [mark for mark in PLACEHOLDERS if mark in stripped]
    if found:
        raise ValueError(f"{found[0]} stands in the middle of {text!r}: text between pictures is not supported.")
    return stripped
