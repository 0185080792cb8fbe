"""The transformer layers and stacks against torch's, side by side on random arguments."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn.compare import LowRank, assert_module_close
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.nn import layer_norm as norm_module
from fastattn.nn import transformer
from oracle import assert_close_to_reference

BATCH, LENGTH, MEMORY, WIDTH, HEADS = 3, 5, 7, 16, 4
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
LAYERS = ("TransformerEncoderLayer", "TransformerDecoderLayer")
FUNCTIONS: list[Any] = ["relu", "gelu", F.silu, torch.relu, torch.tanh, lambda x: x.square()]
MODULES: list[Any] = [
    torch.nn.ReLU(), torch.nn.GELU(), torch.nn.GELU("tanh"), torch.nn.SiLU(), torch.nn.Tanh()
]  # fmt: skip


def _pair(name: str, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's with the same random weights, biases included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # why there will be no nested tensors
        ours, theirs = (
            getattr(namespace, name)(*args, **kwargs) for namespace in (fastattn.nn, torch.nn)
        )
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _layer(name: str, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    return _pair(name, WIDTH, HEADS, 24, **{"dropout": 0.0, "batch_first": True, **kwargs})


def _given(name: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a layer is called with: (x, memory) a decoder's, x an encoder's."""
    return tensors[: 1 + ("Decoder" in name)]


def _mask(draw: random.Random, *shape: int) -> torch.Tensor:
    """True hides, or added to the scores; every row sees its first key."""
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    if draw.random() < 0.5:
        return hidden
    return torch.randn(shape).bfloat16().float().masked_fill(hidden, -torch.inf)


def _masks(draw: random.Random, prefix: str, queries: int, keys: int) -> dict[str, Any]:
    """A random subset of the masks of one attention, whose arguments begin with `prefix`."""
    masks: dict[str, Any] = {}
    if draw.random() < 0.5:
        shape = draw.choice([(queries, keys), (BATCH * HEADS, queries, keys)])
        masks[f"{prefix}_mask"] = _mask(draw, *shape)
    elif draw.random() < 0.5 and queries == keys:
        masks[f"{prefix}_mask"] = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        masks["is_causal" if prefix == "src" else f"{prefix}_is_causal"] = True
    if draw.random() < 0.5:
        masks[f"{prefix}_key_padding_mask"] = _mask(draw, BATCH, keys)
    return masks


