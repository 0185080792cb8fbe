"""Reading and writing a GPT as a Hugging Face folder: config.json and safetensors."""

from __future__ import annotations

from fastattn.models.folder.reading import read, read_config
from fastattn.models.folder.writing import save_pretrained

__all__ = ["read", "read_config", "save_pretrained"]
