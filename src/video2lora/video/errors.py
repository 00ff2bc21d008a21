"""Errors of the video room: every one names the video, what was expected and what to do."""

from __future__ import annotations


class VideoError(ValueError):
    """Something is wrong with a video or with what was asked of it."""


class UnreadableVideoError(VideoError):
    """The video cannot be had or opened, has no video stream, is empty, or nothing in it decodes."""


class VideoSpanError(VideoError):
    """The sampling asked for is impossible: an empty or foreign span, no frames, or contradicting options."""
