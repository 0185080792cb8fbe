"""fastattn in the form that Hugging Face's `kernels` loads: a folder, without a download.

    from fastattn.integrations import kernels_hub

    folder = kernels_hub.write("fastattn-kernels")
    os.environ["LOCAL_KERNELS"] = f"{kernels_hub.REPOSITORY}={folder}"

`kernels` then finds the repository `fastattn/fastattn` there. It has the layers of layers.py, and
the functions of flash-attn for `attn_implementation="fastattn/fastattn"`. The folder only names the
fastattn that is installed, so it holds for every version of it, on a CPU and on CUDA.

`fastattn.accelerate` needs none of this and swaps more: it proves what it swaps, where `kernels`
replaces what a class is registered for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REPOSITORY = "fastattn/fastattn"
VERSION = 1
BACKENDS = ("cpu", "cuda")
# By the names under which transformers and `kernels` register such classes, where there are any.
LAYERS = ("LayerNorm", "RMSNorm", "RMSNormZeroCentered", "SwiGLUMLP", "GeGLUMLP", "GPT2MLP", "MLP")

_MODULE = '''\
"""fastattn as it is installed, for Hugging Face's kernels."""

from fastattn.flash_attn import flash_attn_func, flash_attn_varlen_func
from fastattn.integrations.kernels_hub import layers

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "layers"]
'''


def write(folder: str | Path) -> Path:
    """Write the repository into `folder`, which is made if it is not there.

    Returns:
        The absolute path, for LOCAL_KERNELS or for `kernels.LocalLayerRepository`.

    Raises:
        ValueError: the path has a ":" or "=", which LOCAL_KERNELS cannot hold.
        OSError: the folder cannot be written.
    """
    path = Path(folder).absolute()
    if any(sign in str(path) for sign in ":="):
        raise ValueError(
            f'folder must have no ":" and no "=" in its path, which separate entries of '
            f"LOCAL_KERNELS; got {str(path)!r}: name another"
        )
    for backend in BACKENDS:
        variant = path / "build" / f"torch-{backend}"
        variant.mkdir(parents=True, exist_ok=True)
        metadata = {
            "id": f"fastattn_{backend}_{VERSION}",
            "name": "fastattn",
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2), encoding="utf-8")
        (variant / "__init__.py").write_text(_MODULE, encoding="utf-8")
    return path


def mapping(repository: str = REPOSITORY) -> dict[str, dict[str, Any]]:
    """All layers, on a CPU and on CUDA, for `kernels.register_kernel_mapping`.

    Args:
        repository: its name in LOCAL_KERNELS.

    Raises:
        ImportError: `kernels` is not installed.
    """
    try:
        from kernels import LayerRepository
    except ImportError as error:
        raise ImportError(
            "fastattn.integrations.kernels_hub.mapping needs Hugging Face's kernels: "
            "pip install kernels"
        ) from error
    # By a revision: a version would be looked up on the hub, whatever LOCAL_KERNELS says.
    return {
        name: {
            backend: LayerRepository(repo_id=repository, layer_name=name, revision="local")
            for backend in BACKENDS
        }
        for name in LAYERS
    }
