"""EncoderDecoder: the Transformer of 2017, T5, BART and Marian.

Shapes: B batch, S source length, T target length, C = d_model, V = vocab_size.

    source tokens (B, S)                        target tokens so far (B, T)
      x = embedding[tokens] + positions           y = embedding[tokens] + positions
      encoder_layers times:                       decoder_layers times:
          x = x + attention(x)                        y = y + attention(y)            # causal
          x = x + feed_forward(x)                     y = y + cross_attention(y, x)   # of all of x
                                                      y = y + feed_forward(y)
    encoded (B, S, C)                           logits = y @ embedding^T  (B, T, V)

with a norm before each branch (T5) or after each addition. T5 has no positions there, but adds a
learnt bias to the scores of its self-attentions, by distance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import generation, nn
from fastattn.models import folder, resizing
from fastattn.models.cache import EncoderDecoderCache, dtype_of_caches
from fastattn.models.config import ACTIVATIONS
from fastattn.models.encoder_decoder_config import EncoderDecoderConfig
from fastattn.models.ids import check_ids, padding_mask
from fastattn.nn.plain import is_plain
from fastattn.nn.transformer_block import NORMS
from fastattn.ops.cross_entropy import IGNORED, cross_entropy
from fastattn.ops.linear_cross_entropy import linear_cross_entropy


class EncoderDecoder(folder.Pretrained):
    """A transformer that reads one sequence and writes another: translation, summaries, T5's tasks.

        model = EncoderDecoder(EncoderDecoderConfig.preset("transformer-base"))
        logits, loss = model(source, targets=target)

        model = EncoderDecoder.from_pretrained("t5-small")
        model.generate(source, max_new_tokens=50, num_beams=4)

    Args:
        config: sizes and settings.
        device, dtype: of the parameters. On device "meta" the model has shapes and no weights.
    """

    config_class = EncoderDecoderConfig

    def __init__(
        self,
        config: EncoderDecoderConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        padding = config.pad_token_id if config.frozen_padding else None
        self.embedding = torch.nn.Embedding(config.vocab_size, config.d_model, padding, **where)
        self.encoder = Stack(config, decoder=False, **where)
        self.decoder = Stack(config, decoder=True, **where)
        self.lm_head = Head(config, **where)
        self.tie_weights()
        self.reset_parameters()

    def tie_weights(self) -> None:
        """Let the head share the token embedding's weight, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights from torch's generator.

        With ``initializer_range`` None a layer's output has about the variance of its input: a
        weight's standard deviation is 1 / sqrt(its columns), as T5's, and queries make up for
        scores that are not scaled by 1 / sqrt(size of a head).
        """
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif std is not None:
                parameter.normal_(std=std)
            elif name == "embedding.weight":
                parameter.normal_(std=1 / self.config.embedding_scale)
            elif name.endswith("relative_bias.weight"):
                parameter.normal_(std=self.config.d_model**-0.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        if std is None:
            for module in self.modules():
                if isinstance(module, nn.Attention) and module.softmax_scale is not None:
                    queries = module.q_proj if module.cross else module.in_proj
                    rows = module.num_heads * module.head_dim
                    queries.weight[:rows] *= module.head_dim**-0.5 / module.softmax_scale
        if self.embedding.padding_idx is not None:
            self.embedding.weight[self.embedding.padding_idx].zero_()

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        keep_logits: bool = True,
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """Predict the token after each position of ``decoder_input_ids``.

        Args:
            input_ids: (B, S) the source's token ids, checked as `GPT.forward` does.
            decoder_input_ids: (B, T) the target's token ids so far; None: `shift_right` of targets.
            targets: (B, T) the tokens that follow, or -100 where none counts: ``targets[:, t]`` is
                what comes after ``decoder_input_ids[:, t]``.
            attention_mask, decoder_attention_mask: (B, S) and (B, T), True or not 0 for tokens,
                False or 0 for padding, which may be anywhere; None: all are tokens. Padding counts
                as a position.
            keep_logits: False, with targets: the pair is (None, loss), as `GPT.forward` has it.

        Returns:
            Logits (B, T, V) in the parameters' dtype; with ``targets`` the pair (logits, loss),
            the loss being the mean cross-entropy in float32 (NaN if no target counts).

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        vocab_size = self.config.vocab_size
        check_ids("input_ids", input_ids, vocab_size)
        if targets is None and not keep_logits:
            raise ValueError("keep_logits=False needs targets: there would be no result")
        if targets is not None:
            check_ids("targets", targets, vocab_size, ignored=IGNORED)
            if decoder_input_ids is None:
                decoder_input_ids = self.shift_right(targets)
            elif targets.shape != decoder_input_ids.shape:
                raise ValueError(
                    "targets must have the shape of decoder_input_ids, "
                    f"{tuple(decoder_input_ids.shape)}, got {tuple(targets.shape)}"
                )
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids must be given where there are no targets")
        check_ids("decoder_input_ids", decoder_input_ids, vocab_size)
        if len(decoder_input_ids) != len(input_ids):
            raise ValueError(
                "input_ids and decoder_input_ids must have the same batch size, got "
                f"{len(input_ids)} and {len(decoder_input_ids)}"
            )
        hidden = self.features(
            decoder_input_ids,
            encoded=self.encode(input_ids, attention_mask),
            attention_mask=attention_mask,
            decoder_attention_mask=decoder_attention_mask,
        )
        if targets is not None and not keep_logits and is_plain(self.lm_head, Head):
            return None, self.lm_head.loss(hidden, targets)
        logits = self.lm_head(hidden)
        if targets is None:
            return logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten().long())
        return (logits if keep_logits else None), loss

    def shift_right(self, targets: Tensor) -> Tensor:
        """The decoder's input for ``targets`` (B, T): one position later, after the start token.

        -100 becomes padding. ValueError if the config lacks one of these tokens.
        """
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                "the config must have decoder_start_token_id and pad_token_id to make "
                f"decoder_input_ids of targets, got {start} and {pad}"
            )
        shifted = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=start)
        return shifted.masked_fill(shifted == IGNORED, pad)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, S) token ids, unchecked, and their padding mask -> (B, S, C)."""
        mask = padding_mask("attention_mask", attention_mask, input_ids)
        hidden: Tensor = self.encoder(self._embedded(input_ids), mask=mask)
        return hidden

    def features(
        self,
        decoder_input_ids: Tensor,
        cache: EncoderDecoderCache | None = None,
        *,
        encoded: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The hidden states before the head: (B, T) token ids, unchecked -> (B, T, C).

        Args:
            cache: of `new_cache`: keys and values of the tokens before, and of the source. The
                result then has no gradient.
            encoded, attention_mask: without a cache: what `encode` gave, and its mask.
            decoder_attention_mask: without a cache, as `forward`'s.
        """
        if (cache is None) == (encoded is None):
            raise ValueError("either cache or encoded must be given, and not both")
        embedded = self._embedded(decoder_input_ids)
        if cache is None:
            hidden: Tensor = self.decoder(
                embedded,
                mask=padding_mask(
                    "decoder_attention_mask", decoder_attention_mask, decoder_input_ids
                ),
                context=encoded,
                context_mask=padding_mask("attention_mask", attention_mask, encoded),
            )
            return hidden
        if attention_mask is not None or decoder_attention_mask is not None:
            raise ValueError("a cache has its own lengths: the masks must be None")
        with torch.no_grad():
            hidden = self.decoder(embedded, cache=cache)
        return hidden

    def new_cache(
        self,
        batch_size: int,
        capacity: int,
        *,
        encoded: Tensor,
        encoded_lengths: Tensor | None = None,
    ) -> EncoderDecoderCache:
        """An empty cache for the decoder, with the keys and values of a source.

        Args:
            batch_size: B.
            capacity: how many tokens of the target each sequence has room for.
            encoded: (B, S, C), what `encode` gave.
            encoded_lengths: (B,) how many positions of each are no padding, which must come after
                them; None: all.
        """
        if encoded.dim() != 3 or encoded.shape[::2] != (batch_size, self.config.d_model):
            raise ValueError(
                f"encoded must have the shape (batch_size, seqlen, d_model) = ({batch_size}, "
                f"seqlen, {self.config.d_model}), got {tuple(encoded.shape)}"
            )
        if encoded_lengths is None:
            encoded_lengths = torch.full((batch_size,), encoded.shape[1], device=encoded.device)
        if encoded_lengths.shape != (batch_size,):
            raise ValueError(
                f"encoded_lengths must have the shape (batch_size,) = ({batch_size},), got "
                f"{tuple(encoded_lengths.shape)}"
            )
        dtype = dtype_of_caches(self.embedding.weight)
        blocks: Any = self.decoder.blocks
        heads = blocks[0].attention.num_kv_heads  # of this process, where several share a layer
        cache = EncoderDecoderCache(
            self.config, batch_size, capacity, kv_heads=heads, device=self.device, dtype=dtype
        )
        with torch.no_grad():
            cache.contexts = [
                nn.KeyValueCache(keys, values, encoded_lengths)
                for keys, values in self.decoder.keys_and_values(encoded)
            ]
        return cache

    def _embedded(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(ids)
        scale = self.config.embedding_scale
        return embedded if scale == 1.0 else embedded * scale

    generate = generation.generate
    resize_token_embeddings = resizing.resize_token_embeddings


class Stack(torch.nn.Module):
    """The encoder, or the decoder: positions, blocks, and the norm at the end."""

    def __init__(self, config: EncoderDecoderConfig, *, decoder: bool, **where: Any) -> None:
        super().__init__()
        self.config = config
        side = "decoder" if decoder else "encoder"
        heads: int = getattr(config, f"{side}_attention_heads")
        self.positions = self.embedding_norm = self.relative_bias = self.norm_f = None
        if config.positions == "learned":
            rows = config.position_offset + (config.n_positions or 0)
            self.positions = torch.nn.Embedding(rows, config.d_model, **where)
        if config.positions == "relative":
            self.relative_bias = nn.RelativePositionBias(
                heads,
                config.relative_buckets,
                config.relative_max_distance,
                bidirectional=not decoder,
                **where,
            )

        def make_norm() -> torch.nn.Module:
            if config.norm == "layer_norm":
                epsilon, bias = config.layer_norm_epsilon, config.bias
                return nn.LayerNorm(config.d_model, epsilon, bias=bias, **where)
            return NORMS[config.norm](config.d_model, config.layer_norm_epsilon, **where)

        if config.embedding_norm:
            self.embedding_norm = make_norm()
        self.dropout = torch.nn.Dropout(config.dropout)
        self.blocks = torch.nn.ModuleList(
            nn.TransformerBlock(
                config.d_model,
                heads,
                getattr(config, f"{side}_ffn_dim"),
                head_dim=config.head_size,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                activation_dropout=config.activation_dropout,
                activation=ACTIVATIONS[config.activation_function],
                gated=config.gated,
                norm=config.norm,
                norm_eps=config.layer_norm_epsilon,
                norm_placement=config.norm_placement,
                bias=config.bias,
                causal=decoder,
                cross_attention=decoder,
                softmax_scale=config.attention_scale,
                **where,
            )
            for _ in range(getattr(config, f"{side}_layers"))
        )
        if config.norm_placement == "pre":
            self.norm_f = make_norm()

    def forward(
        self,
        embedded: Tensor,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """(B, T, C) the embedded tokens -> (B, T, C).

        ``mask`` and ``context_mask`` are `fastattn.attention`'s of the keys, (B, 1, 1, T or S).
        """
        seqlen = embedded.shape[1]
        before = 0 if cache is None else cache.longest
        self._check_length(seqlen, before)
        if cache is None:
            positions = torch.arange(seqlen, device=embedded.device)
        else:
            positions = cache.begin(seqlen)
        bias = None
        if self.relative_bias is not None and cache is None:
            bias = self.relative_bias(seqlen, seqlen)
        elif self.relative_bias is not None and cache is not None:
            # A graph's replay on a GPU does not know how many keys there are.
            slots = before + seqlen if embedded.is_cpu else cache.capacity
            bias = self.relative_bias(seqlen, slots, positions[:, 0])
        branch = embedded + self._placed(positions, embedded) if bias is None else embedded
        if self.embedding_norm is not None:
            branch = self.embedding_norm(branch)
        branch = self.dropout(branch)

        # The blocks leave the last addition to the next norm: x is branch + residual.
        residual = None
        for layer, block in enumerate(self.blocks):
            branch, residual = block(
                branch,
                residual,
                bias=bias,
                mask=mask,
                cache=None if cache is None else cache.layers[layer],
                context=context if cache is None else cache.contexts[layer],
                context_mask=context_mask,
            )
        if self.norm_f is not None:
            branch = self.dropout(self.norm_f(branch, residual)[0])
        if cache is not None:
            cache.end(seqlen)
        return branch

    def keys_and_values(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Those of each layer's cross-attention, of a context (B, S, C)."""
        blocks: Any = self.blocks
        return [block.cross_attention.keys_and_values(context) for block in blocks]

    def _placed(self, positions: Tensor, embedded: Tensor) -> Tensor:
        """The embeddings of positions, (T, C) or (B, T, C)."""
        if self.positions is not None:
            learned: Tensor = self.positions(positions + self.config.position_offset)
            return learned
        return sinusoids(positions, self.config.d_model).to(embedded.dtype)

    def _check_length(self, seqlen: int, before: int) -> None:
        limit = self.config.n_positions
        if limit is not None and before + seqlen > limit:
            raise ValueError(
                f"a sequence must have at most n_positions = {limit} tokens, got {seqlen}"
                f"{f' after {before} in the cache' if before else ''}"
            )


class Head(nn.Linear):
    """The linear layer to the logits, whose input is scaled and whose bias is not trained."""

    cross_entropy = staticmethod(linear_cross_entropy)  # of the weight as it lies

    def __init__(self, config: EncoderDecoderConfig, **where: Any) -> None:
        super().__init__(config.d_model, config.vocab_size, bias=False, **where)
        self.scale = config.logits_scale
        self.logits_bias = None
        if config.logits_bias:
            zeros = torch.zeros(1, config.vocab_size, **where)  # the shape is BART's
            self.logits_bias = torch.nn.Parameter(zeros, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_model) -> (..., vocab_size)."""
        logits = super().forward(input if self.scale == 1.0 else input * self.scale)
        return logits if self.logits_bias is None else logits + self.logits_bias

    def loss(self, input: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of (..., d_model) and targets (...), without the logits."""
        input = input if self.scale == 1.0 else input * self.scale
        bias = None if self.logits_bias is None else self.logits_bias.squeeze(0)
        return self.cross_entropy(input, self.weight, targets, bias)


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """Sines and cosines of positions (...) -> (..., size), float64.

    Of Vaswani et al. 2017, section 3.5, in the order that Marian has: all the sines, then the
    cosines of the same frequencies.
    """
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float64) / size
    angles = positions.unsqueeze(-1) * 10000**-exponents
    return torch.cat([angles.sin(), angles.cos()], -1)
