"""Model folders of a stranger: every file of one, changed at random, is read or refused.

Refused is with the errors that the readers document. Each test runs in a process whose memory and
time are bounded (tests/bounded.py), so that an allocation beyond the file's size, an endless loop
and a crash are failures.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bounded
import mutations
import pytest
import torch
from hypothesis import strategies as st
from mutations import MEMORY, fuzz
from safetensors.torch import load_file, save_file

from fastattn import GPT, GPTConfig, models
from fastattn.compression import quantize
from fastattn.generation import GenerationConfig
from fastattn.models.families import FAMILIES
from fastattn.models.folder import read_config
from fastattn.models.folder.gguf_file import read_gguf
from fastattn.training import Tokenizer

DRAWS = [12, pytest.param(300, marks=pytest.mark.long)]
SIZES = {
    "gpt2": {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": {
        "vocab_size": 40, "max_position_embeddings": 16, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "rope_scaling": {
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8,
        },
    },
    "modernbert": {
        "vocab_size": 40, "max_position_embeddings": 16, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "t5": {
        "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
        "decoder_start_token_id": 0, "pad_token_id": 0,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=[*SIZES, "8 bits"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small whole folder of a family, or a GPT-2's with weights of 8 bits."""
    name = "gpt2" if request.param == "8 bits" else request.param
    family = FAMILIES[name]
    path = tmp_path_factory.mktemp(request.param)
    cls = models.loading.CLASSES[next(iter(family.classes.values()))]
    model = cls(family.read_config(SIZES[name]))
    model.family = family.model_type
    if request.param == "8 bits":
        quantize(model, "int8")
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(
        '{"max_new_tokens": 5, "do_sample": true, "top_k": 7, "temperature": 0.5, "eos_token_id": 3}'
    )
    models.load(path)
    return path


