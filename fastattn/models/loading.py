"""Any model in a Hugging Face folder, by what its config.json says."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fastattn.models.encoder import Encoder
from fastattn.models.encoder_decoder import EncoderDecoder
from fastattn.models.encoder_heads import HEADS
from fastattn.models.folder import reading
from fastattn.models.folder.layout import CONFIG
from fastattn.models.folder.sources import read_json
from fastattn.models.gpt import GPT

CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (GPT, Encoder, *HEADS, EncoderDecoder)}


def load(
    path: str | PathLike[str],
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    int8: bool = False,
) -> Any:
    """The model in a Hugging Face folder, of the class that config.json's "architectures" asks for.

        model = fastattn.models.load("HuggingFaceTB/SmolLM2-135M")     # a GPT

    Arguments and errors are those of `GPT.from_pretrained`; ValueError also for an architecture
    that has no class here.
    """
    if (file := reading.gguf_path(path, gguf_file, revision)) is not None:
        return GPT.from_pretrained(file, dtype=dtype, device=device, int8=int8)
    folder = reading.local_folder(path, revision)
    return class_in(folder).from_pretrained(folder, dtype=dtype, device=device, int8=int8)


def class_in(folder: Path) -> Any:
    """The class of the model in a folder. Errors are those of `load`."""
    family, _ = reading.read_config(folder / CONFIG)
    asked = read_json(folder / CONFIG).get("architectures") or list(family.classes)[:1]
    name = asked[0] if isinstance(asked, list) else asked
    if not isinstance(name, str) or name not in family.classes:
        raise ValueError(
            f'{folder / CONFIG}: "architectures" must be one of '
            f"{', '.join(map(repr, family.classes))}, got {name!r}. Other models can be read by "
            "transformers and sped up by fastattn.accelerate"
        )
    return CLASSES[family.classes[name]]
