"""docs/layers.md says what the quantized classes do."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).with_name("support")
PAGE = Path(__file__).parents[1] / "docs" / "layers.md"

LAYERS = ["Conv2d", "Linear", "Embedding", "EmbeddingBag", "Bilinear", "LayerNorm", "GELU", "AvgPool2d"]


@pytest.mark.skipif(not PAGE.is_file(), reason="the page is in a checkout, the tests run against an installed wheel")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--without-files"], id="torch"),
        pytest.param(LAYERS, id="files", marks=pytest.mark.slow),
    ],
)
def test_support_table_is_true(options):
    run = subprocess.run([sys.executable, COMMAND, "--check", *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
