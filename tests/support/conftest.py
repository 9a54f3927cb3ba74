"""The support table is made by hand (``python tests/support``); tests/test_support.py runs it."""

collect_ignore_glob = ["*.py"]
