"""GPT: a decoder-only transformer, GPT-2's (Radford et al. 2019) and what has become of it.

Shapes: B batch, T sequence length, C = n_embd, V = vocab_size.

    tokens (B, T)
      x = wte[tokens] + wpe[positions]                   # (B, T, C); a Llama: x = wte[tokens]
      n_layer times:
          x = x + attention(norm1(x))                    # causal; a Llama: of rotated q and k
          x = x + feed_forward(norm2(x))
      logits = norm_f(x) @ wte^T                         # (B, T, V); or an untied head
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn import generation, nn
from fastattn.models import folder, resizing
from fastattn.models.cache import KVCache, dtype_of_caches
from fastattn.models.config import ACTIVATIONS, GPTConfig
from fastattn.models.ids import check_ids
from fastattn.models.packing import check_packed, packed_lengths, packed_positions
from fastattn.models.parts import check_part
from fastattn.models.rotary import rotary_embeddings
from fastattn.nn.plain import is_plain
from fastattn.nn.stored_cache import LARGEST as STORED
from fastattn.nn.transformer_block import NORMS
from fastattn.ops.attention import zigzag
from fastattn.ops.cross_entropy import IGNORED, cross_entropy
from fastattn.ops.linear_cross_entropy import linear_cross_entropy


class GPT(folder.Pretrained):
    """A decoder-only transformer at any size: GPT-2's architecture, or another by its config.

        model = fastattn.GPT(fastattn.GPTConfig.preset("gpt2"))
        logits, loss = model(tokens[:, :-1], targets=tokens[:, 1:])

        model = fastattn.GPT.from_pretrained("gpt2")
        model.generate(tokens, max_new_tokens=50)

    New weights are GPT-2's: normal with standard deviation ``initializer_range``, those that write
    into the residual stream scaled down by sqrt(2 * n_layer), biases zero.

    Args:
        config: sizes and settings.
        device, dtype: of the parameters. On device "meta" the model has shapes and no weights.
    """

    config_class = GPTConfig

    def __init__(
        self,
        config: GPTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd, **where)
        learned = config.positions == "learned"
        self.wpe = (
            torch.nn.Embedding(config.n_positions, config.n_embd, **where) if learned else None
        )
        self.rotary = rotary_embeddings(config, device)
        self.dropout = torch.nn.Dropout(config.embd_pdrop)
        self.blocks = torch.nn.ModuleList(
            nn.TransformerBlock(
                config.n_embd,
                config.n_head,
                config.feedforward_dim,
                num_kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                dropout=config.resid_pdrop,
                attention_dropout=config.attn_pdrop,
                activation=ACTIVATIONS[config.activation_function],
                gated=config.gated,
                norm=config.norm,
                norm_eps=config.layer_norm_epsilon,
                norm_placement=config.norm_placement,
                qkv_bias=config.qkv_bias,
                out_bias=config.out_bias,
                feedforward_bias=config.mlp_bias,
                causal=True,
                softmax_scale=config.softmax_scale(layer),
                window=config.window(layer),
                softcap=config.attn_logit_softcapping,
                qk_norm=config.qk_norm,
                **where,
            )
            for layer in range(config.n_layer)
        )
        self.norm_f = NORMS[config.norm](config.n_embd, config.layer_norm_epsilon, **where)
        self.lm_head = Head(
            config.n_embd,
            config.vocab_size,
            config.head_bias,
            softcap=config.final_logit_softcapping,
            **where,
        )
        self.tie_weights()
        self.reset_parameters()

    def tie_weights(self) -> None:
        """Let the head share the token embedding's weight, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight

    def reset_parameters(self) -> None:
        """Draw new weights from torch's generator."""
        std, offset = self.config.initializer_range, self.config.norm == "offset_rms_norm"
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
            elif "norm" in name:
                torch.nn.init.constant_(parameter, 0.0 if offset else 1.0)
            elif name.endswith(("out_proj.weight", "linear2.weight")):  # into the residual stream
                torch.nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer))
            else:
                torch.nn.init.normal_(parameter, std=std)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        packed: nn.PackedSequences | None = None,
        part: nn.SequencePart | None = None,
        keep_logits: bool = True,
        logits_to_keep: int = 0,
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """Predict the token after each position.

        Args:
            input_ids: (B, T) token ids, int32 or int64. That they are below vocab_size is checked
                only on a CPU (on a GPU the check would make the host wait), and not under
                torch.func transforms, fake tensors and tracing.
            targets: (B, T) the tokens that follow, or -100 where none counts. Nothing is shifted
                here: ``targets[:, t]`` is what comes after ``input_ids[:, t]``.
            cache: keys and values of the tokens before; those of ``input_ids`` are appended. The
                result then has no gradient.
            packed: ``input_ids`` (1, N) is one row of these sequences, which together are the whole
                row. Each attends to itself, and its positions begin at 0; n_positions limits a
                sequence, not the row. Checked on a CPU only. Excludes a cache.
            part: ``input_ids`` and ``targets`` are this process's part of rows whose other parts
                the processes of ``part.group`` have, which call with theirs; ``packed`` is of the
                whole row. Logits and loss are those of the part. Excludes a cache and
                ``logits_to_keep``.
            keep_logits: False, with targets: the pair is (None, loss). The loss is the same, but
                the logits are never there as a whole (`fastattn.linear_cross_entropy`), which in
                training take more memory than anything else where the vocabulary is large.
            logits_to_keep: compute the logits only of the last so many positions; 0 means all.

        Returns:
            Logits (B, T, V) in the parameters' dtype; with ``targets`` the pair (logits, loss),
            the loss being the mean cross-entropy in float32 (NaN if no target counts). Do not
            modify the logits in place before calling backward.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(
                    input_ids,
                    targets,
                    cache=cache,
                    packed=packed,
                    part=part,
                    keep_logits=keep_logits,
                    logits_to_keep=logits_to_keep,
                )
        check_ids("input_ids", input_ids, self.config.vocab_size)
        if part is not None:
            if cache is not None or logits_to_keep:
                raise ValueError("part excludes cache and logits_to_keep: it is for training")
            check_part(part, input_ids)
        if packed is not None:
            if cache is not None:
                raise ValueError("packed and cache exclude each other: a cache has rows of its own")
            tokens = input_ids.shape[1] if part is None else part.length
            check_packed(packed, input_ids, tokens, self.config.n_positions)
        if targets is None and not keep_logits:
            raise ValueError("keep_logits=False needs targets: there would be no result")
        if targets is not None:
            if logits_to_keep:
                raise ValueError("logits_to_keep and targets exclude each other: a loss needs all")
            check_ids("targets", targets, self.config.vocab_size, ignored=IGNORED)
            if targets.shape != input_ids.shape:
                raise ValueError(
                    f"targets must have the shape of input_ids, {tuple(input_ids.shape)}, "
                    f"got {tuple(targets.shape)}"
                )
        if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, (int, torch.SymInt)):
            raise TypeError(f"logits_to_keep must be an integer, got {logits_to_keep!r}")
        if not 0 <= logits_to_keep <= input_ids.shape[1]:
            raise ValueError(
                f"logits_to_keep must be from 0 to the {input_ids.shape[1]} positions of "
                f"input_ids, got {logits_to_keep}"
            )
        hidden = self.features(input_ids, cache, packed, part)
        if targets is not None and not keep_logits and is_plain(self.lm_head, Head):
            return None, self.lm_head.loss(hidden, targets)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        if targets is None:
            return logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten().long())
        return (logits if keep_logits else None), loss

    def new_cache(
        self, batch_size: int, capacity: int, *, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache where the parameters are, in the dtype of the layers' keys and values:
        autocast's, or the weights'; or in ``dtype``, int8 or float8_e4m3fn.
        """
        if dtype is None:
            dtype = dtype_of_caches(self.wte.weight)
        elif dtype not in STORED:
            names = " or ".join(map(str, STORED))
            raise ValueError(f"dtype must be {names}, or None for the model's; got {dtype}")
        blocks: Any = self.blocks
        heads = blocks[0].attention.num_kv_heads  # of this process, where several share a layer
        return KVCache(
            self.config, batch_size, capacity, kv_heads=heads, device=self.device, dtype=dtype
        )

    def features(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        packed: nn.PackedSequences | None = None,
        part: nn.SequencePart | None = None,
    ) -> Tensor:
        """The hidden states before the head: (B, T) token ids, unchecked -> (B, T, C).

        Raises ValueError if the sequence, tokens in the cache included, passes ``n_positions``, or
        with tokens in the cache ``config.short_positions``, where the rotary frequencies change.
        """
        seqlen = input_ids.shape[1] if part is None else part.length
        before = 0 if cache is None else cache.longest
        if packed is None and before + seqlen > self.config.n_positions:
            raise ValueError(
                f"input_ids must have at most n_positions = {self.config.n_positions} tokens a "
                f"sequence, got {seqlen}{f' after {before} in the cache' if before else ''}"
            )
        short = self.config.short_positions
        if short is not None and 0 < before <= short < before + seqlen:
            raise ValueError(
                f"input_ids has {seqlen} tokens after {before} in the cache, and beyond {short} "
                "the rotary frequencies are others than those that turned the cache's keys: read "
                "the whole sequence into an empty cache"
            )
        lengths = None
        if packed is not None:
            positions = packed_positions(packed.cu_seqlens, seqlen)
            if short is not None:
                lengths = packed_lengths(packed.cu_seqlens, seqlen)
        elif cache is None:
            positions = torch.arange(seqlen, device=input_ids.device)
        else:
            positions = cache.begin(seqlen)
        if part is not None:
            rank, size = dist.get_rank(part.group), dist.get_world_size(part.group)
            places = zigzag.places(rank, size, seqlen, input_ids.device)
            if short is not None and lengths is None:
                lengths = torch.full_like(positions, seqlen)
            positions = positions[places]
            lengths = None if lengths is None else lengths[places]
        rotary = {kind: angles(positions, lengths) for kind, angles in self.rotary.items()}
        branch = self.wte(input_ids)  # (B, T, C)
        if self.config.embedding_scale != 1.0:
            branch = branch * self.config.embedding_scale
        if self.wpe is not None:
            branch = branch + self.wpe(positions)
        branch = self.dropout(branch)

        # The blocks leave the last addition to the next norm: x is branch + residual.
        residual = None
        for layer, block in enumerate(self.blocks):
            branch, residual = block(
                branch,
                residual,
                rotary=rotary.get(self.config.layer_type(layer)),
                cache=None if cache is None else cache.layers[layer],
                packed=packed,
                part=part,
            )
        hidden = self.norm_f(branch) if residual is None else self.norm_f(branch, residual)[0]
        if cache is not None:
            cache.end(seqlen)
        return hidden

    generate = generation.generate
    resize_token_embeddings = resizing.resize_token_embeddings


class Head(nn.Linear):
    """The linear layer to the logits, which it caps where ``softcap`` is not 0."""

    cross_entropy = staticmethod(linear_cross_entropy)  # of the weight as it lies

    def __init__(self, *sizes: Any, softcap: float = 0.0, **where: Any) -> None:
        super().__init__(*sizes, **where)
        self.softcap = softcap

    def forward(self, input: Tensor) -> Tensor:
        """(..., n_embd) -> (..., vocab_size)."""
        logits = super().forward(input)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def loss(self, input: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of (..., n_embd) and targets (...), without the logits."""
        return self.cross_entropy(input, self.weight, targets, self.bias, softcap=self.softcap)
