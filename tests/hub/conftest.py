"""The Hub fixtures, for the tests of this folder."""

from .fixtures import hub, patched_hub

__all__ = ["hub", "patched_hub"]
