"""Command line: text of others (answers, names in files) made safe for a terminal."""

from __future__ import annotations

import re

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Return text in which control characters are spelt (`\\x1b`), so that none moves the cursor or colours anything.

    Line breaks and tabs stay.
    """
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n"))
