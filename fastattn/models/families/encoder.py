"""The parts that BERT and the encoders after it share: keys, names, labels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastattn.models.encoder_config import EncoderConfig
from fastattn.models.families.family import Family, Names

# The keys of config.json -> the fields of `EncoderConfig`; max_position_embeddings is not the same
# in all.
FIELDS: dict[str, Names] = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "classifier_dropout": "classifier_pdrop",
    "problem_type": "problem_type",
}
# Of BERT and RoBERTa.
POST_NORM_FIELDS: dict[str, Names] = {
    **FIELDS,
    "hidden_act": "activation_function",
    "hidden_dropout_prob": ("embd_pdrop", "resid_pdrop"),
    "attention_probs_dropout_prob": "attn_pdrop",
    "type_vocab_size": "n_token_types",
    "layer_norm_eps": "layer_norm_epsilon",
}


def post_norm_family(
    title: str,
    name: str,
    heads: Mapping[Names, Names],
    defaults: Mapping[str, Any],
    fields: Mapping[str, Names],
    **options: Any,
) -> Family:
    """BERT or RoBERTa: a family whose classes, and layers in small letters, begin with ``name``.

    ``heads`` is where the parts of the heads are; other arguments are `Family`'s, or change it.
    """
    return Family(
        title=title,
        model_type=name.lower(),
        classes=classes(name),
        config_class=EncoderConfig,
        fields={**POST_NORM_FIELDS, **fields},
        defaults={
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "intermediate_size": 3072,
            **defaults,
        },
        fixed={
            "is_decoder": False,
            "add_cross_attention": False,
            "position_embedding_type": "absolute",
            # Untied, transformers has a second bias, of which it reads one.
            "tie_word_embeddings": True,
        },
        prefix=f"{name.lower()}.",
        depths={"encoder.layer.": "num_hidden_layers"},
        # Positions that older versions of transformers saved as a buffer.
        ignored=re.compile(r"embeddings\.position_ids"),
        names=with_heads(_post_norm_names(f"{name.lower()}."), heads),
        **options,
    )


def _post_norm_names(prefix: str) -> dict[Names, Names]:
    """Where BERT's layers are, whose names all begin with ``prefix``."""
    layer = f"{prefix}encoder.layer.*"
    return {
        "wte": f"{prefix}embeddings.word_embeddings",
        "wpe": f"{prefix}embeddings.position_embeddings",
        "wtt": f"{prefix}embeddings.token_type_embeddings",
        "norm_e": f"{prefix}embeddings.LayerNorm",
        "blocks.*.attention.in_proj": (
            f"{layer}.attention.self.query",
            f"{layer}.attention.self.key",
            f"{layer}.attention.self.value",
        ),
        "blocks.*.attention.out_proj": f"{layer}.attention.output.dense",
        "blocks.*.norm1": f"{layer}.attention.output.LayerNorm",
        "blocks.*.feed_forward.linear1": f"{layer}.intermediate.dense",
        "blocks.*.feed_forward.linear2": f"{layer}.output.dense",
        "blocks.*.norm2": f"{layer}.output.LayerNorm",
        "pooler": f"{prefix}pooler.dense",
    }


def with_heads(names: Mapping[Names, Names], heads: Mapping[Names, Names]) -> dict[Names, Names]:
    """The table of an `Encoder`, and of the models that have one and a head."""
    inside: dict[Names, Names] = {
        f"encoder.{ours}" if isinstance(ours, str) else tuple(f"encoder.{one}" for one in ours): it
        for ours, it in names.items()
    }
    return {**names, **inside, **heads}


def classes(title: str) -> dict[str, str]:
    """transformers' classes, whose names begin with ``title``, and ours."""
    return {
        f"{title}Model": "Encoder",
        f"{title}ForMaskedLM": "EncoderForMaskedLM",
        f"{title}ForSequenceClassification": "EncoderForSequenceClassification",
        f"{title}ForTokenClassification": "EncoderForTokenClassification",
        f"{title}ForQuestionAnswering": "EncoderForQuestionAnswering",
    }


def read_labels(data: Mapping[str, Any]) -> dict[str, Any]:
    """The number of labels, and their names where they are not only numbered."""
    given = data.get("id2label")
    if given is None:
        return {"n_labels": data.get("num_labels", 2)}
    if not isinstance(given, Mapping):
        raise TypeError(f'"id2label" must be an object, got {given!r}')
    names = {int(number): name for number, name in given.items()}
    if sorted(names) != list(range(len(names))):
        raise ValueError(f'"id2label" must number its labels from 0 on, got {list(given)}')
    ordered = tuple(names[number] for number in range(len(names)))
    numbered = ordered == _numbered(len(ordered))
    return {"n_labels": len(ordered), "label_names": None if numbered else ordered}


def write_more(config: EncoderConfig) -> dict[str, Any]:
    """What all encoders' config.json has in other words than ours: the reverse of `read_labels`."""
    names = config.label_names or _numbered(config.n_labels)
    return {
        "intermediate_size": config.feedforward_dim,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{number}" for number in range(count))
