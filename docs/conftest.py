"""The pages are doctests; what one registers is forgotten before the next."""

from collections.abc import Iterator

import pytest

from fakequant.call_sites import custom, ops
from fakequant.nn import registry


@pytest.fixture(autouse=True)
def _registries_put_back() -> Iterator[None]:
    # Other modules hold the same dicts, so their contents are put back and not the dicts.
    tables = (registry._QUANTIZED, ops._OPS, ops._OP_OF, ops.KIND_OF, custom.TRANSLATIONS)
    before = [dict(table) for table in tables]
    yield
    for table, contents in zip(tables, before, strict=True):
        table.clear()
        table.update(contents)
