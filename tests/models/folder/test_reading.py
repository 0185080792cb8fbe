"""What is read as a GPT-2 folder, and how everything else is refused."""

from __future__ import annotations

import gc
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastattn import GPT
from fastattn.models.families.gpt2 import FIELDS
from fastattn.models.folder import reading

Pair = tuple[GPT, transformers.GPT2LMHeadModel]
MakePair = Callable[..., Pair]


@pytest.fixture
def folder(pair: Pair, tmp_path: Path) -> Path:
    """A copy of what transformers wrote, to damage."""
    return Path(shutil.copytree(tmp_path / "theirs", tmp_path / "copy"))


def _logits(model: GPT) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20, device=model.device)[None])


def _edit(file: Path, **changes: Any) -> None:
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, **changes}))


def _rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _shard(folder: Path) -> None:
    """Split the single file in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(folder: Path, pair: Pair, device: str) -> None:
    _shard(folder)
    assert torch.equal(_logits(GPT.from_pretrained(folder, device=device)), _logits(pair[0]))


def test_old_names(folder: Path, pair: Pair, device: str) -> None:
    """As in the first GPT-2 files: no prefix, the causal masks saved, the head too."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    _rewrite(folder, edit)
    assert torch.equal(_logits(GPT.from_pretrained(folder, device=device)), _logits(pair[0]))


def test_a_silent_config_means_transformers_defaults(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    for name in ("attn_pdrop", "n_inner", "activation_function", "summary_type"):
        del data[name]
    (folder / "config.json").write_text(json.dumps(data))
    config = GPT.from_pretrained(folder).config
    theirs = transformers.GPT2Config.from_pretrained(folder)
    for name in FIELDS:
        assert getattr(config, name) == getattr(theirs, name), name


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_dtype(make_pair: MakePair, tmp_path: Path, stored: torch.dtype) -> None:
    make_pair(dtype=stored)
    assert GPT.from_pretrained(tmp_path / "theirs").wte.weight.dtype == stored
    cast = GPT.from_pretrained(str(tmp_path / "theirs"), dtype=torch.bfloat16)
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"dtype must be one of .*got torch.int8"):
        GPT.from_pretrained(tmp_path / "theirs", dtype=torch.int8)


def test_mixed_dtypes_need_a_choice(folder: Path) -> None:
    _rewrite(folder, lambda t: t.update({k: v.half() for k, v in t.items() if "ln_" in k}))
    with pytest.raises(ValueError, match=r"several dtypes \(F16, F32\): choose one"):
        GPT.from_pretrained(folder)
    assert GPT.from_pretrained(folder, dtype=torch.float32).norm_f.weight.dtype == torch.float32


def test_the_model_is_ready_and_trainable(folder: Path) -> None:
    model = GPT.from_pretrained(folder)
    assert not model.training
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert model.lm_head.weight is model.wte.weight


def test_weights_as_stored_are_the_mapped_file(folder: Path) -> None:
    """Nothing is copied, and nothing that is done to the model changes the file, or the reverse."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    model, other = GPT.from_pretrained(folder), GPT.from_pretrained(folder)
    assert _mappings(folder) == 2
    before = _logits(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    assert torch.equal(_logits(other), before)
    assert file.read_bytes() == content
    model.save_pretrained(folder)
    assert file.read_bytes() != content
    assert torch.equal(_logits(other), before)


def test_a_copy_in_another_dtype_lets_go_of_the_file(folder: Path) -> None:
    model = GPT.from_pretrained(folder, dtype=torch.float64)
    gc.collect()
    assert _mappings(folder) == 0
    assert _logits(model).dtype == torch.float64


def _mappings(folder: Path) -> int:
    """How many times this process has a file of the folder mapped."""
    return Path("/proc/self/maps").read_text().count(f"{folder.resolve()}/")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe{}", b"", b"[" * 100_000])
def test_config_that_is_no_json_object(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json: (not valid JSON|must hold a JSON object)"):
        GPT.from_pretrained(folder)


def test_all_wrong_tensors_are_listed(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["transformer.h.1.ln_1.bias"]
        tensors["transformer.h.0.attn.c_attn.weight"] = torch.zeros(144, 48)
        tensors["transformer.extra"] = torch.zeros(1)
        tensors["transformer.ln_f.bias"] = torch.zeros(48, dtype=torch.int64)

    _rewrite(folder, edit)
    with pytest.raises(ValueError) as raised:
        GPT.from_pretrained(folder)
    lines = str(raised.value).splitlines()
    assert str(folder) in lines[0]
    assert sorted(line.strip() for line in lines[1:]) == [
        "extra is unexpected",
        "h.0.attn.c_attn.weight must have the shape (48, 144), got (144, 48)",
        "h.1.ln_1.bias is missing",
        "ln_f.bias must be one of F16, BF16, F32, F64, got I64",
    ]


def test_a_tensor_twice(folder: Path) -> None:
    _rewrite(folder, lambda t: t.update({"wte.weight": t["transformer.wte.weight"].clone()}))
    with pytest.raises(ValueError, match=r"'wte.weight' is there twice"):
        GPT.from_pretrained(folder)


def _header(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _with_header(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    header, data = _header(file)
    edit(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def _tensors(header: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of the tensors, in the order of the data."""
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return sorted(entries, key=lambda entry: entry["data_offsets"])


