"""Where a GPT's parameters are in a Hugging Face folder.

A folder holds either ``model.safetensors`` or ``model.safetensors.index.json``, which says in which
of several files each tensor is. GPT-2's own names and layout are kept there, so that transformers
reads what is written here:

    here                                        in the folder
    wte.weight, wpe.weight                      transformer.wte.weight, transformer.wpe.weight
    blocks.0.norm1.*                            transformer.h.0.ln_1.*
    blocks.0.attention.in_proj.*                 transformer.h.0.attn.c_attn.weight ^T, .bias
    blocks.0.attention.out_proj.*               transformer.h.0.attn.c_proj.* (weight ^T)
    blocks.0.norm2.*                            transformer.h.0.ln_2.*
    blocks.0.feed_forward.linear1, linear2.*    transformer.h.0.mlp.c_fc, c_proj.* (weight ^T)
    norm_f.*                                    transformer.ln_f.*
    lm_head.weight                              lm_head.weight, unless tied
"""

from __future__ import annotations

import dataclasses

from fastattn.models.config import GPTConfig

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The fields of `GPTConfig` that GPT-2's config.json has.
FIELDS = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function",
    "embd_pdrop", "attn_pdrop", "resid_pdrop", "layer_norm_epsilon", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings",
)  # fmt: skip

PREFIX = "transformer."
HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Stored:
    """How one parameter lies in a folder: its name there, its shape there, transposed or not."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False


def layout(config: GPTConfig) -> dict[str, Stored]:
    """The parameters of a `GPT`, by name, as they are stored; a tied head is not."""
    width, inner = config.n_embd, config.feedforward_dim
    stored = {
        "wte.weight": Stored("wte.weight", (config.vocab_size, width)),
        "wpe.weight": Stored("wpe.weight", (config.n_positions, width)),
    }
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"h.{layer}"
        for norm, ln in (("norm1", "ln_1"), ("norm2", "ln_2")):
            for part in ("weight", "bias"):
                stored[f"{ours}.{norm}.{part}"] = Stored(f"{theirs}.{ln}.{part}", (width,))
        for linear, conv1d, shape in (
            ("attention.in_proj.", "attn.c_attn.", (width, 3 * width)),
            ("attention.out_proj.", "attn.c_proj.", (width, width)),
            ("feed_forward.linear1.", "mlp.c_fc.", (width, inner)),
            ("feed_forward.linear2.", "mlp.c_proj.", (inner, width)),
        ):
            stored[f"{ours}.{linear}weight"] = Stored(f"{theirs}.{conv1d}weight", shape, True)
            stored[f"{ours}.{linear}bias"] = Stored(f"{theirs}.{conv1d}bias", shape[1:])
    for part in ("weight", "bias"):
        stored[f"norm_f.{part}"] = Stored(f"ln_f.{part}", (width,))
    if not config.tie_word_embeddings:
        stored[HEAD] = Stored(HEAD, (config.vocab_size, width))
    return stored
