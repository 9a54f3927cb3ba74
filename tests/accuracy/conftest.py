"""The table is made by hand (``python tests/accuracy``); tests/test_accuracy.py runs a part of it."""

collect_ignore = ["__main__.py", "formats.py", "measure.py", "networks.py", "recovery.py", "tasks.py"]
