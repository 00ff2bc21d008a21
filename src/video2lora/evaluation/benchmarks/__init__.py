"""Benchmarks: declared as data, read from a local folder, drawn by a seed; also a user's own JSONL."""

from .benchmark import Benchmark, load_benchmark
from .catalog import BENCHMARKS, describe_benchmarks
from .download import download, unpack
from .spec import BenchmarkError, BenchmarkSpec, Download

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "BenchmarkError",
    "BenchmarkSpec",
    "Download",
    "describe_benchmarks",
    "download",
    "load_benchmark",
    "unpack",
]
