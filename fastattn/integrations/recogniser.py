"""What `accelerate` has to know of a class of modules to swap it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastattn.integrations.proof import Draw, Probe


@dataclass(frozen=True)
class Recogniser:
    """How modules of one class are brought onto fastattn.

    Attributes:
        mixin: has our `forward`. Where it is no subclass of the original class, the new class
            inherits from both, and `super().forward` in it is the original's.
        refusal: the reason why an instance cannot run on `mixin`, or None. Asked of originals and
            of swapped instances.
        probes: the calls with which the two are compared, for a copy of an instance.
        backend: the name of the fastattn backend that runs the first probe.
    """

    mixin: type
    refusal: Callable[[torch.nn.Module], str | None]
    probes: Callable[[torch.nn.Module, Draw], Sequence[Probe]]
    backend: Callable[[torch.nn.Module, Probe], str | None]
