"""Exports: what is written is what transformers and we read back; damage is named with its file."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from shared.catalog import read_model_folder
from shared.checkpoint import (
    half_tensors,
    import_hf_folder,
    load_export,
    load_model,
    load_tensors,
    model_from_tensors,
    save_tensors,
    write_export,
)
from shared.config import SMOLLM2_135M
from shared.errors import StorageError, TokenizerError, WeightsError
from shared.files import sha256_file
from shared.hashed_file import SYNC_EVERY_BYTES
from shared.model import SmolLM2
from shared.tokenizer import Tokenizer
from tests.tiny import TINY, TINY_TEXTS, tiny_model, tiny_tokenizer, write_tiny_export

CPU = torch.device("cpu")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> SmolLM2:
    return load_model(read_model_folder(folder), device=CPU, dtype=dtype)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result = model(torch.arange(40).reshape(2, 20))
    found: Tensor = result if isinstance(result, Tensor) else result.logits
    return found


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change a folder's weights as somebody else's tool would, and forget the manifest."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(change(tensors), path, metadata={"format": "pt"})
    (folder / "manifest.json").unlink(missing_ok=True)


def test_an_export_holds_what_the_contract_names(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path)
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tiny_half.pt",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert folder.manifest["parameters"] == TINY.num_parameters
    assert folder.manifest["step"] == 3
    assert folder.manifest["trained_length"] == folder.trained_length == 64
    assert folder.manifest["tokenizer_sha256"] == tiny_tokenizer().sha256
    assert 0 < folder.manifest["largest_weight"] < 10
    assert folder.created_at is not None
    assert folder.created_at.endswith("+00:00")
    files = folder.manifest["files"]
    assert set(files) == {path.name for path in folder.path.iterdir()} - {"manifest.json"}
    for name, listed in files.items():
        assert listed == {"bytes": (folder.path / name).stat().st_size, "sha256": sha256_file(folder.path / name)}
    assert {path.stat().st_mode & 0o444 for path in folder.path.iterdir()} == {0o444}, "another user may read them"


def test_the_loaded_model_is_the_halved_one(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path)
    model, tokenizer = load_export(folder.path, device=CPU, dtype=torch.float32)
    assert torch.equal(logits(model), logits(tiny_model().half().float()))
    assert tokenizer.sha256 == tiny_tokenizer().sha256
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == TINY.num_parameters
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.rope[0].dtype == torch.float32


def test_bfloat16_weights_keep_fp32_rope(tmp_path: Path) -> None:
    model = load(write_tiny_export(tmp_path).path, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.rope[0].dtype == torch.float32


def test_transformers_loads_the_folder_and_gives_the_same_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = write_tiny_export(tmp_path).path
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (logits(theirs) - logits(load(folder))).abs().max() <= 1e-5
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 0


def test_a_folder_of_transformers_is_served_and_imported(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs: Any = LlamaForCausalLM(LlamaConfig(**TINY.to_hf()))
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save(tmp_path)
    folder = read_model_folder(tmp_path)
    assert folder.config == TINY
    assert folder.revision == sha256_file(tmp_path / "model.safetensors")
    model, tokenizer = import_hf_folder(tmp_path)
    assert (logits(theirs.float()) - logits(model)).abs().max() <= 1e-5
    assert (logits(theirs) - logits(load(tmp_path))).abs().max() <= 1e-5
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.vocab_size == TINY.vocab_size


def test_an_untied_model_keeps_its_head(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {**TINY.to_hf(), "tie_word_embeddings": False}
    theirs: Any = LlamaForCausalLM(LlamaConfig(**settings))
    theirs.save_pretrained(tmp_path)
    tiny_tokenizer().save(tmp_path)
    model, tokenizer = import_hf_folder(tmp_path)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5
    write_export(tmp_path / "again", model, tokenizer, trained_length=None)
    assert (logits(theirs.half().float()) - logits(load(tmp_path / "again"))).abs().max() <= 1e-5


def test_the_pt_alone_serves_equally(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path).path
    expected = logits(load(folder))
    (folder / "model.safetensors").unlink()
    assert read_model_folder(folder).weights.name == "tiny_half.pt"
    assert torch.equal(logits(load(folder)), expected)
    (folder / "manifest.json").unlink()
    assert torch.equal(logits(load(folder)), expected)


def test_the_pt_stores_the_embedding_once_and_loads_strictly(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path).path
    tensors = load_tensors(folder / "tiny_half.pt")
    assert tensors[HEAD].data_ptr() == tensors[EMBEDDING].data_ptr()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert (folder / "tiny_half.pt").stat().st_size < 2 * TINY.num_parameters + 10_000
    model = SmolLM2(TINY)
    model.load_state_dict(tensors)


def test_the_full_size_file_has_the_originals_name_and_size(tmp_path: Path) -> None:
    from shared.catalog import pt_name
    from shared.checkpoint import with_tied_head

    assert pt_name("smollm2-135m", SMOLLM2_135M) == "final_smollm2_135m_half.pt"
    with torch.device("meta"):
        model = SmolLM2(SMOLLM2_135M)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    tensors = {name: torch.empty(p.shape, dtype=torch.float16) for name, p in model.named_parameters()}
    path = tmp_path / "final_smollm2_135m_half.pt"
    save_tensors(path, with_tied_head(tensors, SMOLLM2_135M))
    assert path.stat().st_size <= 258 * 2**20
    path.unlink()


def test_replacing_an_export_changes_its_revision(tmp_path: Path) -> None:
    first = write_tiny_export(tmp_path)
    second = write_tiny_export(tmp_path, seed=1)
    assert first.revision != second.revision
    with pytest.raises(WeightsError, match="not what its manifest describes"):
        load_model(first, device=CPU, dtype=torch.float32)


def test_a_weight_beyond_16_bits_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    assert half_tensors(model)[EMBEDDING].dtype == torch.float16
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 70_000.0  # type: ignore[union-attr, operator]
    with pytest.raises(WeightsError, match=r"down_proj.weight holds 70000, which 16 bits cannot"):
        write_export(tmp_path / "big", model, tiny_tokenizer(), trained_length=None)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_model_is_not_exported(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(TINY_TEXTS, vocab_size=300)
    with pytest.raises(TokenizerError, match="do not belong together"):
        write_export(tmp_path / "wrong", tiny_model(), tokenizer, trained_length=None)


def test_damaged_bytes_are_named_with_their_file(tmp_path: Path) -> None:
    folder = read_model_folder(write_tiny_export(tmp_path).path)
    data = bytearray(folder.weights.read_bytes())
    data[-1] ^= 1
    folder.weights.write_bytes(data)
    with pytest.raises(WeightsError, match=r"model.safetensors is not what its manifest describes"):
        load_model(folder, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("keep", [0, 7, 500, 100_000])
def test_a_file_cut_off_is_named(tmp_path: Path, keep: int) -> None:
    folder = write_tiny_export(tmp_path).path
    for name in ("model.safetensors", "tiny_half.pt"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:keep])
        with pytest.raises(WeightsError, match=name):
            read_model_folder(folder)
        (folder / name).unlink()
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor"):
        read_model_folder(folder)


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    for name, write in (("zip.pt", lambda path: torch.save({"w": Attack()}, path)), ("raw.pt", pickle_to(Attack()))):
        write(tmp_path / name)
        with pytest.raises(WeightsError, match=f"{name} cannot be read"):
            load_tensors(tmp_path / name)
    assert not (tmp_path / "harm").exists()


def pickle_to(content: Any) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(pickle.dumps(content))


def test_tensors_and_plain_values_come_back(tmp_path: Path) -> None:
    payload = {"step": 7, "weights": {"a": torch.arange(5)}, "name": "run", "betas": (0.9, 0.95), "none": None}
    digest = save_tensors(tmp_path / "state.pt", payload)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert digest == sha256_file(tmp_path / "state.pt")
    again = load_tensors(tmp_path / "state.pt")
    assert torch.equal(again["weights"].pop("a"), payload["weights"].pop("a"))  # type: ignore[attr-defined]
    assert again == payload
    with pytest.raises(WeightsError, match=r"absent.pt is missing"):
        load_tensors(tmp_path / "absent.pt")
    torch.save(torch.ones(1), tmp_path / "bare.pt")
    with pytest.raises(WeightsError, match="holds a Tensor"):
        load_tensors(tmp_path / "bare.pt")


@pytest.mark.parametrize("crc32", [True, False])
def test_a_large_file_is_hashed_as_it_is_written(tmp_path: Path, crc32: bool) -> None:
    """Larger than what goes to the threads, and than what is sent to the disk at a time."""
    numbers = torch.arange(3 * SYNC_EVERY_BYTES // 8)
    path = tmp_path / "state.pt"
    assert save_tensors(path, {"a": numbers, "b": numbers[:7].clone()}, crc32=crc32) == sha256_file(path)
    assert torch.equal(load_tensors(path)["a"], numbers)
    with zipfile.ZipFile(path) as archive:
        sums = [entry.CRC for entry in archive.infolist() if entry.filename.endswith("/data/0")]
    assert (sums != [0]) is crc32
    assert torch.serialization.get_crc32_options()


def test_a_folder_without_permission_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((StorageError, NotADirectoryError)):
        save_tensors(tmp_path / "file" / "state.pt", {})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: {f"_orig_mod.{name}": v for name, v in t.items()},
            "torch.compile.*'_orig_mod.'.*save the unwrapped",
        ),
        (lambda t: {f"module.{name}": v for name, v in t.items()}, "DistributedDataParallel"),
        (lambda t: {name: v for name, v in t.items() if "norm" not in name}, r"lacks model\.layers\.0\..* and 4 more"),
        (lambda t: {**t, "extra.weight": torch.ones(1)}, r"holds the unknown extra\.weight"),
        (lambda t: {**t, "model.norm.weight": torch.ones(7)}, r"model\.norm\.weight as torch.float32 \(7,\)"),
        (lambda t: {**t, "model.norm.weight": torch.ones(48, dtype=torch.int8)}, "torch.int8"),
        (lambda t: {**t, HEAD: torch.ones_like(t[EMBEDDING])}, "holds an lm_head.weight of its own"),
    ],
)
def test_foreign_names_and_shapes_are_explained(tmp_path: Path, change: Any, sentence: str) -> None:
    folder = write_tiny_export(tmp_path).path
    rewrite_weights(folder, change)
    with pytest.raises(WeightsError, match=f"model.safetensors .*{sentence}"):
        load(folder)


def test_harmless_additions_of_other_tools_are_taken(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path).path
    expected = logits(load(folder))
    additions = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite_weights(folder, lambda tensors: {**tensors, **additions, HEAD: tensors[EMBEDDING].clone()})
    assert torch.equal(logits(load(folder)), expected)


def test_an_untied_config_needs_a_head(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path).path
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(WeightsError, match=r"lacks lm_head.weight"):
        load(folder)


def test_a_model_in_use_does_not_change_with_its_file(tmp_path: Path) -> None:
    tensors = half_tensors(tiny_model())
    model = model_from_tensors(tensors, TINY, tmp_path, device=CPU, dtype=torch.float16)
    before = model.model.embed_tokens.weight.clone()
    tensors[EMBEDDING].zero_()
    assert torch.equal(model.model.embed_tokens.weight, before)
