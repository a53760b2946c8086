"""Run benchmarks one after the other, each in a process of its own; without a name, those that compare us with peers.

python -m benchmarks            the usual ones
python -m benchmarks serve      one of them; its own options: python -m benchmarks.serve --help
python -m benchmarks --list     all of them, in a sentence each
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

USUAL = ("serve", "weights", "scheduling", "invariance", "queue", "parity", "train")


def benchmarks() -> dict[str, str]:
    """Every module here that can be run, by name, with the first line of its docstring."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if not path.stem.startswith("_") and 'if __name__ == "__main__"' in source:
            found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    del found["peers"]  # the other side of `serve`
    return found


def main() -> int:
    """Run them; 1 if any missed a limit of its own."""
    known = benchmarks()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default, in this order: {', '.join(USUAL)}")
    parser.add_argument("--list", action="store_true", help="say what each one measures, and stop")
    options = parser.parse_args()
    if options.list:
        for name, sentence in known.items():
            print(f"{name:<14}{'*' if name in USUAL else ' '} {sentence}")
        print("\n* runs without being named")
        return 0
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are: {', '.join(known)}")
    failed = 0
    for name in options.names or USUAL:
        print(f"\n=== {name}: {known[name]}", flush=True)
        failed |= subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
