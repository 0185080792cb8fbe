"""Tensor parallelism: the matrices of a model in parts, one for each process of a group.

    _, mesh = layout.meshes_of(config, "cuda")
    parallelize(model, mesh["tensor"])            # in place, before FSDP2 and the optimiser

Attention is divided by heads, the feed-forward by columns of its hidden layer, embedding and head
by tokens (Shoeybi et al. 2019, arXiv:1909.08053; the loss: vocabulary.py). Norms, positions and
biases that follow a sum are on every process. All processes of the group read the same batches and
have the same loss. A layer sends two sums of its activations (batch, seqlen, embed_dim) in the
forward and two in the backward.

Every parameter becomes a DTensor of the mesh, so that `fully_shard` over other dimensions,
optimisers, clip_grad_norm_ and torch.distributed.checkpoint know how it lies. The global order of
its rows is that of one process, but in a projection of q, k and v together, where each process has
rows of all three: `canonical` and `localised` turn that one around, of weights, gradients and
optimiser states alike. `save_pretrained` does so itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from fastattn import nn
from fastattn.models import GPT, Encoder, EncoderDecoder, encoder_decoder, gpt
from fastattn.models.encoder_heads import EncoderForMaskedLM
from fastattn.training.distributed import modules
from fastattn.training.distributed.vocabulary import parts_of

EVERYWHERE = Replicate()
# Modules of which every process has the whole.
REPLICATED = (nn.LayerNorm, nn.RMSNorm, nn.OffsetRMSNorm, nn.Linear, torch.nn.Embedding)
KNOWN = (
    *REPLICATED,
    torch.nn.Linear,
    nn.Attention,
    nn.FeedForward,
    nn.RelativePositionBias,
    Encoder,
    gpt.Head,
    encoder_decoder.Head,
)
WITH_VOCABULARY = (GPT, EncoderDecoder, Encoder, EncoderForMaskedLM)


def parallelize(model: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
    """Divide a GPT, Encoder or EncoderDecoder among the processes of `mesh`, in place.

    The weights are those of the group's first process. A model that generates needs the same
    arguments, and generators seeded alike, on all processes.

    Args:
        model: with all its weights on each process, on the mesh's device.
        mesh: of one dimension.

    Returns:
        The model.

    Raises:
        ValueError: heads, columns or tokens do not divide among the processes, a module is none of
            ours (adapters, swapped modules), or the model is divided already. Nothing is changed
            then, on any process.
        TypeError: `mesh` is no DeviceMesh.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f'mesh must have one dimension, got {mesh.ndim}: take a part, as mesh["tensor"]'
        )
    styles = plan(model, mesh.size())
    parallelize_module(model, mesh, styles)
    return model


