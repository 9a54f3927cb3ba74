"""Benchmarks are run by hand (``python tests/benchmarks``), not collected."""

collect_ignore_glob = ["*.py"]
