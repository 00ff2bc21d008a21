"""Errors of the data room: every one names the row or value, what was expected and what to do."""

from __future__ import annotations


class DatasetError(ValueError):
    """A training dataset cannot be read, or rows of it are wrong."""