def canonical(model: torch.nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A parameter of a divided model, or what lies as it does, with the rows of one process' order.

    Args:
        name: the parameter's in `model.named_parameters()`. Any other but a packed projection's is
            returned as it is, and so is a number (an optimiser's step).
        tensor: a DTensor of any placements, which is gathered and divided again, so that all its
            processes must call; or the whole.

    Returns:
        A tensor of the same kind and placements, without a gradient.
    """
    owner = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, modules.Columns) or not tensor.dim():
        return tensor
    return _turned(tensor, owner.one_process_order)


def localised(model: torch.nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The reverse of `canonical`."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, modules.Columns) or not tensor.dim():
        return tensor
    return _turned(tensor, owner.parallel_order)


def _turned(tensor: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return turn(tensor)
    whole = turn(tensor.full_tensor())
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)


class Style(ParallelStyle):
    """How a module becomes one of many processes: DTensors for parameters, and another class.

    Args:
        mixin: of `modules`; None for a module that is only read by its parent.
        place: where the parameters lie.
        others: where those of some names lie instead.
        attributes: that the module gets.
    """

    def __init__(
        self,
        mixin: type[modules.Parallel] | None = modules.Parallel,
        place: Placement = EVERYWHERE,
        others: Mapping[str, Placement] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self.mixin: Any = mixin
        self.place = place
        self.others = others or {}
        self.attributes = attributes or {}
        self.shared: dict[Tensor, torch.nn.Parameter] = {}  # a plan's styles have one

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> torch.nn.Module:
        if self.mixin is not None:
            former: Any = type(module)
            module.__class__ = modules.parallel_class(self.mixin, former)
            for name, value in {**self.attributes, "mesh": device_mesh}.items():
                setattr(module, name, value)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in self.shared:
                values = parameter.detach()
                if isinstance(module, modules.Columns):
                    values = module.parallel_order(values)
                place = [self.others.get(name, self.place)]
                divided = distribute_tensor(
                    values, device_mesh, place, src_data_rank=self.src_data_rank
                )
                self.shared[parameter] = torch.nn.Parameter(divided, parameter.requires_grad)
            module._parameters[name] = self.shared[parameter]
        whole: torch.nn.Module = module
        return whole


def plan(model: torch.nn.Module, count: int) -> dict[str, ParallelStyle]:
    """How each module that has parameters is divided among `count` processes, by its name.

    For `torch.distributed.tensor.parallel.parallelize_module`, once.

    Raises:
        ValueError: as `parallelize`.
    """
    shared: dict[Tensor, torch.nn.Parameter] = {}
    styles: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if isinstance(module, modules.Parallel):
            raise ValueError(f"{name or 'the model'} is divided among processes already")
        inside = f"{name}." if name else ""
        for child, style in _styles(module, inside, count):
            style.shared = shared
            styles.setdefault(f"{inside}{child}" if child else name, style)
        owns = any(parameter is not None for parameter in module._parameters.values())
        known = any(type(module) is cls for cls in KNOWN)
        if (owns and name not in styles) or (name in styles and not known):
            kind = type(module)
            raise ValueError(
                f"{name or 'the model'} is a {kind.__module__}.{kind.__qualname__}, and tensor "
                "parallelism knows only the modules of GPT, Encoder and EncoderDecoder as they are "
                "built: read a model of transformers as one of these, merge adapters, restore "
                "swapped modules, or take tensor=1"
            )
    return styles


def _styles(module: Any, inside: str, count: int) -> Iterator[tuple[str, Style]]:
    """The styles of a module and of children that it uses in a way of its own."""
    if isinstance(module, nn.Attention):
        yield from _attention(module, inside, count)
    elif isinstance(module, nn.FeedForward):
        _check_divides(f"{inside}feedforward_dim", module.feedforward_dim, count)
        yield "", Style(modules.ParallelFeedForward)
        yield "linear1", Style(None, Shard(0))
        yield "linear2", Style(None, Shard(1), {"bias": EVERYWHERE})
        if module.gate is not None:
            yield "gate", Style(None, Shard(0))
    elif isinstance(module, nn.RelativePositionBias):
        yield "", Style(modules.Parallel, Shard(1))
    elif isinstance(module, WITH_VOCABULARY):
        parts_of(module.config.vocab_size, count)  # raises
        of_logits = {"logits_bias": Shard(1)}  # BART's shape, (1, tokens)
        for child in ("wte", "embedding", "lm_head", "decoder"):
            part = module._modules.get(child)
            if isinstance(part, torch.nn.Embedding):
                yield child, Style(modules.Tokens, Shard(0))
            elif isinstance(part, torch.nn.Linear):
                yield child, Style(modules.Head, Shard(0), of_logits)
        if isinstance(module, Encoder):
            yield "", Style(modules.TokenTypes)
    elif any(type(module) is cls for cls in REPLICATED):
        yield "", Style()


def _attention(module: nn.Attention, inside: str, count: int) -> Iterator[tuple[str, Style]]:
    heads, kv_heads, size = module.num_heads, module.num_kv_heads, module.head_dim
    _check_divides(f"{inside}num_heads", heads, count)
    _check_divides(f"{inside}num_kv_heads", kv_heads, count)
    own = {"num_heads": heads // count, "num_kv_heads": kv_heads // count}
    yield "", Style(modules.ParallelAttention, attributes=own)
    q, kv = (heads * size,), (kv_heads * size, kv_heads * size)
    packed = {"q_proj": q, "kv_proj": kv} if module.cross else {"in_proj": q + kv}
    for child, sections in packed.items():
        yield child, Style(modules.Columns, Shard(0), attributes={"sections": sections})
    yield "out_proj", Style(modules.Rows, Shard(1), {"bias": EVERYWHERE})
    if module.qk_norm == "all":
        yield "q_norm", Style(modules.VectorNorm, Shard(0))
        yield "k_norm", Style(modules.VectorNorm, Shard(0))


def _check_divides(name: str, number: int, count: int) -> None:
    if number % count:
        raise ValueError(
            f"{name} is {number}, which tensor={count} processes cannot share equally: take a "
            "number of processes that divides it"
        )
