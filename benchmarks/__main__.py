"""`python -m benchmarks`: every benchmark in turn, each in a process of its own, as tables."""

from __future__ import annotations

import argparse
import subprocess
import sys

BENCHMARKS = ("serve", "weights", "scheduling", "invariance", "queue", "parity", "train")


def main() -> int:
    """Run them; 1 if any missed a limit of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default, in this order: {', '.join(BENCHMARKS)}")
    failed = 0
    for name in parser.parse_args().names or BENCHMARKS:
        print(f"\n=== python -m benchmarks.{name}", flush=True)
        failed |= subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
