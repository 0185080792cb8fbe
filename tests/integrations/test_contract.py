"""The contract of accelerate: hostile modules, and tools that change a model before or after it."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from integrations import tiny

import fastattn
from oracle import assert_close_to_reference

pytest.importorskip("transformers")


class Norm(torch.nn.Module):
    """An RMSNorm by its looks, so that it is probed."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.eps = 1e-5

    def forward(self, x: torch.Tensor) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def computing(name: str, forward: Any) -> type[torch.nn.Module]:
    return type(name, (Norm,), {"forward": forward})


def writing(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.weight.data.add_(1.0)
    return Norm.forward(self, x)


class WithoutTrain(Norm):
    def train(self, mode: bool = True) -> Any:
        raise RuntimeError("always in eval mode")


class Frozen(Norm):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError("frozen")
        super().__setattr__(name, value)


class Final(torch.nn.LayerNorm):
    def __init_subclass__(cls, **_: Any) -> None:
        raise TypeError("no subclasses")


LEFT_ALONE = [
    (computing("Raising", lambda m, x: 1 / 0), "ZeroDivisionError: division by zero"),
    (
        computing("Random", lambda m, x: Norm.forward(m, x) * torch.rand_like(x)),
        "output 0 is off",
    ),
    (computing("Demanding", lambda m, x, y, z: x), "missing 2 required positional arguments"),
    (computing("Writing", writing), "output 0 is off"),
    (
        computing("WritingIntoItsInput", lambda m, x: Norm.forward(m, x.mul_(2.0))),
        "a leaf Variable that requires grad",
    ),
    (computing("Mapping", lambda m, x: {"out": Norm.forward(m, x)}), "no RMSNorm"),
    (computing("Silent", lambda m, x: None), "fails on random input: TypeError"),
    (WithoutTrain, "cannot be examined: RuntimeError: always in eval mode"),
    (Frozen, "cannot be examined: AttributeError: frozen"),
    (Final, "cannot be examined: TypeError: no subclasses"),
]


class Drawing(Norm):
    """Draws from every generator, and seeds them."""

    def forward(self, x: torch.Tensor) -> Any:
        torch.manual_seed(random.randrange(9) + np.random.randint(9))
        torch.rand(3)
        return super().forward(x)


class Collecting(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.last: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> Any:
        self.seen.append(1)
        self.last["x"] = x
        return super().forward(x)


class WithList(Norm):
    """Settings that have no hash."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = ([8], torch.ones(2))


class WithNew(Norm):
    def __new__(cls, width: int) -> Any:
        return super().__new__(cls)


class GradientsOff(Norm):
    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            super().forward(x)
        return super().forward(x)


SWAPPED = [Drawing, Collecting, WithList, WithNew, GradientsOff]


def state_of(model: torch.nn.Module) -> list[Any]:
    """Everything that a probe could change, by value."""
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        [m.training for m in model.modules()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [(n, t.tolist(), t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()],
        [
            [len(hooks) for name, hooks in vars(m).items() if name.endswith("_hooks")]
            for m in model.modules()
        ],
        [(len(getattr(m, "seen", ())), len(getattr(m, "last", ()))) for m in model.modules()],
    ]


def between_norms(module: torch.nn.Module) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), module, torch.nn.LayerNorm(8))
    model[2].train(False)
    model[0].weight.grad = torch.full((8,), 3.0)
    model.seen = []  # by a hook, which no probe calls
    model[0].register_forward_hook(lambda *_: model.seen.append(1))
    return model


@pytest.mark.parametrize(("cls", "reason"), LEFT_ALONE, ids=[c.__name__ for c, _ in LEFT_ALONE])
def test_hostile_modules_are_left_alone(cls: type[torch.nn.Module], reason: str) -> None:
    model = between_norms(cls(8))
    before = state_of(model)
    report = fastattn.accelerate(model)
    assert state_of(model) == before
    assert [entry.name for entry in report.swapped] == ["0", "2"]
    assert reason in (report.left[0].reason or ""), report.left[0].reason
    assert type(model[1]) is cls
    fastattn.verify(model)
    assert state_of(model) == before


@pytest.mark.parametrize("cls", SWAPPED)
def test_probes_leave_no_trace(cls: type[torch.nn.Module]) -> None:
    model = between_norms(cls(8) if cls is WithNew else cls())
    before = state_of(model)
    report = fastattn.accelerate(model)
    assert [entry.name for entry in report.swapped] == ["0", "1", "2"]
    assert state_of(model) == before
    if cls is not WithNew:  # which neither copies nor pickles as it is
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model[1])))
        assert type(twin) is type(model[1])
    fastattn.restore(model)
    assert type(model[1]) is cls


def test_a_module_that_cannot_be_looked_at() -> None:
    """Not even asked whether it has an attribute: no hypothesis gets to see it."""

    class Closed(torch.nn.Module):
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"closed: {name}")

    model = torch.nn.Sequential(torch.nn.LayerNorm(8), Closed(), torch.nn.LayerNorm(8))
    assert [entry.name for entry in fastattn.accelerate(model).swapped] == ["0", "2"]
    assert type(model[1]) is Closed


def test_on_mixed_devices() -> None:
    """Module by module: what is on the meta device waits for its weights."""
    model = tiny.make("llama")
    model.model.layers[1].to("meta")
    report = fastattn.accelerate(model)
    assert any(e.name.startswith("model.layers.0.") for e in report.swapped)
    assert not any(e.name.startswith("model.layers.1.") for e in report.swapped)
    reasons = [e.reason for e in report.left if e.name.startswith("model.layers.1.")]
    assert any("on the meta device: load the weights first" in (r or "") for r in reasons)


def test_shared_modules_and_tied_weights() -> None:
    model = tiny.make("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].input_layernorm.weight = model.model.norm.weight
    ids = tiny.tokens(2, 9)
    expected = model(ids).logits
    report = fastattn.accelerate(model)
    assert sum(entry.class_name == "LlamaMLP" for entry in report.swapped) == 1
    assert model.model.layers[1].mlp is model.model.layers[0].mlp
    assert model.model.layers[1].input_layernorm.weight is model.model.norm.weight
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_left_alone() -> None:
    model = torch.ao.quantization.quantize_dynamic(tiny.make("llama"))
    ids = tiny.tokens(2, 9)
    expected = model(ids).logits
    were = {name: type(m) for name, m in model.named_modules() if "quantized" in type(m).__module__}
    assert were
    fastattn.accelerate(model)
    assert all(type(model.get_submodule(name)) is cls for name, cls in were.items())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    fastattn.restore(model)
    assert torch.equal(model(ids).logits, expected)


def test_an_optimiser_goes_on() -> None:
    """Its state is of the parameters, which stay: the steps are those of the original."""
    ids = tiny.tokens(3, 12)

    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    model = tiny.make("gpt2").train()
    exact = tiny.exact(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, exact)]
    steps(model, optimizers[0])
    steps(exact, optimizers[1])
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    other.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert fastattn.accelerate(model).swapped
    for each, optimizer in ((model, optimizers[0]), (twin, other), (exact, optimizers[1])):
        steps(each, optimizer)
    for ours, eager, wanted in zip(*(m.parameters() for m in (model, twin, exact)), strict=True):
        assert_close_to_reference(ours, eager, wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_assisted_generation(name: str) -> None:
    """A draft model proposes, the other one checks several tokens at once; both accelerated."""
    model, draft = tiny.make(name), tiny.make(name)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    for each in (model, draft):
        each.generation_config.eos_token_id = None
        each.config.use_cache = each.generation_config.use_cache = True
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 1}
    ids = tiny.tokens(1, 7)
    expected = model.generate(ids, **options)
    for each in (model, draft):
        assert fastattn.accelerate(each).swapped
    assert torch.equal(model.generate(ids, assistant_model=draft, **options), expected)
    assert torch.equal(model.generate(ids, **options), expected)


# --- PEFT -----------------------------------------------------------------------------------------

TARGETS = {"llama": ["q_proj", "v_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", TARGETS)
def test_peft(name: str, order: str, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    ids = tiny.tokens(3, 12)
    base = tiny.make(name)

    def adapted(model: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=4, target_modules=TARGETS[name], init_lora_weights=False, task_type="CAUSAL_LM",
            fan_in_fan_out=name == "gpt2",
        )  # fmt: skip
        return peft.get_peft_model(model, config).eval()

    def results(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return out.logits.detach(), grads

    expected = adapted(copy.deepcopy(base))
    model = copy.deepcopy(base)
    if order == "before":
        model = adapted(model)
        assert fastattn.accelerate(model).swapped
    else:
        assert fastattn.accelerate(model).swapped
        model = adapted(model)
    (logits, grads), (wanted, wanted_grads) = results(model), results(expected)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert grads.keys() == wanted_grads.keys() and any("lora" in n for n in grads)
    for parameter, grad in wanted_grads.items():
        torch.testing.assert_close(grads[parameter], grad, rtol=1e-3, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    fastattn.verify(merged)
    fastattn.restore(merged)
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
