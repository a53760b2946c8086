"""Model folders become engines, beside those that run, and leave when their last sequence has ended."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from service.engine.host import Host, Hosts, Loader, load_host
from service.engine.sequence import Sequence
from shared.catalog import ModelFolder
from shared.sampling import SamplingParams
from tests.tiny import other_tokenizer, tiny_tokenizer, write_tiny_export


def loader(dtype: torch.dtype) -> Loader:
    return functools.partial(load_host, device=torch.device("cpu"), dtype=dtype, num_slots=2, max_cached_tokens=256)


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    return Hosts(tmp_path / "models", loader(torch.float32), poll_s=0.05)


def give_work(host: Host) -> None:
    host.engine.add(Sequence(id="one", prompt_ids=[1, 2], params=SamplingParams(temperature=0.0), max_new_tokens=3))


def test_a_new_revision_takes_new_jobs_and_the_old_one_ends_its_own(hosts: Hosts) -> None:
    hosts.refresh()
    assert not hosts.adopt()
    first = write_tiny_export(hosts.models_dir)
    hosts.refresh()
    assert hosts.current == {}, "nothing changes but between two steps"
    assert hosts.adopt()
    old = hosts.current["tiny"]
    assert old.revision == first.revision and old.engine.free_slots == 2
    give_work(old)

    second = write_tiny_export(hosts.models_dir, seed=1)
    hosts.refresh()
    assert hosts.adopt()
    assert hosts.current["tiny"].revision == second.revision
    assert hosts.retired == [old] and len(hosts.all) == 2
    while old.engine.has_work:
        old.engine.step()
    assert not hosts.adopt()
    assert hosts.retired == []

    hosts.refresh()
    assert not hosts.adopt(), "an unchanged folder is not loaded again"
    shutil.rmtree(second.path)
    hosts.refresh()
    assert hosts.adopt() and hosts.current == {}


def test_a_corrected_tokenizer_is_loaded(hosts: Hosts) -> None:
    """As where a folder is copied over another and the worker looks between two of its files."""
    folder = write_tiny_export(hosts.models_dir)
    hosts.refresh()
    assert hosts.adopt() and hosts.current["tiny"].engine.tokenizer.sha256 == tiny_tokenizer().sha256
    other_tokenizer().save(folder.path)
    hosts.refresh()
    assert hosts.adopt() and hosts.current["tiny"].engine.tokenizer.sha256 == other_tokenizer().sha256
    assert hosts.current["tiny"].revision == folder.revision


def test_a_folder_that_cannot_be_loaded_harms_no_other(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny_export(hosts.models_dir, "good")
    bad = write_tiny_export(hosts.models_dir, "bad")
    (bad.path / "tokenizer.json").write_text("{}")
    hosts.refresh()
    hosts.refresh()
    assert hosts.adopt()
    assert list(hosts.current) == ["good"]
    assert len([record for record in caplog.records if "cannot serve bad" in record.message]) == 1
    write_tiny_export(hosts.models_dir, "bad", seed=3)
    hosts.refresh()
    assert hosts.adopt() and set(hosts.current) == {"good", "bad"}


def test_an_error_nobody_foresaw_stops_no_model_behind_it(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    load_whole = hosts.load

    def load(folder: ModelFolder) -> Host:
        if folder.name == "full":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if folder.name == "huge":
            raise MemoryError
        if folder.name == "odd":
            raise KeyError("a fault of ours")
        return load_whole(folder)

    hosts.load = load
    for name in ("full", "huge", "odd", "whole"):
        write_tiny_export(hosts.models_dir, name)
    hosts.refresh()
    hosts.refresh()
    assert hosts.adopt() and list(hosts.current) == ["whole"]
    said = {record.message: record.exc_info for record in caplog.records if "cannot serve" in record.message}
    assert list(said) == [
        "cannot serve full: CUDA out of memory. Tried to allocate 2.00 GiB",
        "cannot serve huge: MemoryError",
        "cannot serve odd: KeyError: 'a fault of ours'",
    ], "each is told once, and tried again later"
    assert [bool(trace) for trace in said.values()] == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_double_precision_are_served(hosts: Hosts, dtype: torch.dtype) -> None:
    path = write_tiny_export(hosts.models_dir).path
    doubles = {name: tensor.double() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(doubles, path / "model.safetensors")
    (path / "manifest.json").unlink()
    hosts.load = loader(dtype)
    hosts.refresh()
    assert hosts.adopt()
    give_work(hosts.current["tiny"])
    while hosts.current["tiny"].engine.has_work:
        hosts.current["tiny"].engine.step()
