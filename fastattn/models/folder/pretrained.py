"""The base of the models that Hugging Face folders hold."""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar, TypeVar

import torch

from fastattn.generation import GenerationConfig
from fastattn.models.folder.layout import Weights, shared_names
from fastattn.models.folder.reading import described
from fastattn.models.folder.writing import save_pretrained
from fastattn.models.sharing import SharedParameters
from fastattn.nn.int8_weight import Int8Weight
from fastattn.nn.torchao_weight import is_torchaos

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(SharedParameters):
    """A module that `fastattn.models.load` can read; it is made only of its config.

    Attributes:
        config: an instance of the class's ``config_class``, with ``tie_word_embeddings`` and
            ``resolved()``.
        family: config.json's "model_type" that the model was read as, and is written as; None for
            the first that has a place for all of its config.
        generation_config: how the folder's generation_config.json would have it generate.
    """

    config_class: ClassVar[type]
    config: Any
    family: str | None = None
    generation_config: GenerationConfig | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        kind, ours = self.config_class.__name__, type(self).__name__
        if not isinstance(config, self.config_class):
            preset = f"{kind}.preset(name), " if hasattr(self.config_class, "preset") else ""
            raise TypeError(
                f"config must be {'an' if kind[0] in 'AEIOU' else 'a'} {kind}, got "
                f"{type(config).__name__}: write {kind}(vocab_size=..., ...), {preset}or read a "
                f"model with {ours}.from_pretrained(path)"
            )
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    save_pretrained = save_pretrained

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | PathLike[str],
        *,
        revision: str | None = None,
        gguf_file: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        int8: bool = False,
    ) -> Model:
        """The model in a Hugging Face folder, in eval mode.

        Args:
            path: a folder with config.json and safetensors, or the name of a repository on the
                Hugging Face Hub ("gpt2", "user/name"), of which only those files are downloaded,
                once; or a GGUF file of a Llama.
            revision: branch, tag or commit on the Hub.
            gguf_file: the name of a GGUF file in the folder, to read instead.
            dtype: of the weights; None keeps the one that they are stored in, and is float32 for a
                GGUF file.
            device: of the weights; None is torch's default.
            int8: round the weights of linear layers to 8 bits, one after another as they are read
                (`fastattn.compression.quantize`): the model is never there in floating point. A
                folder that was saved so is read so without it.

        Raises:
            FileNotFoundError: no such folder or repository, or no config or weights in it.
            ValueError: what is there is no model of this class: a config of another family, or one
                that asks for what we do not compute; weights missing, unexpected or of another
                shape (all are listed), a damaged file (named), pickled weights (with the way to
                convert them).
            ImportError: safetensors, gguf, or for a download huggingface_hub, is not installed.
        """
        family, model, each, settings = described(
            cls, path, revision=revision, gguf_file=gguf_file, dtype=dtype, device=device, int8=int8
        )
        weights = dict(each())
        for other, first in shared_names(model):
            weights[other] = weights[first]
        model.load_state_dict(weights, assign=True)
        for parameter in model.parameters():
            if isinstance(parameter, Int8Weight) or is_torchaos(parameter):
                parameter.requires_grad_(False)
        where = next(iter(weights.values())).device
        for module in model.modules():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                reset: Any = module.reset_parameters
                reset(where)  # what is computed and not stored
        model.family = family.model_type
        model.generation_config = settings
        return model.eval()

    @classmethod
    def deferred(
        cls: type[Model], path: str | PathLike[str], *, dtype: torch.dtype | None = None
    ) -> tuple[Model, Weights]:
        """The model in a folder on the meta device, in eval mode, and its weights, each read when
        it is asked for: for processes that keep a part of each. Errors are `from_pretrained`'s.
        """
        family, model, weights, settings = described(cls, path, dtype=dtype, device="cpu")
        model.family, model.generation_config = family.model_type, settings
        return model.eval(), weights
