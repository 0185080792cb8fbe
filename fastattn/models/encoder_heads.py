"""The heads of an encoder: masked tokens, classes of sequences and of tokens, spans.

Shapes: B batch, T sequence length, C = n_embd, V = vocab_size, L = n_labels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import nn
from fastattn.models import folder
from fastattn.models.config import ACTIVATIONS
from fastattn.models.encoder import Encoder, layer_norm, reset_parameters
from fastattn.models.encoder_config import EncoderConfig
from fastattn.models.ids import check_ids
from fastattn.models.padding import Padding
from fastattn.nn.feed_forward import ACTIVATIONS as FUNCTIONS
from fastattn.nn.plain import is_plain
from fastattn.ops.common import modes
from fastattn.ops.cross_entropy import IGNORED, cross_entropy
from fastattn.ops.linear_cross_entropy import linear_cross_entropy


class HeadOutput(NamedTuple):
    """Logits in the parameters' dtype, and the loss in float32, None where there are no labels."""

    logits: Tensor | None
    loss: Tensor | None


class SpanOutput(NamedTuple):
    """Logits of the first and the last token of a span (B, T), and the loss or None."""

    start_logits: Tensor
    end_logits: Tensor
    loss: Tensor | None


class Transform(torch.nn.Module):
    """What a head reads: norm(activation(dense(hidden)))."""

    def __init__(self, config: EncoderConfig, where: dict[str, Any]) -> None:
        super().__init__()
        self.dense = nn.Linear(config.n_embd, config.n_embd, config.transform_bias, **where)
        self.activation = ACTIVATIONS[config.transform_activation or config.activation_function]
        self.norm = layer_norm(config, where)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        transformed: Tensor = self.norm(FUNCTIONS[self.activation](self.dense(hidden)))
        return transformed

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class EncoderHead(folder.Pretrained):
    """An `Encoder` with something on it. Arguments are `Encoder`'s."""

    config_class = EncoderConfig

    def __init__(
        self,
        config: EncoderConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.encoder = Encoder(config, pooler=self.reads_pooled(config), **where)
        self.build(config, where)
        reset_parameters(self, config)

    def reads_pooled(self, config: EncoderConfig) -> bool:
        """Whether the head reads the pooled state."""
        return False

    def build(self, config: EncoderConfig, where: dict[str, Any]) -> None:
        """Make the layers after the encoder."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> HeadOutput:
        """The logits, and with labels their loss.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: as `Encoder.forward`'s.
            labels: as the class says.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        hidden, padding = self.encoder.encode(
            input_ids, attention_mask, token_type_ids, position_ids
        )
        return self.outputs(hidden, padding, labels)

    def outputs(self, hidden: Tensor, padding: Padding | None, labels: Tensor | None) -> HeadOutput:
        """What `forward` gives, of the states (B, T, C)."""
        raise NotImplementedError


class EncoderForMaskedLM(EncoderHead):
    """The tokens that stand at masked positions (Devlin et al. 2018).

    logits = decoder(transform(hidden)), the decoder's weight that of the token embedding: the
    outputs are (logits (B, T, V), None), with labels (None, loss), for which no logits are kept.
    Labels (B, T) are the tokens that stand there, or -100 where none counts; the loss is their mean
    cross-entropy (NaN if none counts).
    """

    def build(self, config: EncoderConfig, where: dict[str, Any]) -> None:
        self.transform = Transform(config, where)
        self.decoder = nn.Linear(config.n_embd, config.vocab_size, config.decoder_bias, **where)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the decoder share the token embedding's weight, if the config says so."""
        if self.config.tie_word_embeddings:
            self.decoder.weight = self.encoder.wte.weight

    def outputs(self, hidden: Tensor, padding: Padding | None, labels: Tensor | None) -> HeadOutput:
        if labels is not None:
            check_ids("labels", labels, self.config.vocab_size, ignored=IGNORED)
            _check_shape("labels", labels, hidden.shape[:2])
        if labels is None:
            return HeadOutput(self.decoder(self.transform(hidden)), None)
        hidden, labels = hidden.flatten(0, 1), labels.flatten().long()
        if labels.is_cpu and modes.readable(labels):  # elsewhere looking would make the host wait
            counted = (labels != IGNORED).nonzero().squeeze(1)
            if len(counted):  # without one the mean is NaN
                hidden, labels = hidden[counted], labels[counted]
        hidden = self.transform(hidden)
        # The decoder of a model that is divided among processes has a class of its own.
        if type(self.decoder) is nn.Linear and is_plain(self.decoder, nn.Linear):
            weight, bias = self.decoder.weight, self.decoder.bias
            return HeadOutput(None, linear_cross_entropy(hidden, weight, labels, bias))
        return HeadOutput(None, cross_entropy(self.decoder(hidden), labels))


class EncoderForSequenceClassification(EncoderHead):
    """Classes or values of whole sequences: classifier(pooled), (B, L), and the loss or None.

    Labels go by ``config.problem_type``: (B,) int64 or int32 classes, -100 where none counts;
    (B, L) floats from 0 to 1, one for each class (the loss is the mean binary cross-entropy); (B,
    L), or (B,) where L is 1, values (the mean squared error).
    """

    def reads_pooled(self, config: EncoderConfig) -> bool:
        return config.pooler

    def build(self, config: EncoderConfig, where: dict[str, Any]) -> None:
        self.transform = None if config.pooler else Transform(config, where)
        self.dropout = torch.nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.n_embd, config.n_labels, **where)

    def outputs(self, hidden: Tensor, padding: Padding | None, labels: Tensor | None) -> HeadOutput:
        logits = self.classifier(self.dropout(self._pooled(hidden, padding)))
        return HeadOutput(logits, None if labels is None else self._loss(logits, labels))

    def _pooled(self, hidden: Tensor, padding: Padding | None) -> Tensor:
        first = hidden[:, 0]
        if self.transform is None:
            return self.encoder.pooled(self.dropout(first) if self.config.pooler_dropout else first)
        if self.config.pooling == "cls":
            return self.transform(first)
        if padding is None:
            return self.transform(hidden.mean(1))
        visible = padding.visible.unsqueeze(-1)
        return self.transform(hidden.masked_fill(~visible, 0).sum(1) / visible.sum(1))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        count = self.config.n_labels
        kind = self.config.problem_type
        if kind is None and count > 1:
            whole = labels.dtype in (torch.int32, torch.int64)
            kind = "single_label_classification" if whole else "multi_label_classification"
        if kind == "single_label_classification":
            _check_shape("labels", labels, logits.shape[:1])
            _check_labels(labels, count)
            return cross_entropy(logits, labels.long())
        wide = logits.to(modes.at_least_float32(logits.dtype))
        if kind == "multi_label_classification":
            _check_shape("labels", labels, logits.shape)
            return F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype))
        if count == 1 and labels.dim() == 1:
            labels = labels.unsqueeze(1)
        _check_shape("labels", labels, logits.shape)
        return F.mse_loss(wide, labels.to(wide.dtype))


