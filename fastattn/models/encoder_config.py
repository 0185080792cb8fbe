"""The configuration of an encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastattn.models.checked import Checked
from fastattn.models.config import ACTIVATIONS

POSITIONS = ("learned", "counted", "rotary")
PLACEMENTS = ("post", "pre")
POOLINGS = ("cls", "mean")
PROBLEM_TYPES = (
    None, "regression", "single_label_classification", "multi_label_classification",
)  # fmt: skip

SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_labels")
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
POSITIVE = ("layer_norm_epsilon", "initializer_range", "rope_theta", "rope_local_theta")


@dataclass(frozen=True)
class EncoderConfig(Checked):
    """Size and settings of an `Encoder` and its heads; `GPTConfig`'s names where it has the field.

    The defaults are BERT base's (Devlin et al. 2018, arXiv:1810.04805), but for dropout, which is 0
    here and 0.1 there. RoBERTa has ``positions="counted"``. A ModernBERT (Warner et al. 2024,
    arXiv:2412.13663) has ``norm_placement="pre"``, ``positions="rotary"``, ``gated=True``,
    ``local_attention``, ``layer_types``, no token types, no biases and no pooler.

    Attributes:
        vocab_size: number of token ids.
        n_positions: longest sequence.
        n_embd: size of the residual stream.
        n_layer: number of blocks.
        n_head: number of attention heads; must divide n_embd.
        n_inner: size of the feed-forward's hidden layer; None is 4 * n_embd.
        n_token_types: number of token types (first and second sentence); 0: there are none.
        activation_function: "gelu" (by erf), "gelu_new" (or "gelu_pytorch_tanh", the same), "relu",
            "silu" (or "swish").
        gated: whether the feed-forward has a gate (GeGLU).
        positions: "learned"; "counted", learned and numbered from pad_token_id + 1 on, the tokens
            that are pad_token_id uncounted (RoBERTa); or "rotary".
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are scaled (`fastattn.nn.RotaryEmbedding`); a mapping, kept as a
            tuple of pairs.
        rope_local_theta: base for the layers with "sliding_attention", which then are not scaled;
            None: as the others.
        local_attention: width of the window of "sliding_attention": a query sees half of it to
            either side.
        layer_types: "full_attention" or "sliding_attention" a layer; None: full in all.
        norm_placement: "post", after each addition, or "pre", before each branch and at the end;
            the first attention then reads the normalised embedding as it is (ModernBERT).
        layer_norm_epsilon: eps of all norms.
        attention_bias, mlp_bias, norm_bias: whether these layers have a bias.
        embd_pdrop, attn_pdrop, resid_pdrop: dropout of embeddings, attention weights and the
            branches' outputs.
        classifier_pdrop: dropout of what a classifier reads; None is resid_pdrop.
        pooler: whether there is a dense layer with tanh on the first position's state, which
            classification reads. Without one, all heads read a transform: a dense layer, activation
            and norm, as that of masked language modelling.
        pooler_dropout: whether what classification's pooler reads is dropped too (RoBERTa).
        transform_activation, transform_bias: of the transform; None is activation_function.
        pooling: what classification without a pooler reads: the state of the first position, "cls",
            or of all that the mask leaves, "mean".
        decoder_bias: whether the logits of masked language modelling have a bias.
        tie_word_embeddings: whether they are made by the token embedding's weight.
        initializer_range: standard deviation of new weights.
        bos_token_id, eos_token_id, pad_token_id: special tokens or None; eos may be several. The
            embedding of pad_token_id gets no gradient as an input.
        n_labels: number of classes, or of regression's values.
        label_names: their names, or None.
        problem_type: "regression", "single_label_classification" or "multi_label_classification";
            None: by n_labels and the dtype of the labels, as transformers does.

    Raises:
        TypeError: a field has another type.
        ValueError: a field's value makes no model; the message names it.
    """

    vocab_size: int = 30522
    n_positions: int = 512
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    n_token_types: int = 2
    activation_function: str = "gelu"
    gated: bool = False
    positions: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | tuple[tuple[str, Any], ...] | None = None
    rope_local_theta: float | None = None
    local_attention: int | None = None
    layer_types: tuple[str, ...] | None = None
    norm_placement: str = "post"
    layer_norm_epsilon: float = 1e-12
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    classifier_pdrop: float | None = None
    pooler: bool = True
    pooler_dropout: bool = False
    transform_activation: str | None = None
    transform_bias: bool = True
    pooling: str = "cls"
    decoder_bias: bool = True
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = 0
    n_labels: int = 2
    label_names: tuple[str, ...] | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        self._settle_integers(SIZES, 1)
        self._settle_integers(("n_inner", "local_attention"), 1, optional=True)
        self._settle_integers(("n_token_types",), 0)
        last = ("classifier_pdrop",) if self.classifier_pdrop is not None else ()
        self._settle_probabilities((*DROPOUTS, *last))
        self._settle_positive(POSITIVE, optional=("rope_local_theta",))
        self._check_flags()
        self._check_choices(
            activation_function=ACTIVATIONS, transform_activation=(None, *ACTIVATIONS),
            positions=POSITIONS, norm_placement=PLACEMENTS, pooling=POOLINGS,
            problem_type=PROBLEM_TYPES,
        )  # fmt: skip
        self._check_divides("n_head", "n_embd")
        self._check_tokens()
        self._check_rotary()
        self._settle_layer_types(self.n_layer, "local_attention")
        if self.label_names is not None:
            self._settle("label_names", tuple(self.label_names))
            if len(self.label_names) != self.n_labels:
                raise ValueError(
                    f"label_names must be n_labels = {self.n_labels} names, "
                    f"got {len(self.label_names)}"
                )

    def _check_tokens(self) -> None:
        self._settle_integers(("bos_token_id", "pad_token_id"), optional=True)
        self._settle_ends()
        pad = self.pad_token_id
        if pad is None and self.positions == "counted":
            raise ValueError(
                'positions="counted" needs a pad_token_id, from which they are counted'
            )
        if pad is not None and not 0 <= pad < self.vocab_size:
            raise ValueError(
                f"pad_token_id must be None or from 0 to vocab_size - 1 = {self.vocab_size - 1}, "
                f"got {pad}"
            )

    def _check_rotary(self) -> None:
        self._settle_scaling()
        if dict(self.rope_scaling or ()).get("rope_type") == "longrope":
            raise ValueError('rope_scaling of an encoder must not be "longrope": only GPT has it')
        if self.positions == "rotary" and self.rotary_dim % 2:
            raise ValueError(
                f"n_embd / n_head must be even for rotary positions, got {self.rotary_dim}"
            )

    def resolved(self) -> EncoderConfig:
        """The same model's config with each default and each name of several said in one way."""
        types = tuple(self.layer_type(layer) for layer in range(self.n_layer))
        rotary, slides = self.positions == "rotary", "sliding_attention" in types
        local = self.rope_local_theta if rotary and slides else None
        if (local, None) == (self.rope_theta, self.rope_scaling):
            local = None
        tanh = {"gelu_tanh": "gelu_new"}
        activation = ACTIVATIONS[self.activation_function]
        transform = ACTIVATIONS[self.transform_activation or self.activation_function]
        scaling = self.rope_scaling if rotary else None
        return dataclasses.replace(
            self,
            n_inner=self.feedforward_dim,
            activation_function=tanh.get(activation, activation),
            transform_activation=tanh.get(transform, transform),
            rope_theta=self.rope_theta if rotary else 10000.0,
            rope_scaling=None if scaling is None else tuple(sorted(dict(scaling).items())),
            rope_local_theta=local,
            local_attention=self.local_attention if slides else None,
            layer_types=types,
            classifier_pdrop=self.classifier_dropout,
        )

    @property
    def feedforward_dim(self) -> int:
        """Size of the feed-forward's hidden layer."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head turn: all."""
        return self.n_embd // self.n_head

    @property
    def classifier_dropout(self) -> float:
        """Dropout of what a classifier reads."""
        return self.resid_pdrop if self.classifier_pdrop is None else self.classifier_pdrop

    @property
    def first_position(self) -> int:
        """The row of the first token in the table of learned positions."""
        return self.pad_token_id + 1 if self.positions == "counted" else 0  # type: ignore[operator]

    def layer_type(self, layer: int) -> str:
        """ "full_attention" or "sliding_attention"."""
        return "full_attention" if self.layer_types is None else self.layer_types[layer]

    def window(self, layer: int) -> tuple[int, int] | None:
        """The keys that a query of ``layer`` sees to either side, None for all."""
        if self.layer_type(layer) == "full_attention" or self.local_attention is None:
            return None
        return self.local_attention // 2, self.local_attention // 2
