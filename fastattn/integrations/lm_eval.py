"""A model of this package in EleutherAI's lm-evaluation-harness, as its model "fastattn".

    import lm_eval
    import fastattn.integrations.lm_eval

    lm_eval.simple_evaluate("fastattn", "pretrained=FOLDER", tasks=["lambada_openai"])

Requests that share a context, as the answers of a multiple choice do, read it once a batch; texts
are generated with continuous batching. Texts become tokens as in the harness's own adapter of
transformers, so that both give the same scores. For a model of transformers use that one, with
`pretrained=` the accelerated model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
    from transformers import AutoTokenizer
except ImportError as error:
    raise ImportError(
        "fastattn.integrations.lm_eval needs the packages lm-eval and transformers: "
        'pip install "fastattn[lm-eval]"'
    ) from error

from fastattn import models
from fastattn.generation import Engine, Request, Sampling
from fastattn.generation.contract import batch_context
from fastattn.generation.scoring import Row, score
from fastattn.nn.checks import check_integer

NEW_TOKENS = 256  # of an answer whose task has no limit
PAGE = 16  # tokens

Pair = tuple[str, str]
Encoded = tuple[Pair, list[int], list[int]]


@register_model("fastattn")
class FastattnLM(TemplateLM):
    """The harness's model: a decoder and transformers' tokenizer.

    Args:
        pretrained: a folder that `fastattn.models.load` reads, or a `fastattn.GPT`.
        tokenizer: a folder, or a tokenizer of transformers; by default that of the model's folder.
        batch_size: requests a call. The scores do not depend on it, but for rounding.
        max_length: tokens that the model reads at most; by default all its positions.
        dtype, device: of a model that is read from a folder.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        pretrained: str | models.GPT,
        tokenizer: Any = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        super().__init__()
        model: Any = pretrained
        if isinstance(pretrained, str):
            model = models.load(pretrained, dtype=getattr(torch, dtype), device=device)
            tokenizer = pretrained if tokenizer is None else tokenizer
        if not isinstance(model, models.GPT):
            raise TypeError(
                f"pretrained must be a folder with a decoder or a fastattn.GPT, got "
                f"{type(model).__name__}"
            )
        if tokenizer is None:
            raise ValueError("tokenizer must be given with a model: a folder, or a tokenizer")
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        self.model, self.tokenizer = model, tokenizer
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size must be a number of requests, got {batch_size!r}")
        self.batch_size = check_integer("batch_size", int(batch_size), at_least=1)
        _, positions = batch_context(model.config)
        assert positions is not None  # a decoder's
        self.max_length = check_integer("max_length", max_length or positions, at_least=1)
        if self.max_length > positions:
            raise ValueError(
                f"max_length must be at most the model's {positions} positions, got {max_length}"
            )
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        end: int = self.tokenizer.eos_token_id
        return end

    @property
    def prefix_token_id(self) -> int:
        """What begins a text without a context."""
        begin: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        name: str = self.tokenizer.name_or_path
        return name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, but not a second one to begin."""
        if add_special_tokens is None:
            begins = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = not begins
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The dialogue as the tokenizer's template writes it."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding would write it."""
        rows = [self._row(context, tokens) for _, context, tokens in requests]
        answers = []
        for (pair, _, _), found in zip(requests, self._scores(rows, disable_tqdm), strict=True):
            answer = found.log_probabilities.sum().item(), bool(found.greedy.all())
            self.cache_hook.add_partial("loglikelihood", pair, answer)
            answers.append(answer)
        return answers

    def _scores(self, rows: list[Row], disable_tqdm: bool) -> Sequence[Any]:
        with tqdm(total=len(rows), desc="Scoring", disable=disable_tqdm) as bar:
            return score(self.model, rows, batch_size=self.batch_size, on_progress=bar.update)

    def _row(self, context: Sequence[int], tokens: Sequence[int]) -> Row:
        """Cut from the left to what the model reads; the last token is not read."""
        room = self.max_length + 1 - len(tokens)
        if room < 1:
            raise ValueError(
                f"a continuation has {len(tokens)} tokens, and the model reads at most max_length "
                f"= {self.max_length}"
            )
        return Row(context[-room:], tokens)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text, read in the harness's windows."""
        rows, counts = [], []
        for request in requests:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows = [Row(*make_disjoint_window(pair)) for pair in pairs]
            rows += windows
            counts.append(len(windows))
        scores = self._scores(rows, disable_tqdm)
        sums = iter([found.log_probabilities.sum().item() for found in scores])
        totals = [sum(next(sums) for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each text up to the first of its stop strings."""
        if not requests:
            return []
        asked = [(request.args[0], self._settings(request.args[1])) for request in requests]
        prompts = [
            self.tok_encode(context)[-self._room(how["max_gen_toks"]) :] for context, how in asked
        ]
        sizes = [len(ids) + how["max_gen_toks"] for ids, (_, how) in zip(prompts, asked)]
        engine = Engine(
            self.model,
            pages=self.batch_size * -(-max(sizes) // PAGE),
            page_size=PAGE,
            max_batch=self.batch_size,
        )
        with tqdm(total=len(asked), desc="Generating", disable=disable_tqdm) as bar:
            answers = [
                self._submit(engine, ids, how, bar)
                for ids, (_, how) in zip(prompts, asked, strict=True)
            ]
            engine.run()
        texts = []
        for request, answer, (_, how) in zip(requests, answers, asked, strict=True):
            text = self.tokenizer.decode(list(answer), skip_special_tokens=True)
            texts.append(postprocess_generated_text(text, how["until"], None))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _settings(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What a task says of an answer, with the end of a text among what stops it."""
        how: dict[str, Any] = {**normalize_gen_kwargs(dict(arguments), NEW_TOKENS)}
        end = self.tokenizer.decode([self.eot_token_id])
        how["until"] = handle_stop_sequences(how["until"], eos=end)
        return how

    def _room(self, new_tokens: int) -> int:
        """Tokens of a prompt."""
        if not 0 < new_tokens < self.max_length:
            raise ValueError(
                f"a task asks for {new_tokens} new tokens, and the model reads at most max_length "
                f"= {self.max_length} with the prompt: give it max_gen_toks"
            )
        return self.max_length - new_tokens

    def _submit(self, engine: Engine, ids: list[int], how: dict[str, Any], bar: Any) -> Request:
        sampling = {name: how[name] for name in how.keys() - {"until", "max_gen_toks"}}
        if not sampling["do_sample"]:
            sampling.pop("temperature", None)  # 0, which is how the harness says greedy

        # Not the engine's stop strings: one may begin in the prompt, and the harness's may not.
        def watch(_: int) -> None:
            text = self.tokenizer.decode(request.tokens)
            if any(stop in text for stop in how["until"]):
                request.cancel()

        request = engine.submit(
            ids,
            max_new_tokens=how["max_gen_toks"],
            sampling=Sampling(**sampling),
            eos_token_id=self.eot_token_id,
            on_token=watch,
            on_finish=lambda _: bar.update(),
        )
        return request
