"""Text to tokens: speed and peak memory of `prepare` with SmolLM2's tokenizer on a large file.

The text is Python and documentation that this environment holds, read in order; where it does not suffice it is
repeated, every document with a number of its own. `python -m benchmarks.prepare --megabytes 1000`
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp"}
MODELS_DIR = Path(__file__).parents[1] / "models"


def library_texts() -> Iterator[str]:
    """Every text of the standard library and of the installed packages, over and over."""
    roots = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    paths = [path for root in roots for path in sorted(root.rglob("*")) if path.suffix in SUFFIXES and path.is_file()]
    number = 0
    while True:
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="ignore").replace("\0", "")
            number += 1
            yield f"{text}\n\n{number}\n\n"


def write_text(path: Path, num_bytes: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        size = 0
        for text in library_texts():
            size += len(text.encode())
            file.write(text)
            if size >= num_bytes:
                return


def child(folder: Path) -> None:
    """Prepare the text in `folder` and print what it took; a process of its own, so that its memory is known."""
    from trainer import prepare as module
    from trainer.recipe_data import find_tokenizer

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    tokenizer = find_tokenizer("smollm2", MODELS_DIR)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    data = module.prepare(
        ["input"], data_dir=folder, tokenizer=tokenizer, vocab_size=None, output_dir=folder / "tokens"
    )
    seconds = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    file = data.token_files["input"]
    figures = {
        "tokens": len(file.train) + len(file.held_out),
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "before_mib": before / 1024,
        "peak_mib": usage.ru_maxrss / 1024,
    }
    print(json.dumps(figures))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        child(options.folder)
        return 0
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "input.txt"
        write_text(path, options.megabytes * 10**6)
        command = [sys.executable, "-m", "benchmarks.prepare", "--folder", name]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(result.stdout)
        print("| text | tokens | wall time | tokens/s | CPU time | peak RSS | before |\n|---|---|---|---|---|---|---|")
        print(
            f"| {path.stat().st_size / 1e6:,.0f} MB | {figures['tokens']:,} | {figures['seconds']:.1f} s | "
            f"{figures['tokens'] / figures['seconds']:,.0f} | {figures['cpu_seconds']:.1f} s | "
            f"{figures['peak_mib']:,.0f} MiB | {figures['before_mib']:,.0f} MiB |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
