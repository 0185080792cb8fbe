"""Reading and writing a model as a Hugging Face folder: config.json and safetensors."""

from __future__ import annotations

from fastattn.models.folder.pretrained import Pretrained
from fastattn.models.folder.reading import read_config

__all__ = ["Pretrained", "read_config"]
