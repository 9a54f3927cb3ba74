"""The repository itself: names, version, README, changelog, links."""

import importlib.metadata
import re
from pathlib import Path

import pytest

import fakequant

ROOT = Path(__file__).parents[1]
IN_CHECKOUT = (ROOT / "fakequant").is_dir()
checkout_only = pytest.mark.skipif(not IN_CHECKOUT, reason="the tests run against an installed wheel, not a checkout")


def declared_version() -> str:
    """Return the version in pyproject.toml (tomllib is not in Python 3.10)."""
    match = re.search(r'^version = "([^"]+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert match, "pyproject.toml has no version line"
    return match[1]


def test_no_file_is_a_dumping_ground() -> None:
    package = Path(fakequant.__file__).parent
    banned = {"utils", "helpers", "common", "misc"}
    found = [path for path in package.rglob("*") if path.stem.strip("_") in banned]
    assert found == [], "name the file after its one job"


def test_no_file_is_longer_than_300_lines() -> None:
    package = Path(fakequant.__file__).parent
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > 300} == {}, "give a part of it its own file"


def test_version_is_the_same_everywhere() -> None:
    assert fakequant.__version__ == declared_version()
    assert importlib.metadata.version("fakequant") == declared_version()


def test_the_type_marker_is_beside_the_package() -> None:
    assert (Path(fakequant.__file__).parent / "py.typed").is_file()


@checkout_only
@pytest.mark.parametrize(
    ("marker", "ending"), [("demo", "-m fakequant demo"), ("test", "-m pytest -q -n auto --dist loadfile")]
)
def test_readme_has_the_line_that_ci_runs(marker: str, ending: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^<!-- {marker} -->\n+```\w*\n(.*?)\n```$", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    assert "\n" not in blocks[0], "one line, so that it can be pasted"
    assert "-c constraints.txt" in blocks[0]
    assert blocks[0].endswith(ending)


@checkout_only
def test_changelog_has_this_version_or_unreleased() -> None:
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"Unreleased", declared_version()} & set(headings)


@checkout_only
@pytest.mark.parametrize("name", ["calib", "export"])
def test_top_level_link(name: str) -> None:
    link = ROOT / name
    if not link.is_symlink() and link.is_file():
        pytest.skip("this checkout has no symbolic links (git's core.symlinks is off)")
    assert link.is_symlink()
    assert link.readlink() == Path("fakequant", name)
    assert link.is_dir()
