"""Fewer weights, heads and hidden features of a GPT: masks first, then a smaller model.

    prune_heads(model, keep=6)          # masks of torch.nn.utils.prune: the model can be trained on
    prune_features(model, keep=1024)
    small = smaller(model)              # the same logits, from fewer weights
    small.save_pretrained("folder")

A head or a hidden feature counts by the norm of all weights that it has (as a single weight by its
magnitude in Han et al. 2015, arXiv:1506.02626), compared with the others of its layer: each layer
keeps as many, for a config has one number for all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import prune

from fastattn.models import GPT
from fastattn.models.folder.rounded import is_rounded
from fastattn.nn import Attention, FeedForward
from fastattn.nn.checks import check_integer, check_number
from fastattn.nn.plain import refresh


def prune_weights(model: torch.nn.Module, share: float) -> None:
    """Set the smallest weights of all linear layers together to zero, in place.

    A mask of torch.nn.utils.prune holds each at zero while the model is trained on;
    `torch.nn.utils.prune.remove` makes it final, and `save_pretrained` saves the zeros. The model
    is as large and as fast as before. A weight that an embedding shares is left alone.

    Args:
        share: of all these weights, above 0 and below 1.

    Raises:
        ValueError: share is outside of that, or the model has no linear layer or quantised ones.
    """
    check_number("share", share)
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share}")
    _check_floating(model)
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    layers = [
        (module, "weight")
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in embedded
    ]
    if not layers:
        raise ValueError("the model has no linear layer whose weight is its own")
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=share)


@torch.no_grad()
def prune_heads(model: GPT, keep: int) -> None:
    """Mask all but ``keep`` key-value heads of each layer, and the queries that read them.

    The model is changed in place: the mask is of the columns of ``out_proj``, so a masked head has
    no part in the output and gets no gradient.

    Raises:
        TypeError, ValueError: ``model`` is no GPT, or has quantised weights, or norms over
            all heads together; ``keep`` is not from 1 to its number of key-value heads.
    """
    _check(model)
    _check_keep(keep, model.config.kv_heads, "key-value heads")
    for attention in _parts(model, Attention):
        chosen = _largest(_head_norms(attention), keep)
        columns = _columns_of_heads(attention, chosen)
        _mask_columns(attention.out_proj, columns)


@torch.no_grad()
def prune_features(model: GPT, keep: int) -> None:
    """Mask all but ``keep`` hidden features of each feed-forward, in place.

    The mask is of the columns of ``linear2``. Errors are those of `prune_heads`.
    """
    _check(model)
    _check_keep(keep, model.config.feedforward_dim, "hidden features")
    for part in _parts(model, FeedForward):
        into = [part.linear1] if part.gate is None else [part.linear1, part.gate]
        squares = part.linear2.weight.square().sum(0)
        squares += sum(layer.weight.square().sum(1) for layer in into)
        _mask_columns(part.linear2, _largest(squares, keep))


@torch.no_grad()
def smaller(model: GPT) -> GPT:
    """A GPT without the heads and hidden features of which nothing is read; its logits are equal.

    Not read is a key-value head whose columns in ``out_proj`` are all zero, for each query head
    that reads it, and a feature whose column in ``linear2`` is zero: those that `prune_heads` and
    `prune_features` mask. The result is in eval mode, with weights of its own.

    Raises:
        TypeError, ValueError: as `prune_heads`; the layers do not all have as many left, or none.
    """
    _check(model)
    heads = [_read_heads(attention) for attention in _parts(model, Attention)]
    features = [_read_columns(part.linear2) for part in _parts(model, FeedForward)]
    kv_heads, hidden = _count("heads", heads), _count("hidden features", features)
    config = model.config
    small = GPT(
        dataclasses.replace(
            config,
            n_head=config.n_head // config.kv_heads * kv_heads,
            n_kv_head=kv_heads,
            head_size=config.head_dim,
            n_inner=hidden,
        ),
        device=model.device,
        dtype=model.wte.weight.dtype,
    )
    state: dict[str, Tensor] = {}
    for name in small.state_dict():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        refresh(module)
        state[name] = getattr(module, leaf).detach()
    for layer, (kept, columns) in enumerate(zip(heads, features)):
        attention = model.blocks[layer].attention
        ours = f"blocks.{layer}.attention."
        _take(state, ours + "in_proj", _rows_of_heads(attention, kept), 0)
        _take(state, ours + "out_proj", _columns_of_heads(attention, kept), 1)
        ours = f"blocks.{layer}.feed_forward."
        _take(state, ours + "linear1", columns, 0)
        _take(state, ours + "gate", columns, 0)
        _take(state, ours + "linear2", columns, 1)
    small.load_state_dict(state)
    small.family, small.generation_config = model.family, model.generation_config
    return small.eval()


def _take(state: dict[str, Tensor], layer: str, places: Tensor, dim: int) -> None:
    """Keep these rows (dim 0), or these columns (dim 1), of a linear layer."""
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in state and (dim == 0 or name.endswith("weight")):
            state[name] = state[name].index_select(dim, places)


def _parts(model: GPT, cls: type) -> list[Any]:
    return [part for part in model.modules() if isinstance(part, cls)]


def _largest(norms: Tensor, keep: int) -> Tensor:
    return norms.topk(keep).indices.sort().values


def _head_norms(attention: Any) -> Tensor:
    """(kv_heads,): squares of the rows and columns that belong to each key-value head, summed."""
    rows = attention.in_proj.weight.square().sum(1)
    columns = attention.out_proj.weight.square().sum(0)
    return torch.stack(
        [
            rows[_rows_of_heads(attention, head)].sum()
            + columns[_columns_of_heads(attention, head)].sum()
            for head in torch.arange(attention.num_kv_heads, device=rows.device).split(1)
        ]
    )


def _columns_of_heads(attention: Any, heads: Tensor) -> Tensor:
    """The columns of out_proj that the queries of these key-value heads write, in order."""
    size = attention.num_heads // attention.num_kv_heads * attention.head_dim
    return (heads.unsqueeze(1) * size + torch.arange(size, device=heads.device)).flatten()


def _rows_of_heads(attention: Any, heads: Tensor) -> Tensor:
    """The rows of in_proj of these key-value heads: of their queries, then keys, then values."""
    size = attention.head_dim
    queries = attention.num_heads * size
    keys = (heads.unsqueeze(1) * size + torch.arange(size, device=heads.device)).flatten()
    values = keys + attention.num_kv_heads * size
    return torch.cat((_columns_of_heads(attention, heads), queries + keys, queries + values))


def _mask_columns(layer: torch.nn.Linear, columns: Tensor) -> None:
    mask = torch.zeros_like(layer.weight)
    mask[:, columns] = 1
    prune.custom_from_mask(layer, "weight", mask)


def _read_columns(layer: torch.nn.Linear) -> Tensor:
    refresh(layer)
    return layer.weight.detach().any(0).nonzero().flatten()


def _read_heads(attention: Any) -> Tensor:
    refresh(attention.out_proj)
    read = attention.out_proj.weight.detach().any(0).view(attention.num_kv_heads, -1).any(1)
    return read.nonzero().flatten()


def _count(what: str, layers: list[Tensor]) -> int:
    counts = [len(kept) for kept in layers]
    if len(set(counts)) > 1 or not counts[0]:
        raise ValueError(
            f"each layer must have as many {what} that are read, at least 1, for the config has "
            f"one number for all; the layers have {counts}"
        )
    return counts[0]


def _check(model: GPT) -> None:
    if not isinstance(model, GPT):
        raise TypeError(f"model must be a fastattn.GPT, got {type(model).__name__}")
    if model.config.qk_norm == "all":
        raise ValueError('qk_norm="all" norms all heads as one vector: none can be taken out')
    _check_floating(model)


def _check_floating(model: torch.nn.Module) -> None:
    if is_rounded(model):
        raise ValueError("the model has weights of 8 bits: prune it before it is quantised")


def _check_keep(keep: int, there: int, what: str) -> None:
    if not 1 <= check_integer("keep", keep) <= there:
        raise ValueError(f"keep must be from 1 to the model's {there} {what}, got {keep}")