def _drawn(name: str, seed: int, dtype: torch.dtype) -> tuple[Any, Any, list[torch.Tensor], Any]:
    """A pair of layers with random arguments, inputs, and a call with random masks."""
    draw = random.Random(f"{name}{seed}")
    torch.manual_seed(seed)
    batch_first = draw.random() < 0.5
    ours, theirs = _layer(
        name,
        # A deep copy of torch's decoder layer has ReLU in the place of a module.
        activation=draw.choice(FUNCTIONS if "Decoder" in name else FUNCTIONS + MODULES),
        layer_norm_eps=draw.choice([1e-5, 0.1]),
        batch_first=batch_first,
        norm_first=draw.random() < 0.5,
        bias=draw.random() < 0.7,
        dtype=dtype,
    )
    masks = _masks(draw, "src" if "Encoder" in name else "tgt", LENGTH, LENGTH)
    lengths = [LENGTH]
    if "Decoder" in name:
        masks |= _masks(draw, "memory", LENGTH, MEMORY)
        lengths.append(MEMORY)
    inputs = [
        torch.randn((BATCH, n, WIDTH) if batch_first else (n, BATCH, WIDTH)).to(dtype)
        for n in lengths
    ]

    def call(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        of_dtype = {
            key: mask.to(inputs[0].dtype)
            if torch.is_tensor(mask) and mask.is_floating_point()
            else mask
            for key, mask in masks.items()
        }
        return module(*inputs, **of_dtype)

    return ours, theirs, inputs, call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", LAYERS)
def test_random_arguments(name: str, seed: int, dtype: torch.dtype) -> None:
    ours, theirs, inputs, call = _drawn(name, seed, dtype)
    for training in (True, False):
        assert_module_close(ours.train(training), theirs.train(training), *inputs, call=call)


def _inference(
    call: Callable[[torch.nn.Module, Any], torch.Tensor], *modules: Any, fast_path: bool = False
) -> None:
    """Ours and torch's under no_grad in eval mode, by the rule; `call` gets a dtype to cast to.

    torch's by default without its fast path, which is wrong for masks that add to the scores.
    """
    ours, theirs = (module.eval() for module in modules)
    with torch.no_grad():
        out = call(ours, torch.float32)
        torch.backends.mha.set_fastpath_enabled(fast_path)
        try:
            eager = call(theirs, torch.float32)
            exact = call(copy.deepcopy(theirs).double(), torch.float64)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert out.shape == eager.shape
    assert_close_to_reference(out, eager, exact)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("name", LAYERS)
def test_inference_on_random_arguments(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, inputs, call = _drawn(name, seed, torch.float32)
    for below in (0, 10**6):  # our forward, and torch's fast path where it is for a CPU
        monkeypatch.setattr(transformer, "FAST_PATH_BELOW", below)
        monkeypatch.setattr(transformer, "FAST_PATH_BELOW_WITH_A_MASK", below)
        _inference(lambda m, dtype: call(m, *(x.to(dtype) for x in inputs)), ours, theirs)


# --- which forward runs -------------------------------------------------------------------------


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that a layer calls for all but attention."""
    calls: list[str] = []
    ffn, layer_norm = transformer.ffn, norm_module.layer_norm

    def ffn_spy(*args: Any) -> Any:
        calls.append("ffn")
        return ffn(*args)

    def norm_spy(*args: Any, **kwargs: Any) -> Any:
        calls.append("layer_norm" if args[-1] is None else "add, layer_norm")
        return layer_norm(*args, **kwargs)

    monkeypatch.setattr(transformer, "ffn", ffn_spy)
    monkeypatch.setattr(norm_module, "layer_norm", norm_spy)
    return calls


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "activation",
    ["relu", "gelu", F.silu, torch.nn.GELU("tanh")],
    ids=["relu", "gelu", "F.silu", "tanh-GELU"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_a_few_ops(name: str, activation: Any, norm_first: bool, ops: list[str]) -> None:
    ours, _ = _layer(name, activation=activation, norm_first=norm_first)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    ours(*_given(name, x, x))
    sums = (2 if "Encoder" in name else 3) - norm_first
    assert sorted(ops) == [*["add, layer_norm"] * sums, "ffn", *["layer_norm"] * norm_first]


def test_why_torch() -> None:
    ours, _ = _layer("TransformerEncoderLayer")
    short, mask = torch.empty(2, 127, WIDTH), torch.zeros(1, 1, dtype=torch.bool)
    long = torch.empty(2, 256, WIDTH)
    nested = torch.nested.nested_tensor([torch.randn(3, WIDTH)])
    assert ours.why_torch(short) is None  # training
    assert ours.why_torch(nested) == "nested tensors"
    ours.eval()
    assert ours.why_torch(short) is None  # parameters want gradients
    with torch.no_grad():
        on_cpu = short.device.type == "cpu"
        added = mask.float()
        for x, below, masks in (
            (short, 256, (None, None)),
            (short, 128, (mask, None)),
            (short, 128, (added, None)),
        ):
            expected = f"on a CPU torch's fast path is the faster one below {below} positions"
            assert ours.why_torch(x, *masks) == (expected if on_cpu else None)
        assert ours.why_torch(short, added + 1) is None
        assert ours.why_torch(long) is None
        assert ours.why_torch(long[:, :128], None, mask) is None
        assert ours.why_torch(short[0]) is None  # unbatched: torch has no fast path


@pytest.mark.parametrize("activation", MODULES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_activations_that_are_modules(name: str, activation: torch.nn.Module) -> None:
    ours, theirs = _layer(name, activation=activation)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    out, expected = (m(*_given(name, x, x)) for m in (ours, theirs))
    torch.testing.assert_close(out, expected)


MASKED: dict[str, dict[str, torch.Tensor]] = {
    "no mask": {},
    "boolean": {"src_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)},
    "-inf": {"src_mask": torch.nn.Transformer.generate_square_subsequent_mask(LENGTH)},
    "padding": {"src_key_padding_mask": torch.arange(LENGTH).expand(BATCH, -1) > 3},
}


@pytest.mark.parametrize("masks", MASKED)
def test_torchs_fast_path_in_short_inference(masks: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("the measurement is of a CPU")
    ours, theirs = _layer("TransformerEncoderLayer")
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        out, expected = (m.eval()(x, **MASKED[masks]) for m in (ours, theirs))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_unbatched(name: str, training: bool) -> None:
    ours, theirs = _layer(name)
    inputs = _given(name, *(torch.randn(n, WIDTH) for n in (LENGTH, MEMORY)))
    hidden = torch.tensor([False] * 4 + [True])
    kwargs = {("src" if "Encoder" in name else "tgt") + "_key_padding_mask": hidden}

    def call(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        return module(*inputs, **kwargs)

    assert_module_close(ours.train(training), theirs.train(training), *inputs, call=call)


@pytest.mark.parametrize("shape", [(0, 5, WIDTH), (2, 1, WIDTH)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_and_single(shape: tuple[int, ...], training: bool) -> None:
    ours, theirs = _layer("TransformerEncoderLayer")
    x = torch.randn(shape)
    torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))


def test_strided_inputs() -> None:
    ours, theirs = _layer("TransformerEncoderLayer")

    def call(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x.transpose(0, 2)[:, ::2])

    assert_module_close(ours, theirs, torch.randn(WIDTH, 9, BATCH), call=call)


@pytest.mark.parametrize("training", [True, False])
def test_rows_that_see_nothing_are_finite(training: bool) -> None:
    """As torch's layer without its fast path."""
    ours, theirs = _layer("TransformerEncoderLayer")
    x = torch.randn(2, LENGTH, WIDTH, requires_grad=True)
    hidden = torch.zeros(2, LENGTH, dtype=torch.bool)
    hidden[1] = True
    out, expected = (m.train(training)(x, src_key_padding_mask=hidden) for m in (ours, theirs))
    torch.testing.assert_close(out, expected)
    assert out.isfinite().all()


# --- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_every_dropout_drops(name: str) -> None:
    """With branches that are constants, an output says which of them were dropped."""
    p = 0.25
    ours = getattr(fastattn.nn, name)(WIDTH, HEADS, 1, dropout=p, norm_first=True)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
        ours.self_attn.out_proj.bias.fill_(3.0)
        ours.linear1.bias.fill_(1.0)
        ours.linear2.weight.fill_(30.0)
    x = torch.zeros(100, 100, WIDTH)
    seen = ((1 - p) * ours(*_given(name, x, x))).round()
    kept, both = 1 - p, (1 - p) ** 2  # the hidden layer is dropped inside and after
    expected = {0: p * (1 - both), 3: kept * (1 - both), 40: p * both, 43: kept * both}
    shares = {value: (seen == value).float().mean().item() for value in expected}
    assert shares == pytest.approx(expected, abs=0.02)
    ours.eval()
    assert torch.equal(ours(*_given(name, x, x)), x + 33.0)


# --- parts that must be called -------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_hooks_on_every_part(name: str, norm_first: bool) -> None:
    ours, theirs = _layer(name, activation=torch.nn.ReLU(), norm_first=norm_first)
    x, seen = torch.randn(BATCH, LENGTH, WIDTH), []
    for module in (ours, theirs):
        calls: dict[str, Any] = {}
        for part, child in module.named_modules():
            child.register_forward_hook(
                lambda _, args, out, part=part, calls=calls: calls.update({part: (args, out)})
            )
        module(*_given(name, x, x))
        seen.append(calls)
    assert seen[0].keys() == seen[1].keys()
    for part, (args, out) in seen[0].items():
        if part:
            torch.testing.assert_close(args, seen[1][part][0], msg=f"the input of {part}")
        torch.testing.assert_close(out, seen[1][part][1], msg=f"the output of {part}")


def test_a_norm_over_two_dimensions() -> None:
    ours, theirs = _layer("TransformerEncoderLayer")
    for module in (ours, theirs):
        module.norm1 = torch.nn.LayerNorm((LENGTH, WIDTH))
    assert_module_close(ours, theirs, torch.randn(BATCH, LENGTH, WIDTH))


@pytest.mark.parametrize("part", ["linear1", "linear2", "norm1", "norm2", "dropout", "dropout2"])
def test_a_part_replaced_by_another_module(part: str) -> None:
    ours, theirs = _layer("TransformerEncoderLayer")
    if "linear" in part:
        wrapped = LowRank(getattr(ours, part))
    else:
        wrapped = torch.nn.Sequential(getattr(ours, part), torch.nn.Tanh())
    for module in (ours, theirs):
        setattr(module, part, copy.deepcopy(wrapped))
    assert_module_close(ours, theirs, torch.randn(BATCH, LENGTH, WIDTH))


def test_pruned_parts() -> None:
    ours, theirs = _layer("TransformerEncoderLayer")
    for module in (ours, theirs):
        prune.l1_unstructured(module.linear1, "weight", 0.5)
        prune.l1_unstructured(module.norm2, "weight", 0.5)
        prune.l1_unstructured(module.self_attn, "in_proj_weight", 0.5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        for module in (ours, theirs):
            module.linear1.weight_orig.mul_(2)  # pruned again at each call
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", LAYERS)
def test_dynamically_quantised(name: str) -> None:
    if not torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no quantised engine")
    pair = [
        torch.ao.quantization.quantize_dynamic(m, {torch.nn.Linear}).train() for m in _layer(name)
    ]
    x = torch.randn(BATCH, LENGTH, WIDTH)
    ours, theirs = (m(*_given(name, x, x)) for m in pair)
    torch.testing.assert_close(ours, theirs)


# --- stacks --------------------------------------------------------------------------------------


def _stack(ours: bool, name: str, norm: bool, **kwargs: Any) -> Any:
    namespace = fastattn.nn if ours else torch.nn
    layer = getattr(namespace, f"{name}Layer")(WIDTH, HEADS, 24, **kwargs)
    return getattr(namespace, name)(layer, 2, torch.nn.LayerNorm(WIDTH) if norm else None)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_encoder_in_inference_with_padding(padding: str, norm: bool, device: str) -> None:
    """With the padding on the right torch makes nested tensors, whose padding comes out as 0."""
    kwargs: dict[str, Any] = {"dropout": 0.1, "batch_first": True}
    ours, theirs = (_stack(which, "TransformerEncoder", norm, **kwargs) for which in (True, False))
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    x, hidden = torch.randn(3, 150, WIDTH), torch.zeros(3, 150, dtype=torch.bool)
    for row, length in enumerate((150, 90, 1)):
        hidden[row, length:] = True
    hidden = hidden if padding == "right" else hidden.flip(1)

    def call(module: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
        return module(x.to(dtype), src_key_padding_mask=hidden)

    _inference(call, ours, theirs, fast_path=True)
    if padding == "right" and not norm:
        with torch.no_grad():
            assert (ours.eval()(x, src_key_padding_mask=hidden)[hidden] == 0).all()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer(batch_first: bool, norm_first: bool) -> None:
    ours, theirs = _pair(
        "Transformer", WIDTH, HEADS, 2, 2, 24, 0.0, batch_first=batch_first, norm_first=norm_first
    )
    causal = torch.nn.Transformer.generate_square_subsequent_mask(LENGTH)
    hidden = torch.zeros(BATCH, MEMORY, dtype=torch.bool)
    hidden[1, 3:] = True

    def call(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        mask = causal.to(inputs[0].dtype)
        masks = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
        return module(*inputs, tgt_mask=mask, **masks)

    def shape(n: int) -> tuple[int, int, int]:
        return (BATCH, n, WIDTH) if batch_first else (n, BATCH, WIDTH)

    inputs = [torch.randn(shape(n)) for n in (MEMORY, LENGTH)]
    assert_module_close(ours, theirs, *inputs, call=call)
    _inference(lambda m, dtype: call(m, *(x.to(dtype) for x in inputs)), ours, theirs)


def test_all_parts_of_a_transformer_are_ours() -> None:
    model = fastattn.nn.Transformer(WIDTH, HEADS, 1, 1, 24)
    theirs = [type(m).__name__ for m in model.modules() if type(m) in transformer.OURS]
    assert theirs == []
    assert isinstance(model.encoder.layers[0].norm1, fastattn.nn.LayerNorm)


def test_what_the_caller_gives_stays_what_it_is() -> None:
    norm, encoder = torch.nn.LayerNorm(WIDTH), torch.nn.Identity()
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True)
    stack = fastattn.nn.TransformerEncoder(layer, 2, norm)
    assert type(norm) is torch.nn.LayerNorm
    assert type(layer) is torch.nn.TransformerEncoderLayer
    assert type(layer.self_attn) is torch.nn.MultiheadAttention
    assert all(type(m) is fastattn.nn.TransformerEncoderLayer for m in stack.layers)

    given = torch.nn.TransformerEncoder(layer, 1)
    model = fastattn.nn.Transformer(WIDTH, HEADS, custom_encoder=given, custom_decoder=encoder)
    assert model.encoder is given and type(given) is torch.nn.TransformerEncoder
    assert model.decoder is encoder
    assert type(given.layers[0]) is torch.nn.TransformerEncoderLayer


def test_nested_tensors() -> None:
    ours, theirs = _layer("TransformerEncoderLayer")
    nested = torch.nested.nested_tensor([torch.randn(n, WIDTH) for n in (3, 5)])
    with torch.no_grad():
        out, expected = (m.eval()(nested).to_padded_tensor(0.0) for m in (ours, theirs))
    torch.testing.assert_close(out, expected)


# --- errors --------------------------------------------------------------------------------------

X = (2, LENGTH, WIDTH)
WRONG_CALLS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "features": lambda m: m(torch.randn(2, LENGTH, WIDTH + 1)),
    "dimensions": lambda m: m(torch.randn(1, 2, LENGTH, WIDTH)),
    "mask's shape": lambda m: m(torch.randn(X), torch.zeros(LENGTH, LENGTH + 1).bool()),
    "mask's dtype": lambda m: m(torch.randn(X), torch.zeros(LENGTH, LENGTH).int()),
    "padding's shape": lambda m: m(
        torch.randn(X), src_key_padding_mask=torch.zeros(2, LENGTH + 1).bool()
    ),
    "padding's dtype": lambda m: m(
        torch.randn(X), src_key_padding_mask=torch.zeros(2, LENGTH).int()
    ),
    "a causal hint without a mask": lambda m: m(torch.randn(X), is_causal=True),
    "no tensor": lambda m: m([[1.0]]),
    "unknown argument": lambda m: m(torch.randn(X), mask=None),
}


@pytest.mark.parametrize("wrong", WRONG_CALLS)
def test_calls_that_torch_refuses(wrong: str) -> None:
    for module in _layer("TransformerEncoderLayer"):
        with pytest.raises((ValueError, TypeError, RuntimeError, AssertionError, AttributeError)):
            WRONG_CALLS[wrong](module)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((WIDTH, 3), {}),
        ((WIDTH, HEADS), {"activation": "swish"}),
        ((WIDTH, HEADS), {"dropout": 1.5}),
        ((WIDTH, HEADS), {"nheads": 2}),
        ((-1, 1), {}),
    ],
)
@pytest.mark.parametrize("name", LAYERS)
def test_constructors_raise_as_torchs(name: str, args: tuple, kwargs: dict) -> None:
    errors = []
    for namespace in (fastattn.nn, torch.nn):
        with pytest.raises(Exception) as caught:
            getattr(namespace, name)(*args, **kwargs)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


# --- torch's machinery ---------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_whole(name: str, grad: bool) -> None:
    ours, _ = _layer(name)
    ours.train(grad)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    inputs = _given(name, x, x)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(*inputs), ours(*inputs))


