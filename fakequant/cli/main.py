"""``fakequant demo``: the main job on real data, as one command."""

import argparse
import sys
from collections.abc import Sequence

import fakequant


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(prog="fakequant", description=fakequant.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"fakequant {fakequant.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="digits, from training to a validated int8 file, in about a minute")
    demo.add_argument("--output", default=None, help="folder for the ONNX files (default: a temporary one)")
    chosen = parser.parse_args(arguments)
    try:
        from fakequant.demo import quickstart

        quickstart.main(chosen.output)
    except fakequant.FakeQuantError as error:
        sys.stderr.write(f"fakequant: {error}\n")
        return 1
    return 0
