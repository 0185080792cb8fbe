"""PyTorch's own modules, as `accelerate` meets them in any model."""

from __future__ import annotations

import torch

from fastattn.backends import explanation_of
from fastattn.integrations.proof import Draw, Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.nn import LayerNorm, Linear, RMSNorm
from fastattn.ops.layer_norm import layer_norm, rms_norm
from fastattn.ops.linear.interface import MIN_WEIGHTS, mkl_is_slow


def _norm_probes(module: torch.nn.Module, draw: Draw) -> list[Probe]:
    assert isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm))
    # A mean that is far from 0: where a norm loses digits if it does.
    return [Probe((draw.normal(3, 5, *module.normalized_shape) + 4.0,))]


def _layer_norm_backend(module: torch.nn.Module, probe: Probe) -> str | None:
    assert isinstance(module, torch.nn.LayerNorm)
    x, weight, bias = (
        None if tensor is None else tensor.flatten(-len(module.normalized_shape))
        for tensor in (probe.args[0], module.weight, module.bias)
    )
    return explanation_of(layer_norm, x, weight, bias, module.eps).backend


def _rms_norm_backend(module: torch.nn.Module, probe: Probe) -> str | None:
    assert isinstance(module, torch.nn.RMSNorm)
    x, weight = (
        None if tensor is None else tensor.flatten(-len(module.normalized_shape))
        for tensor in (probe.args[0], module.weight)
    )
    return explanation_of(rms_norm, x, weight, module.eps).backend


def _linear_refusal(module: torch.nn.Module) -> str | None:
    assert isinstance(module, torch.nn.Linear)
    weight = module.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return "fastattn's Linear differs from torch's only on a CPU in float32"
    if weight.numel() < MIN_WEIGHTS:
        return f"fastattn's Linear differs from torch's from {MIN_WEIGHTS} weights on"
    if not mkl_is_slow():
        return "F.linear is as fast here: fastattn's Linear gains where MKL is slow (AMD)"
    return None


def _linear_probes(module: torch.nn.Module, draw: Draw) -> list[Probe]:
    """One row and three, as in decoding, and many."""
    assert isinstance(module, torch.nn.Linear)
    rows = ((1, 1), (3, 1), (2, 7))
    return [Probe((draw.normal(*shape, module.in_features),)) for shape in rows]


def _linear_backend(module: torch.nn.Module, probe: Probe) -> str | None:
    return "torch"  # a matrix product is a library's


# By exact class; a subclass may have another forward.
TABLE: dict[type[torch.nn.Module], Recogniser] = {
    torch.nn.Linear: Recogniser("Linear", Linear, _linear_probes, _linear_backend, _linear_refusal),
    torch.nn.LayerNorm: Recogniser("LayerNorm", LayerNorm, _norm_probes, _layer_norm_backend),
    torch.nn.RMSNorm: Recogniser("RMSNorm", RMSNorm, _norm_probes, _rms_norm_backend),
}
