"""Fixtures of the pipeline tests."""

from ..hub.fixtures import hub, patched_hub

__all__ = ["hub", "patched_hub"]
