"""llama.cpp's own server in this process: the oracle of our GGUF files."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    """One GGUF file, loaded."""

    def __init__(self, path: Path, *, context: int = 256, threads: int = 1) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads = context, 1, threads
        params.n_gpu_layers, params.warmup, params.port, params.verbosity = 0, False, 0, -1
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        return ids

    def complete(self, prompt_ids: list[int], count: int, **body: Any) -> dict[str, Any]:
        settings = {"temperature": 0, "samplers": ["temperature"], "return_tokens": True, "cache_prompt": False}
        return self.post("/completion", prompt=prompt_ids, n_predict=count, **settings | body)
