"""Efficiency: how many tokens a video is, by the arithmetic of SmolVLM's and Idefics3's processors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeAlias

from ..modeling.configuration import INTERNALIZATION_PROMPT

QUESTION = "What is happening in this video?"
MAX_EDGE = 4096
"""Pixels beyond which the processors enlarge nothing."""

Path: TypeAlias = Literal["images", "video"]
"""Frames as images, which are cut into tiles; or as a video, whose frames are one tile whatever their size."""
Run: TypeAlias = tuple[bool, int]
"""So many tokens in a row that stand for pixels, or that do not."""

# As SmolLM2's tokenizer cuts English: digits alone, a space with the word behind it, newlines one by one before it.
_WORDS = re.compile(r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s")
_WORDS_OF_TWO_TOKENS = {"Assistant", "Internalize", "captioning"}


@dataclass(frozen=True)
class PromptRules:
    """How a base's processor turns frames into tokens.

    Attributes:
        tile: pixels a side of what the vision tower sees at once.
        tokens_per_tile: visual tokens of a tile.
        image_token_id: the token that stands for pixels.
        count_text: tokens of a text without special ones.
    """

    tile: int
    tokens_per_tile: int
    image_token_id: int
    count_text: Callable[[str], int]


@dataclass(frozen=True)
class Case:
    """One thing to measure: so many frames of so many tiles.

    Attributes:
        path: how the frames go in.
        frames: number of frames.
        rows, cols: tiles a frame is cut into (and one of the whole frame is added); 0 x 0 where it is one tile.
        prefix: the video's part of the prompt.
        question_tokens, internalization_tokens: the rest of the prompt, for a question and for internalizing.
    """

    path: Path
    frames: int
    rows: int
    cols: int
    prefix: tuple[Run, ...]
    question_tokens: int
    internalization_tokens: int

    @property
    def tiles(self) -> int:
        """Tiles of a frame, that of the whole frame included."""
        return self.rows * self.cols + 1

    @property
    def prefix_tokens(self) -> int:
        return sum(count for _, count in self.prefix)

    @property
    def visual_tokens(self) -> int:
        return sum(count for is_visual, count in self.prefix if is_visual)

    @property
    def context_tokens(self) -> int:
        """Tokens in the context when the question is answered with the video in it."""
        return self.prefix_tokens + self.question_tokens

    @property
    def key(self) -> str:
        """What is the same where the work on the device is the same."""
        return f"{self.path}/{self.frames}/{self.rows}x{self.cols}"

    def ids(self, image_token_id: int, text_tokens: int) -> list[int]:
        """The prompt with `text_tokens` behind the video: true counts and places, text of no meaning."""
        runs = [*self.prefix, (False, text_tokens)]
        return [image_token_id if is_visual else 1 + n % 97 for is_visual, count in runs for n in range(count)]


def split_tiles(width: int, height: int, longest_edge: int, tile: int) -> tuple[int, int]:
    """Rows and columns that an image is cut into when `size.longest_edge` is set, 0 and 0 where it is one tile.

    The arithmetic of `SmolVLMImageProcessor`: the longest edge is brought to `longest_edge`, both sides are rounded up
    to whole tiles.

    Args:
        width, height: of the image, in pixels.
        longest_edge: pixels.
        tile: `max_image_size.longest_edge`, pixels.
    """
    longest_edge = min(longest_edge, MAX_EDGE)
    ratio = width / height
    if width >= height:
        width, height = longest_edge, int(longest_edge / ratio)
        height += height % 2
    else:
        width, height = int(longest_edge * ratio), longest_edge
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if width >= height:
        cols = math.ceil(width / tile)
        rows = math.ceil(int(cols * tile / ratio) / tile)
    else:
        rows = math.ceil(height / tile)
        cols = math.ceil(int(rows * tile * ratio) / tile)
    return (rows, cols) if max(rows, cols) > 1 else (0, 0)


def make_case(
    rules: PromptRules, path: Path, frames: int, size: tuple[int, int], longest_edge: int, duration: float
) -> Case:
    """The prompt of a video as its base's processor and chat template render it.

    Args:
        rules: of the processor.
        path: how the frames go in.
        frames: their number.
        size: (width, height) of the video, pixels.
        longest_edge: pixels that `size.longest_edge` is set to; without effect on the video path.
        duration: seconds, written into the video path's prompt.
    """
    count = rules.count_text
    rows, cols = split_tiles(*size, longest_edge, rules.tile) if path == "images" else (0, 0)
    head, stamp = "User: ", "\nFrame from 00:00:"
    if path == "video":
        head += (
            f"You are provided the following series of {_in_words(frames)} frames from a "
            f"{timedelta(seconds=int(duration))} [H:MM:SS] video.\n"
        )
    frame = _frame_runs(rules, rows, cols)
    runs: list[Run] = [(False, 1 + count(head + stamp)), *frame]
    runs += [(False, count(stamp)), *frame] * (frames - 1)
    return Case(
        path,
        frames,
        rows,
        cols,
        tuple(runs),
        count("\n\n" + QUESTION) + 1 + count("\nAssistant:"),
        count("\n\n" + INTERNALIZATION_PROMPT) + 1 + count("\n"),
    )


def text_tokens(rules: PromptRules) -> int:
    """Tokens of the question by itself, as it is asked of an adapter."""
    return 1 + rules.count_text("User: " + QUESTION) + 1 + rules.count_text("\nAssistant:")


def count_words(text: str) -> int:
    """Tokens of the texts in these prompts by SmolVLM2's tokenizer, where its files are not at hand."""
    words = _WORDS.findall(text)
    return len(words) + sum(word.strip() in _WORDS_OF_TWO_TOKENS for word in words)


def _frame_runs(rules: PromptRules, rows: int, cols: int) -> Sequence[Run]:
    """Tokens of one frame: each tile behind its two marks, a line for each row, the whole frame last."""
    tile: list[Run] = [(False, 2), (True, rules.tokens_per_tile)]
    runs: list[Run] = []
    for row in range(rows):
        runs += [*tile * cols, (False, rules.count_text("\n\n" if row == rows - 1 else "\n"))]
    return [*runs, *tile, (False, 1)]


def _in_words(number: int) -> str:
    try:
        from num2words import num2words
    except ImportError:  # a token or two less in a prompt of hundreds
        return str(number)
    return num2words(number)