def with_file(original: Path, place: Path, name: str, content: bytes) -> Path:
    """A copy of a folder whose file `name` has another content."""
    copy = place / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)
    (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize("draws", DRAWS)
def test_config_json(folder: Path, tmp_path: Path, draws: int) -> None:
    whole = json.loads((folder / "config.json").read_bytes())

    def check(value: Any) -> None:
        models.load(with_file(folder, tmp_path, "config.json", mutations.text_of(value)))

    fuzz(mutations.changed_json(whole), draws, check)


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_config_json_of_every_family(name: str, tmp_path: Path, draws: int) -> None:
    """And of a config that has weights nowhere, only its sizes are read."""
    family = FAMILIES[name]
    whole = {**family.defaults, **family.write_config(family.read_config({}))}
    path = tmp_path / "config.json"

    def check(value: Any) -> None:
        path.write_bytes(mutations.text_of(value))
        read_config(path)

    fuzz(mutations.changed_json(whole), draws // 2, check)


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_bytes(folder: Path, tmp_path: Path, name: str, draws: int) -> None:
    whole = (folder / name).read_bytes()
    # What a safetensors file begins with says all that follows.
    head, rest = (whole[:1500], whole[1500:]) if name == "model.safetensors" else (whole, b"")

    def check(content: bytes) -> None:
        models.load(with_file(folder, tmp_path, name, content + rest))

    fuzz(mutations.changed(head), draws // 2, check)


@pytest.mark.parametrize("draws", DRAWS)
def test_header_of_safetensors(folder: Path, tmp_path: Path, draws: int) -> None:
    """Its length is right, and its entries are not."""
    content = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    whole = json.loads(content[8 : 8 + size])

    def check(value: Any) -> None:
        header = mutations.text_of(value)
        changed = struct.pack("<Q", len(header)) + header + content[8 + size :]
        models.load(with_file(folder, tmp_path, "model.safetensors", changed))

    fuzz(mutations.changed_json(whole), draws, check)


@pytest.mark.parametrize("draws", DRAWS)
def test_generation_config_json(folder: Path, tmp_path: Path, draws: int) -> None:
    whole = json.loads((folder / "generation_config.json").read_bytes())
    whole |= {"num_beams": 2, "top_p": 0.5, "pad_token_id": None, "length_penalty": 1.0}

    def check(value: Any) -> None:
        path = with_file(folder, tmp_path, "generation_config.json", mutations.text_of(value))
        GenerationConfig.from_folder(path)
        models.load(path)

    fuzz(mutations.changed_json(whole), draws, check)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    GPT(GPTConfig(**SIZES["gpt2"])).save_pretrained(path, max_shard_size=9000)
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@pytest.mark.parametrize("draws", DRAWS)
def test_index(shards: Path, tmp_path: Path, draws: int) -> None:
    name = "model.safetensors.index.json"
    whole = json.loads((shards / name).read_bytes())

    def check(value: Any) -> None:
        models.load(with_file(shards, tmp_path, name, mutations.text_of(value)))

    fuzz(mutations.changed_json(whole), draws, check)


def test_nothing_outside_of_the_folder_is_opened(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the index names; the weights that it points to are right."""
    copy = Path(shutil.copytree(shards, tmp_path / "inner" / "copy"))
    victim = copy / "model-00001-of-00002.safetensors"
    if not victim.exists():
        victim = sorted(copy.glob("model-00001-*"))[0]
    elsewhere = Path(shutil.move(victim, tmp_path / "elsewhere.safetensors"))
    index = copy / "model.safetensors.index.json"
    data = json.loads(index.read_bytes())
    for name in (
        "../../elsewhere.safetensors", str(elsewhere), f"..{os.sep}..//elsewhere.safetensors",
        "a/../../../elsewhere.safetensors", "..\\..\\elsewhere.safetensors", "file://x.safetensors",
        "..\u2215elsewhere.safetensors", "elsewhere.safetensors\0", "~/elsewhere.safetensors",
    ):  # fmt: skip
        moved = {k: name if v == victim.name else v for k, v in data["weight_map"].items()}
        index.write_text(json.dumps({"weight_map": moved}))
        with pytest.raises(ValueError, match=r"must be in a \.safetensors file beside the index"):
            GPT.from_pretrained(copy)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_regular_file_is_not_waited_for(folder: Path, tmp_path: Path, name: str) -> None:
    """A pipe that nobody writes to, a device without end, a folder."""
    if folder.name.startswith(("modernbert",)) and name == "generation_config.json":
        pytest.skip("an encoder's folder has none that is read")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))

    def read() -> None:
        with pytest.raises((ValueError, OSError), match=r"regular file|director"):
            models.load(copy)

    (copy / name).unlink()
    os.mkfifo(copy / name)
    bounded.run(read, memory=MEMORY, seconds=20)
    (copy / name).unlink()
    (copy / name).symlink_to("/dev/zero")
    bounded.run(read, memory=MEMORY, seconds=20)
    (copy / name).unlink()
    (copy / name).mkdir()
    bounded.run(read, memory=MEMORY, seconds=20)


def test_json_is_read_in_one_way(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "config.json").read_bytes()
    for content, message in (
        (whole.replace(b"{", b'{"model_type": "bert",', 1), "'model_type' is there twice"),
        (whole.replace(b"{", b'{"x": NaN,', 1), "it has NaN"),
        (whole.replace(b"{", b'{"x": -Infinity,', 1), "it has -Infinity"),
        (whole.replace(b"{", b'{"x": "\\ud800",', 1), "surrogates not allowed"),
        (whole.replace(b"{", b'{"x":' + b"[" * 80 + b"]" * 80 + b",", 1), "more than 64 objects"),
        (whole.replace(b"{", b'{"x":' + b"9" * 5000 + b",", 1), "digits"),
        (whole.decode().encode("utf-16"), "codec can't decode"),
    ):
        with pytest.raises(ValueError, match=f"config.json: not valid JSON .*{message}"):
            models.load(with_file(folder, tmp_path, "config.json", content))
    models.load(with_file(folder, tmp_path, "config.json", b"\xef\xbb\xbf" + whole))


def _pickled(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path)


def _old_pickled(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


def _zipped(path: Path) -> None:
    (path.parent / "inner").mkdir()
    made = shutil.make_archive(str(path.parent / "archive"), "zip", path.parent / "inner")
    shutil.move(made, path)


@pytest.mark.parametrize(
    ("write", "kind"), [(_pickled, "a zip archive"), (_old_pickled, "a pickle")]
)
@pytest.mark.parametrize("sharded", [False, True])
def test_pickles_are_known_by_their_content(
    shards: Path, tmp_path: Path, write: Callable[[Path], None], kind: str, sharded: bool
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    name = sorted(path.name for path in copy.glob("*.safetensors"))[-1]
    if not sharded:
        (copy / "model.safetensors.index.json").unlink()
        name = "model.safetensors"
    write(copy / name)
    with pytest.raises(ValueError, match=rf"{name}: .*begins as {kind}.*Pickled weights"):
        GPT.from_pretrained(copy)


def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    """0x0280 bytes: the file begins with b"\\x80\\x02", and is one of safetensors."""
    GPT(GPTConfig(**SIZES["gpt2"])).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    wanted = (size // 2**16 + 1) * 2**16 + 0x0280
    header = content[8 : 8 + size].ljust(wanted)
    path.write_bytes(struct.pack("<Q", wanted) + header + content[8 + size :])
    assert path.read_bytes().startswith(b"\x80\x02")
    assert torch.equal(
        GPT.from_pretrained(tmp_path).wte.weight, load_file(path)["transformer.wte.weight"]
    )


@pytest.mark.parametrize(
    "sizes",
    [{"vocab_size": 10**12}, {"num_hidden_layers": 10**9}, {"hidden_size": 2**40, "num_attention_heads": 2**20},
     {"head_dim": 2**60}, {"intermediate_size": 2**62}, {"vocab_size": 2**63 - 1}, {"vocab_size": 10**30}],
)  # fmt: skip
def test_sizes_of_terabytes_are_refused_before_they_are_allocated(
    sizes: dict[str, int], tmp_path: Path
) -> None:
    family = FAMILIES["llama"]
    model = GPT(family.read_config(SIZES["llama"]))
    model.family = "llama"
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_bytes()), **sizes}))

    def read() -> None:
        with pytest.raises(ValueError, match=r"must have the shape|more than 16384|no model"):
            GPT.from_pretrained(tmp_path)

    bounded.run(read, memory=2**27, seconds=20)


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens")
    tokenizer = Tokenizer.train(
        ["the quick brown fox 今天 " * 20], vocab_size=280,
        special_tokens={"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    )  # fmt: skip
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save(path)
    return path


def _use(path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.encode("the fox 今天")
    tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer(tokens: Path, tmp_path: Path, name: str, draws: int) -> None:
    whole = json.loads((tokens / name).read_bytes())

    def check(value: Any) -> None:
        _use(with_file(tokens, tmp_path, name, mutations.text_of(value)))

    fuzz(mutations.changed_json(whole), draws, check, memory=2**29)


@pytest.mark.parametrize("draws", DRAWS)
def test_tokenizer_bytes(tokens: Path, tmp_path: Path, draws: int) -> None:
    whole = (tokens / "tokenizer.json").read_bytes()
    head, tail = whole[:3000], whole[-1500:]

    def check(ends: tuple[bytes, bytes]) -> None:
        content = ends[0] + whole[3000:-1500] + ends[1]
        _use(with_file(tokens, tmp_path, "tokenizer.json", content))

    fuzz(
        st.tuples(mutations.changed(head, 2) | st.just(head), mutations.changed(tail, 2)),
        draws,
        check,
        2**29,
    )


def test_code_beside_a_model_is_never_run(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Remote code, as transformers calls it: not even asked about."""
    from fastattn.cli import main

    path = Path(shutil.copytree(tokens, tmp_path / "model"))
    GPT(GPTConfig(**{**SIZES["gpt2"], "vocab_size": 280})).save_pretrained(path)
    witness = tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Evil: pass\n")
    for name in ("tokenizer_config.json", "config.json"):
        data = json.loads((path / name).read_bytes())
        data["auto_map"] = {
            "AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil",
            "AutoModelForCausalLM": "evil.Evil",
        }  # fmt: skip
        data.pop("tokenizer_class", None)
        (path / name).write_text(json.dumps(data))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    monkeypatch.setattr("sys.stdin", None)
    for command in (
        ["generate", str(path), "fox", "--max-new-tokens", "2"],
        ["serve", str(path), "--port", "0"],
        ["accelerate", str(path)],
    ):
        monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
        main(command)
    models.load(path)
    Tokenizer.load(path)
    assert not witness.exists()


# --- GGUF -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_tensor("token_embd.weight", torch.randn(3, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read_gguf(path)
    return path


@pytest.mark.parametrize("draws", DRAWS)
def test_gguf(gguf_file: Path, tmp_path: Path, draws: int) -> None:
    whole = gguf_file.read_bytes()
    path = tmp_path / "changed.gguf"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        _, _, sources = read_gguf(path)
        for source in sources.values():
            source.tensor()

    fuzz(mutations.changed(whole), draws, check)


@pytest.mark.parametrize("count", [2**30, 2**60])
def test_an_array_of_a_gguf_file_that_says_more_than_the_file_has(
    tmp_path: Path, count: int
) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "bomb.gguf"
    key = b"general.x"
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, count)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair)

    def read() -> None:
        with pytest.raises(ValueError, match="things come, and ends before"):
            read_gguf(path)

    bounded.run(read, memory=2**26, seconds=10)


def test_saved_tensors_are_those_that_were_given(tmp_path: Path) -> None:
    """The bound of a process does not disturb what it reads."""
    tensors = {"a": torch.arange(6.0).view(2, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    got = bounded.run(functools.partial(_listed, tmp_path / "a.safetensors"))
    assert got == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def _listed(path: Path) -> list[list[float]]:
    found: list[list[float]] = load_file(path)["a"].tolist()
    return found
