"""Coverage is run by hand (``python tests/coverage``), not collected."""

collect_ignore_glob = ["*.py"]
