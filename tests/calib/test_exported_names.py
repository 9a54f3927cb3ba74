import types

from fakequant import calib


def test_all_is_sorted_and_exactly_what_is_public():
    public = {n for n, v in vars(calib).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)}
    assert calib.__all__ == sorted(public)
