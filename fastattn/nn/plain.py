"""Modules that are computed from their weights without being called.

A fused op takes the weights of several modules at once, so the modules themselves do not run.
That is invisible only where running them would do nothing else.
"""

from __future__ import annotations

import torch
from torch.nn.modules import module as torch_module
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

COMPUTING_WEIGHTS = (BasePruningMethod, SpectralNorm, WeightNorm)  # forward pre-hooks


def is_plain(module: torch.nn.Module, cls: type[torch.nn.Module]) -> bool:
    """Return True if calling ``module`` is ``cls.forward`` on its ordinary weights, and no more.

    A class to which `fastattn.accelerate` swapped ``cls`` computes the same, and counts as it.
    False for a subclass or a wrapper of ``cls`` (LoRA, quantised, parametrised, sharded by FSDP),
    a ``forward`` replaced on the instance, forward or backward hooks and pre-hooks (the module's
    own or PyTorch's global ones, registered for every module), and parameters of a tensor
    subclass (DTensor, torchao) or with a layout of their own (sparse). Such a module must be
    called, or what it adds would be lost. Of tensor subclasses a class that counts as ``cls`` may
    say that it reads them itself (``_fastattn_reads_dtensors``).

    >>> linear = torch.nn.Linear(2, 2)
    >>> is_plain(linear, torch.nn.Linear)
    True
    >>> handle = linear.register_forward_hook(print)
    >>> is_plain(linear, torch.nn.Linear)
    False
    """
    return (
        (type(module) is cls or vars(type(module)).get("_fastattn_original") is cls)
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or torch_module._global_backward_hooks
            or torch_module._global_backward_pre_hooks
        )
        and all(
            parameter is None
            or (
                type(parameter) in (torch.nn.Parameter, torch.Tensor)
                and parameter.layout is torch.strided
            )
            or vars(type(module)).get("_fastattn_reads_dtensors", False)
            for parameter in module._parameters.values()
        )
    )


def refresh(module: torch.nn.Module) -> None:
    """Compute the weights of ``module`` that a forward pre-hook computes, as a call of it would.

    They are those of `torch.nn.utils.prune`, ``weight_norm`` and ``spectral_norm``: attributes that
    are made of other parameters before each forward. (`torch.nn.utils.parametrize` makes them when
    they are read.)
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, COMPUTING_WEIGHTS):
            hook(module, ())