def test_one_compilation_serves_every_length() -> None:
    ours, _ = _layer("TransformerEncoderLayer")
    ours.eval()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        compiled(torch.randn(2, 5, WIDTH))
        with torch.compiler.set_stance("fail_on_recompile"):
            for length in (8, 200, 300):
                x = torch.randn(2, length, WIDTH)
                torch.testing.assert_close(compiled(x), ours(x))


@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name: str, device: str) -> None:
    ours, theirs = _layer(name, activation="gelu")

    def call(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return module(*inputs)

    inputs = _given(name, *(torch.randn(BATCH, n, WIDTH) for n in (LENGTH, MEMORY)))
    assert_module_close(ours, theirs, *inputs, call=call)


@pytest.mark.parametrize("training", [True, False])
def test_functional_transforms_see_through(training: bool) -> None:
    ours, _ = _layer("TransformerEncoderLayer")
    ours.train(training)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    x = torch.randn(BATCH, LENGTH, WIDTH)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ours, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for name, parameter in ours.named_parameters():
        expected = [
            torch.autograd.grad(loss(dict(ours.named_parameters()), row), parameter)[0] for row in x
        ]
        torch.testing.assert_close(each[name], torch.stack(expected), rtol=1e-4, atol=1e-4)

    tangent = torch.randn_like(x[0])
    _, along = torch.func.jvp(lambda row: loss(parameters, row), (x[0],), (tangent,))
    leaf = x[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(parameters, leaf), leaf)
    torch.testing.assert_close(along, (gradient * tangent).sum(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # where torch's fast path would be for it
        outs = torch.func.vmap(lambda row: ours(row[None])[0])(x)
        torch.testing.assert_close(outs, ours(x))


def test_second_derivative() -> None:
    ours, _ = _layer("TransformerEncoderLayer", dtype=torch.float64, activation="gelu")
    x = torch.randn(1, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(ours, (x,), atol=1e-4)


def test_checkpointing() -> None:
    ours, _ = _layer("TransformerEncoderLayer", dropout=0.2)
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    gradients = []
    for run in (ours, lambda x: checkpoint(ours, x, use_reentrant=False)):
        torch.manual_seed(7)
        gradients.append(torch.autograd.grad(run(x).square().sum(), x)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_on_every_backend(name: str, backend: str) -> None:
    ours, theirs = _layer(name, activation="gelu")

    def call(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        with fastattn.use_backend(backend):
            return module(*inputs)

    x = torch.randn(BATCH, LENGTH, WIDTH)
    inputs = _given(name, x, torch.randn(BATCH, MEMORY, WIDTH))
    assert_module_close(ours, theirs, *inputs, call=call, call_theirs=lambda m, *xs: m(*xs))
