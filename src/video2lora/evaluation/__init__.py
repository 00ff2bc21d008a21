"""Evaluation: conditions that answer the same questions, benchmarks, metrics, statistics, efficiency and reports."""
