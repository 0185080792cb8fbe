"""What is written loads bit for bit, here and in transformers, and never half."""

from __future__ import annotations

import copy
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune

from fastattn import GPT, GPTConfig

Pair = tuple[GPT, transformers.GPT2LMHeadModel]
MakePair = Callable[..., Pair]


def _equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype
        for name in first
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"dtype": torch.bfloat16}, {"eos_token_id": [1, 2]}],
    ids=str,
)
@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_loads_it_bit_for_bit(
    make_pair: MakePair, tmp_path: Path, changes: dict[str, Any], sharded: bool
) -> None:
    ours, theirs = make_pair(**changes)
    size = sum(p.nbytes for p in ours.parameters())
    ours.save_pretrained(tmp_path / "ours", max_shard_size=size // 2 if sharded else size)
    assert (len(list((tmp_path / "ours").glob("model*.safetensors"))) > 1) == sharded
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert _equal(loaded.to(ours.device), theirs)
    expected = theirs.config.to_dict()
    got = loaded.config.to_dict()
    assert {**got, "_name_or_path": None} == {**expected, "_name_or_path": None}
    assert _equal(GPT.from_pretrained(tmp_path / "ours", device=ours.device), ours)


def test_round_trip_keeps_the_config(small: dict[str, Any], tmp_path: Path) -> None:
    changes = {
        "n_inner": 20,
        "resid_pdrop": 0.3,
        "eos_token_id": (3, 4),
        "activation_function": "silu",
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "layer_norm_epsilon": 1e-3,
    }
    model = GPT(GPTConfig(**{**small, **changes}))
    model.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config == model.config


def test_other_files_stay_and_a_former_save_goes(pair: Pair, tmp_path: Path) -> None:
    ours, _ = pair
    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model-card.safetensors").write_text("mine")
    both = {"tokenizer.json", "model-card.safetensors", "config.json", "generation_config.json"}
    for size, weights in (
        (10**9, {"model.safetensors"}),
        (10**5, None),
        (10**9, {"model.safetensors"}),
    ):
        ours.save_pretrained(folder, max_shard_size=size)
        names = set(os.listdir(folder))
        if weights is None:
            assert "model.safetensors.index.json" in names and "model.safetensors" not in names
        else:
            assert names == both | weights
        assert _equal(GPT.from_pretrained(folder, device=ours.device), ours)


@pytest.mark.parametrize("failing", ["save_file", "fsync"])
def test_a_failed_save_leaves_what_was_there(
    pair: Pair, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    ours, _ = pair
    ours.save_pretrained(tmp_path / "ours")
    before = {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(
        {"save_file": "safetensors.torch.save_file", "fsync": "os.fsync"}[failing], fail
    )
    with pytest.raises(OSError, match="disk full"):
        GPT(GPTConfig(**small)).save_pretrained(tmp_path / "ours", max_shard_size=10**5)
    assert {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()} == before


def test_config_json_says_what_it_is(pair: Pair, tmp_path: Path) -> None:
    pair[0].save_pretrained(tmp_path / "ours")
    data = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert data["architectures"] == ["GPT2LMHeadModel"]
    assert (data["model_type"], data["dtype"], data["n_embd"]) == ("gpt2", "float32", 48)


def test_bad_shard_size(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_size must be positive, got 0"):
        pair[0].save_pretrained(tmp_path / "ours", max_shard_size=0)
    assert not (tmp_path / "ours").exists()


# --- models whose parts are no longer what GPT built ----------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process, on gloo."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Twice(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _compiled(module: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(module, backend="eager")


def _compile_parts(model: GPT) -> None:
    model.wte, model.lm_head = _compiled(model.wte), _compiled(model.lm_head)
    model.blocks[0] = _compiled(model.blocks[0])
    model.blocks[1].feed_forward.linear1 = _compiled(model.blocks[1].feed_forward.linear1)
    model.blocks[2] = _compiled(checkpoint_wrapper(model.blocks[2]))


def _prune_parts(model: GPT) -> None:
    prune.l1_unstructured(model.blocks[0].attention.in_proj, "weight", 0.5)
    prune.l1_unstructured(model.blocks[1].feed_forward.linear1, "weight", 0.5)
    torch.nn.utils.spectral_norm(model.blocks[2].attention.in_proj, "weight")
    parametrizations.weight_norm(model.blocks[2].feed_forward.linear2)
    with torch.no_grad():  # the attributes are those of before until the next forward
        for name, parameter in model.named_parameters():
            if name.endswith("_orig"):
                parameter.mul_(1.5)


def _sparse_part(model: GPT) -> None:
    weight = model.blocks[0].feed_forward.linear1.weight.detach()
    model.blocks[0].feed_forward.linear1.weight = torch.nn.Parameter(weight.to_sparse())


def _own_head(model: GPT) -> None:
    model.lm_head.weight = torch.nn.Parameter(torch.randn(97, 48))


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm", "ignore:.*FSDP")
@pytest.mark.parametrize(
    ("change", "tied"),
    [
        (_compile_parts, True),
        (_prune_parts, True),
        (_sparse_part, True),
        (_own_head, False),
        (lambda m: parametrize.register_parametrization(m.lm_head, "weight", Twice()), False),
        (lambda m: parametrize.register_parametrization(m.wte, "weight", Twice()), False),
        (lambda m: prune.l1_unstructured(m.lm_head, "weight", 0.5), False),
    ],
    ids=[
        "compiled",
        "pruned",
        "sparse",
        "own head",
        "other head",
        "other embedding",
        "pruned head",
    ],
)
def test_what_is_saved_is_what_it_computes_with(
    small: dict[str, Any], tmp_path: Path, change: Callable[[GPT], object], tied: bool
) -> None:
    model = GPT(GPTConfig(**small))
    change(model)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    model.save_pretrained(tmp_path / "ours")
    assert [module.training for module in model.modules()] == modes
    assert all(
        torch.equal(v.to_dense(), before[k].to_dense()) for k, v in model.state_dict().items()
    )
    loaded = GPT.from_pretrained(tmp_path / "ours")
    assert loaded.config.tie_word_embeddings == tied
    assert (loaded.lm_head.weight is loaded.wte.weight) == tied
    tokens = torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), model.eval()(tokens), rtol=1e-4, atol=1e-3)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    assert theirs.config.tie_word_embeddings == tied
    assert torch.equal(theirs.lm_head.weight, loaded.lm_head.weight)


def test_the_whole_compiled(pair: Pair, tmp_path: Path) -> None:
    ours, _ = pair
    _compiled(ours).save_pretrained(tmp_path / "ours")
    assert _equal(GPT.from_pretrained(tmp_path / "ours", device=ours.device), ours)


def test_tied_by_hand(small: dict[str, Any], tmp_path: Path) -> None:
    model = GPT(GPTConfig(**small, tie_word_embeddings=False))
    model.lm_head.weight = model.wte.weight
    model.save_pretrained(tmp_path / "ours")
    assert GPT.from_pretrained(tmp_path / "ours").config.tie_word_embeddings
    assert _equal(GPT.from_pretrained(tmp_path / "ours"), model)


def test_sharded_by_fsdp2(small: dict[str, Any], tmp_path: Path, one_process: None) -> None:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = GPT(GPTConfig(**small))
    whole = copy.deepcopy(model)
    for part in (*model.blocks, model):
        torch.distributed.fsdp.fully_shard(part, mesh=mesh)
    model.save_pretrained(tmp_path / "ours", max_shard_size=50_000)
    assert _equal(GPT.from_pretrained(tmp_path / "ours"), whole)
    tokens = torch.randint(0, 97, (2, 9))
    model(tokens, tokens)[1].backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(tmp_path / "ours")(tokens), model(tokens))


def test_sharded_before_it_has_weights(small: dict[str, Any], one_process: None) -> None:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = GPT(GPTConfig(**small), device="meta")
    for part in (*model.blocks, model):
        torch.distributed.fsdp.fully_shard(part, mesh=mesh)
    model.to_empty(device="cpu")
    model.reset_parameters()
    assert model.lm_head.weight is model.wte.weight


def test_wrapped_by_ddp(small: dict[str, Any], tmp_path: Path, one_process: None) -> None:
    wrap = torch.nn.parallel.DistributedDataParallel
    model = GPT(GPTConfig(**small))
    whole = copy.deepcopy(model)
    model.blocks[0] = wrap(model.blocks[0])
    wrap(_compiled(model)).module.save_pretrained(tmp_path / "ours")
    assert _equal(GPT.from_pretrained(tmp_path / "ours"), whole)


class Adapter(torch.nn.Module):
    """As peft wraps a layer: the weights that it shows are not all that it computes with."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.low = torch.nn.Linear(base.in_features, 2)
        self.high = torch.nn.Linear(2, base.out_features)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.base_layer.bias


def _adapt(model: GPT) -> None:
    model.blocks[0].feed_forward.linear1 = Adapter(model.blocks[0].feed_forward.linear1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_adapt, "no place for the parameters .*linear1.low.weight.*merge adapters"),
        (
            lambda m: setattr(
                m.blocks[0].feed_forward, "linear1", torch.nn.quantized.dynamic.Linear(48, 20)
            ),
            "linear1.weight is no tensor .*before it is quantised",
        ),
        (
            lambda m: setattr(m, "wte", torch.nn.Embedding(100, 48)),
            r"wte.weight must have the shape \(97, 48\) .*got \(100, 48\)",
        ),
        (lambda m: m.blocks.append(copy.deepcopy(m.blocks[0])), "no place .*blocks.3.norm1.weight"),
        (lambda m: m.blocks.pop(2), "the model has no blocks.2.norm1.weight"),
        (lambda m: m.to("meta"), "wte.weight is on the meta device"),
    ],
    ids=["adapter", "quantised", "enlarged", "more layers", "fewer layers", "meta"],
)
def test_what_is_no_gpt2_is_refused(
    small: dict[str, Any], tmp_path: Path, change: Callable[[GPT], object], message: str
) -> None:
    model = GPT(GPTConfig(**small))
    change(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "ours")
    assert not list(tmp_path.iterdir())


# --- the folder ----------------------------------------------------------------------------------


def test_a_renaming_that_fails_is_undone(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ours"
    GPT(GPTConfig(**small)).save_pretrained(folder, max_shard_size=100_000)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    new, replace = GPT(GPTConfig(**small)), os.replace
    for fatal in range(1, 2 * len(before)):
        calls = iter(range(1, 1000))

        def once(source: Path, target: Path) -> None:
            if next(calls) == fatal:  # noqa: B023
                raise OSError("no space")
            replace(source, target)

        monkeypatch.setattr("os.replace", once)
        with pytest.raises(OSError, match="no space"):
            new.save_pretrained(folder, max_shard_size=100_000)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_failed_save_makes_no_folder(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        pair[0].save_pretrained(tmp_path / "new" / "ours")
    assert set(tmp_path.iterdir()) == before


def test_modes_follow_the_umask(pair: Pair, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for _ in range(2):  # a new folder, and one that exists
            pair[0].save_pretrained(tmp_path / "ours", max_shard_size=100_000)
    finally:
        os.umask(before)
    files = list((tmp_path / "ours").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o750


def test_home(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    pair[0].save_pretrained("~/ours")
    assert (tmp_path / "home" / "ours" / "config.json").is_file()
    assert _equal(GPT.from_pretrained("~/ours", device=pair[0].device), pair[0])
    assert not (tmp_path / "~").exists()


def test_bad_folder(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match="folder is an empty path"):
        pair[0].save_pretrained("")
    with pytest.raises(ValueError, match="path is an empty path"):
        GPT.from_pretrained("")
    with pytest.raises(TypeError, match="folder must be a path, got NoneType"):
        pair[0].save_pretrained(None)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="folder must not be a file"):
        pair[0].save_pretrained("file")
    with pytest.raises(TypeError, match="max_shard_size must be an integer, in bytes, got '5GB'"):
        pair[0].save_pretrained("new", max_shard_size="5GB")  # type: ignore[arg-type]
    assert set(tmp_path.iterdir()) - before == {tmp_path / "file"}