class EncoderForTokenClassification(EncoderHead):
    """A class for every token: tagger(hidden), (B, T, L), and the loss or None.

    Labels are (B, T) int64 or int32 classes, -100 where none counts: give it for padding. The loss
    is their mean cross-entropy (NaN if none counts).
    """

    def build(self, config: EncoderConfig, where: dict[str, Any]) -> None:
        self.transform = None if config.pooler else Transform(config, where)
        self.dropout = torch.nn.Dropout(config.classifier_dropout)
        self.tagger = nn.Linear(config.n_embd, config.n_labels, **where)

    def outputs(self, hidden: Tensor, padding: Padding | None, labels: Tensor | None) -> HeadOutput:
        hidden = hidden if self.transform is None else self.transform(hidden)
        logits = self.tagger(self.dropout(hidden))
        if labels is None:
            return HeadOutput(logits, None)
        _check_shape("labels", labels, logits.shape[:2])
        _check_labels(labels, self.config.n_labels)
        return HeadOutput(logits, cross_entropy(logits.flatten(0, 1), labels.flatten().long()))


class EncoderForQuestionAnswering(EncoderHead):
    """Where in the sequence an answer begins and ends: spans(hidden)."""

    def build(self, config: EncoderConfig, where: dict[str, Any]) -> None:
        self.transform = None if config.pooler else Transform(config, where)
        # Only what reads a transform is dropped: BERT's spans read the states as they are.
        self.dropout = torch.nn.Dropout(0.0 if config.pooler else config.classifier_dropout)
        self.spans = nn.Linear(config.n_embd, 2, **where)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> SpanOutput:
        """(start_logits (B, T), end_logits (B, T), loss or None).

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: as `Encoder.forward`'s.
            start_positions, end_positions: (B,), int64 or int32, the span's first and last
                position; beyond T it does not count, below 0 it is 0. The loss is the mean of the
                two cross-entropies.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("start_positions and end_positions go together: give both or neither")
        # Padding takes part in the softmax over positions, as in transformers.
        hidden, _ = self.encoder.encode(
            input_ids, attention_mask, token_type_ids, position_ids, skip_padding=False
        )
        hidden = hidden if self.transform is None else self.transform(hidden)
        start, end = self.spans(self.dropout(hidden)).unbind(-1)
        if start_positions is None or end_positions is None:
            return SpanOutput(start, end, None)
        losses = []
        for name, logits, places in (
            ("start_positions", start, start_positions),
            ("end_positions", end, end_positions),
        ):
            _check_shape(name, places, logits.shape[:1])
            beyond = logits.shape[1]
            places = places.long().clamp(0, beyond)
            losses.append(cross_entropy(logits, places, ignore_index=beyond))
        return SpanOutput(start, end, (losses[0] + losses[1]) / 2)


HEADS = (
    EncoderForMaskedLM,
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
    EncoderForQuestionAnswering,
)


def _check_shape(name: str, given: Tensor, shape: torch.Size) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")
    if given.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(given.shape)}")


def _check_labels(labels: Tensor, count: int) -> None:
    """Raise unless they are classes from 0 to count - 1, or ignored."""
    check_ids(
        "labels", labels.unsqueeze(0) if labels.dim() == 1 else labels, count, IGNORED, "n_labels"
    )
