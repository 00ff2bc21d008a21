"""Training data: rows in every common form, a check before training, and FineVideo spans."""

from .check import DatasetReport, Problem, check_rows
from .errors import DatasetError
from .export import ExportSummary, export_finevideo
from .finevideo import SpanStatistics, finevideo_spans
from .rows import group_queries, load_rows

__all__ = [
    "DatasetError",
    "DatasetReport",
    "ExportSummary",
    "Problem",
    "SpanStatistics",
    "check_rows",
    "export_finevideo",
    "finevideo_spans",
    "group_queries",
    "load_rows",
]
