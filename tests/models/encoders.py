"""Small random encoders, ours and transformers', with the same weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fastattn.models

VOCAB, LENGTH, BATCH = 97, 13, 4

SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,  # far from uniform, so that no mistake drowns
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 1,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LOCAL: dict[str, Any] = {"local_attention": 6, "classifier_activation": "relu"}

# A name -> (transformers' beginning of class names, what differs from its defaults).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**NO_DROPOUT, "type_vocab_size": 3}),
    "bert-relu": ("Bert", {**NO_DROPOUT, "hidden_act": "relu", "layer_norm_eps": 0.01}),
    "roberta": ("Roberta", {**NO_DROPOUT, "type_vocab_size": 1}),
    "roberta-tanh": ("Roberta", {**NO_DROPOUT, "hidden_act": "gelu_new", "pad_token_id": 5}),
    "modernbert": ("ModernBert", LOCAL),
    "modernbert-untied": ("ModernBert", {**LOCAL, "tie_word_embeddings": False}),
    "modernbert-mean": (
        "ModernBert",
        {
            "classifier_pooling": "mean",
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "classifier_bias": True,
            "decoder_bias": False,
            "local_attention": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


def make_pair(
    folder: Path, family: str, head: str, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Any, Any]:
    """(ours, transformers'), in eval mode; ours is read from the folder that theirs has written."""
    import transformers

    title, differs = FAMILIES[family]
    config = getattr(transformers, f"{title}Config")(**{**SHARED, **differs, **changes})
    theirs = getattr(transformers, f"{title}{head}")(config)
    with torch.no_grad():  # transformers leaves biases at 0 and norms at 1
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = theirs.to(dtype).eval()
    theirs.save_pretrained(folder)
    return fastattn.models.load(folder), theirs


def padded(config: Any, side: str) -> dict[str, torch.Tensor]:
    """Inputs of unequal lengths, padded on the "right", the "left", at "both" ends, or "none"."""
    pad = config.pad_token_id
    ids = torch.randint(6, VOCAB, (BATCH, LENGTH))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    if side != "none":
        for row, gap in enumerate((0, 5, 1, LENGTH - 1)):
            left = {"right": 0, "left": gap, "both": gap // 2}[side]
            mask[row, :left] = 0
            mask[row, LENGTH - (gap - left) :] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}
    types = getattr(config, "type_vocab_size", 0)
    if types > 1:
        inputs["token_type_ids"] = torch.randint(0, types, ids.shape) * mask
    return inputs


def labels_for(head: str, config: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Random labels, some of which do not count, as those of padding."""
    if head == "ForQuestionAnswering":  # one beyond the end
        return {
            "start_positions": torch.tensor([0, 3, LENGTH + 4, 2]),
            "end_positions": torch.tensor([4, 3, 1, LENGTH - 1]),
        }
    if head == "ForSequenceClassification":
        return {"labels": torch.randint(0, config.num_labels, (BATCH,))}
    count = VOCAB if head == "ForMaskedLM" else config.num_labels
    labels = torch.randint(0, count, (BATCH, LENGTH))
    return {"labels": labels.masked_fill(torch.rand(labels.shape) * mask < 0.5, -100)}


def outputs(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Whatever a model of either kind gives, by one set of names."""
    given = model(**inputs)
    names = {
        "hidden": "last_hidden_state",
        "pooled": "pooler_output",
        "logits": "logits",
        "start_logits": "start_logits",
        "end_logits": "end_logits",
        "loss": "loss",
    }
    found = {}
    for ours, theirs in names.items():
        value = getattr(given, ours if isinstance(given, tuple) else theirs, None)
        if value is not None:
            found[ours] = value
    return found


def parameter_pairs(ours: Any, theirs: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, ours, theirs in our shape) of each gradient, by the family's table of names."""
    from fastattn.models.families import FAMILIES as KNOWN
    from fastattn.models.folder.layout import layout

    family = KNOWN[ours.family]
    mine = dict(ours.named_parameters())
    others = {family.short(name): p for name, p in theirs.named_parameters()}
    for entry in layout(ours, family):
        joined = torch.cat([others[family.short(name)].grad for name in entry.names])
        own = torch.cat([mine[name].grad for name in entry.ours])
        yield entry.ours[0], own, joined