def _overlap(header: dict[str, Any]) -> None:
    first, second = _tensors(header)[:2]
    second["data_offsets"] = first["data_offsets"]
    second["shape"] = first["shape"]


def _beyond(header: dict[str, Any]) -> None:
    last = _tensors(header)[-1]
    last["shape"] = [2**40]
    last["data_offsets"][1] = last["data_offsets"][0] + 4 * 2**40


def _wrong_shape(header: dict[str, Any]) -> None:
    _tensors(header)[0]["shape"] = [2**40, 48]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut in the header": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "cut in the data": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "longer than its tensors": lambda file: file.write_bytes(file.read_bytes() + b"\0" * 8),
    "header length": lambda file: file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:]),
    "header beyond the file": lambda file: file.write_bytes(struct.pack("<Q", 10**7) + b"{}"),
    "header no JSON": lambda file: file.write_bytes(struct.pack("<Q", 2) + b"{]"),
    "a pickle by name": lambda file: torch.save({"a": torch.zeros(2)}, file),
    "overlap": lambda file: _with_header(file, _overlap),
    "offsets beyond the file": lambda file: _with_header(file, _beyond),
    "shape that is not the size": lambda file: _with_header(file, _wrong_shape),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("sharded", [False, True])
def test_damaged_file(folder: Path, damage: Callable[[Path], Any], sharded: bool) -> None:
    file = folder / "model.safetensors"
    if sharded:
        _shard(folder)
        file = folder / "model-00002-of-00002.safetensors"
    damage(file)
    with pytest.raises(ValueError, match=f"{file.name}: damaged, or not a safetensors file"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    ["../theirs/model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", ".safetensors", 3, None],
)  # fmt: skip
def test_index_that_leaves_the_folder(folder: Path, name: Any) -> None:
    _shard(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    _edit(index, weight_map={**weight_map, "transformer.wte.weight": name})
    with pytest.raises(ValueError, match=r"must be in a .safetensors file beside the index, got"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_index_without_a_map(folder: Path, weight_map: Any) -> None:
    _shard(folder)
    _edit(folder / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ValueError, match=r'index.json: "weight_map" must say'):
        GPT.from_pretrained(folder)


def test_index_that_promises_too_much(folder: Path) -> None:
    _shard(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    _edit(index, weight_map={**weight_map, "transformer.none": "model-00001-of-00002.safetensors"})
    with pytest.raises(
        ValueError, match=r"model-00001-of-00002.safetensors: lacks .*transformer.none"
    ):
        GPT.from_pretrained(folder)


def test_missing_shard(folder: Path) -> None:
    _shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: missing"):
        GPT.from_pretrained(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled \(pytorch_model.bin\).*refused. Convert them"):
        GPT.from_pretrained(folder)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor .*index.json"):
        GPT.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks this file.*config.json"):
        GPT.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="path must be a folder or the name of a repo"):
        GPT.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="path must be a folder or the name of a repo"):
        GPT.from_pretrained(Path(__file__))
    with pytest.raises(TypeError, match=r"path must be a folder or the name .* got int"):
        GPT.from_pretrained(3)  # type: ignore[arg-type]


def test_hub(folder: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """What is asked of the Hub, without asking it."""
    asked = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = GPT.from_pretrained("someone/gpt2-tiny", revision="v1", device=device)
    assert torch.equal(_logits(model), _logits(pair[0]))
    assert asked == [("someone/gpt2-tiny", "v1", reading.DOWNLOADED)]


def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no such folder here, and the Hugging Face Hub"):
        GPT.from_pretrained("no-such-user/no-such-model")


def test_without_the_libraries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "fastattn\[hf\]"'):
        GPT.from_pretrained(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "fastattn\[hf\]"'):
        GPT.from_pretrained("someone/gpt2-tiny")


# --- generation_config.json -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token_id": [5, 7, 11, 40, 41, 42, 43, 44, 45], "pad_token_id": 96},
        {"eos_token_id": 7, "pad_token_id": None},
        {"eos_token_id": None},
    ],
    ids=str,
)
def test_generation_stops_as_the_folder_says(
    make_pair: Any, tmp_path: Path, device: str, changes: dict[str, Any]
) -> None:
    """config.json says otherwise; transformers generates by generation_config.json."""
    _, theirs = make_pair(eos_token_id=3, pad_token_id=4)
    folder = tmp_path / "with"
    theirs.save_pretrained(folder)
    path = folder / "generation_config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))
    ours = GPT.from_pretrained(folder, device=device)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).to(device).eval()
    tokens = torch.randint(0, 97, (3, 6), generator=torch.Generator().manual_seed(0)).to(device)
    got = ours.generate(tokens, max_new_tokens=40)
    mask = torch.ones_like(tokens)
    expected = theirs.generate(tokens, attention_mask=mask, max_new_tokens=40, do_sample=False)
    assert torch.equal(got, expected)
    ours.save_pretrained(folder)
    assert GPT.from_pretrained(folder).config == ours.config
