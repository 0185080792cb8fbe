"""Continuous batching: requests join and leave at any step, and share memory in pages.

Shapes: B rows of one call of the model, T new tokens of each, V vocabulary.

A step of the engine reads, for each running request, what the model has not read yet: of a prompt a
chunk, of a sequence being continued its last token. All of the latter are one call, (B, 1), and so
are chunks of about one length. Who has been read to the end gets its next token (Yu et al. 2022,
Orca; the chunks: Agrawal et al. 2023, arXiv:2308.16369).
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastattn.generation import graphs, processors, sampling
from fastattn.generation.contract import LanguageModel, batch_context, is_encoder_decoder
from fastattn.generation.decoding import decode, no_token
from fastattn.generation.paging import PagedMemory
from fastattn.generation.prompts import read_prompts, right_padded, special_tokens
from fastattn.generation.request import Request
from fastattn.generation.sampling import Sampling
from fastattn.generation.scheduling import Rows, Scheduler
from fastattn.generation.stopping import StopStrings
from fastattn.nn.checks import check_integer
from fastattn.nn.mode import in_mode
from fastattn.nn.stored_cache import FIRST, cache_options

GREEDY = Sampling()


class Engine:
    """Continues any number of prompts at once, each as `generate` would continue it on its own.

        engine = fastattn.generation.Engine(model, pages=256)
        first = engine.submit(prompt, max_new_tokens=50)
        other = engine.submit(prompts[1], max_new_tokens=9, sampling=Sampling(True, top_p=0.9))
        engine.run()                        # or: for token in first: ...
        first.tokens, first.finish_reason

    A request's tokens are those of `generate` with its prompt alone, whatever else runs: as far as
    the model's arithmetic is the same in a larger batch. A matrix product rounds by its shape, so
    two tokens whose logits differ by less than that may change places.

    Requests are admitted in order while their prompts' pages are there. Where a sequence needs a
    page and none is left, the youngest request gives up its own, waits, and is read again later.
    Full pages of equal beginnings are held once, also for later requests while nobody needs the
    memory: the model's weights must not change meanwhile.

    `submit` and `cancel` may be called from any thread, `step` and iteration too: they take turns.
    On a CUDA GPU the steps that only continue sequences replay CUDA graphs, one for each power of
    two of sequences (`fastattn.generation.graphs`).

    Args:
        model: a decoder of this package, or what answers `new_cache`, `features` and `lm_head`.
        pages: how many pages of keys and values there are, for all sequences together.
        page_size: tokens in a page.
        max_batch: requests that run at once.
        prefill_chunk: prompt tokens read in a step, of all requests together: more of them start
            sooner, fewer let the running ones wait less.
        tokenizer: for ``stop_strings``, as `generate`'s.
        cache_dtype: of the pages, as `generate`'s.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        pages: int,
        page_size: int = 16,
        max_batch: int = 64,
        prefill_chunk: int = 512,
        tokenizer: Any = None,
        cache_dtype: str | None = None,
    ) -> None:
        if is_encoder_decoder(model) or not hasattr(model, "new_cache"):
            raise TypeError(f"Engine serves decoders, and {type(model).__name__} is not one")
        sizes = {"pages": pages, "page_size": page_size, "max_batch": max_batch}
        for name, size in {**sizes, "prefill_chunk": prefill_chunk}.items():
            check_integer(name, size, at_least=1)
        self.model = model
        self.tokenizer = tokenizer
        self.pages, self.page_size = pages, page_size
        # The padding of a chunk may reach further than the pages.
        self._limit, self._context = batch_context(model.config)
        stored = cache_options(cache_dtype)
        self._first = FIRST if stored else 0
        chunk = max(prefill_chunk, self._first)
        longest = min(self._context or sys.maxsize, pages * page_size + chunk)
        width = -(-longest // page_size)
        self._scheduler = Scheduler(pages, page_size, max_batch, prefill_chunk, width)
        with torch.inference_mode():
            self._memory = PagedMemory(model, pages, page_size, width, **stored)
        self._arrivals: deque[Request] = deque()  # from any thread
        self._decoders: dict[int, graphs.GraphDecoder] = {}
        self._lock = threading.RLock()
        self._stepping = False

    @property
    def free_pages(self) -> int:
        """How many no request holds."""
        return self._scheduler.pool.available

    @property
    def preempted(self) -> int:
        """How often a request gave up its pages to an older one."""
        return self._scheduler.preempted

    @property
    def reused(self) -> int:
        """Tokens that were not read, since their keys and values were there."""
        return self._scheduler.reused

    @property
    def longest(self) -> int:
        """The most tokens that a prompt and its new ones may be."""
        # The last new one is never read, and has no place in a page.
        return min(self._context or sys.maxsize, self.pages * self.page_size + 1)

    def submit(
        self,
        prompt_ids: Sequence[int] | Tensor,
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        on_token: Callable[[int], None] | None = None,
        on_finish: Callable[[Request], None] | None = None,
    ) -> Request:
        """Queue a prompt; nothing is computed before `step`.

        Args:
            prompt_ids: token ids, a list or a tensor (T,).
            max_new_tokens: how many to add at most.
            sampling: how the next token follows from the logits.
            seed: an integer, for a ``sampling`` that draws; None takes one from torch's generator.
            eos_token_id, stop_strings: what ends the sequence, as in `generate`.
            on_token: called with each new token, by the thread that steps. If it raises, that ends
                the request with "error".
            on_finish: called with the request, once, when it has ended.

        Raises:
            TypeError, ValueError: an argument does not fit, or prompt and new tokens together
                exceed the model's ``n_positions`` or all pages. Other requests are unharmed.
        """
        config = self.model.config
        ids = prompt_ids.tolist() if isinstance(prompt_ids, Tensor) else prompt_ids
        (prompt,) = read_prompts(config, [ids], None)
        check_integer("max_new_tokens", max_new_tokens, at_least=1)
        self._check_fits(len(prompt), max_new_tokens)
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling must be a Sampling, got {type(sampling).__name__}")
        sampling.check_vocabulary(config.vocab_size)
        chosen = getattr(self.model, "generation_config", None)
        ends, _ = special_tokens(config, eos_token_id, None, chosen)
        request = Request(
            self,
            prompt,
            max_new_tokens,
            sampling,
            self._numbers(sampling, seed, max_new_tokens),
            ends,
            StopStrings.of(stop_strings, self.tokenizer),
            on_token,
            on_finish,
            self._first,
        )
        self._arrivals.append(request)
        return request

    def run(self) -> None:
        """Step until every request has ended."""
        while self.step():
            pass

    def step(self) -> bool:
        """Read the pending tokens of the running requests once; whether any request is left.

        Raises what the model raises (out of memory, say): `fail` then ends the requests.
        """
        with self._lock:
            if self._stepping:
                raise RuntimeError("step was called from on_token or on_finish, within a step")
            self._stepping = True
            try:
                self._step()
            finally:
                self._stepping = False
            return bool(self._requests())

    def _step(self) -> None:
        for request in self._requests():
            if request.cancelled:
                self._end(request, "cancelled")
        rows = self._scheduler.plan()
        module = cast(torch.nn.Module, self.model)
        with torch.inference_mode(), in_mode(module, training=False):
            for group in self._grouped(rows):
                self._read(group)

    def fail(self, error: BaseException) -> None:
        """End all requests with "error"."""
        with self._lock:
            for request in self._requests():
                self._end(request, "error", error)

    def _check_fits(self, prompt: int, new: int) -> None:
        if self._context is not None and prompt + new > self._context:
            raise ValueError(
                f"prompt_ids has {prompt} tokens; with max_new_tokens = {new} that is "
                f"{prompt + new}, more than the model's {self._limit} = {self._context}"
            )
        if prompt + new > self.longest:
            raise ValueError(
                f"prompt_ids has {prompt} tokens; with max_new_tokens = {new} they need "
                f"{self._scheduler.pages_of(prompt + new - 1)} pages of {self.page_size} tokens, "
                f"and the engine has {self.pages}: give it more pages, or ask for less"
            )

    def _numbers(self, how: Sampling, seed: int | None, steps: int) -> Tensor | None:
        if not how.do_sample:
            if seed is not None:
                raise ValueError("seed would have no effect: give a sampling with do_sample=True")
            return None
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        return sampling.uniforms([seed], 1, steps, self.model.device)[:, 0]

    def _requests(self) -> list[Request]:
        """All that have not ended."""
        scheduler = self._scheduler
        while self._arrivals:
            scheduler.waiting.append(self._arrivals.popleft())
        return [*scheduler.running, *scheduler.waiting]

    def _end(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        self._scheduler.remove(request)
        request.finish(reason, error)

    def _grouped(self, rows: Rows) -> list[Rows]:
        """The rows of each call: single tokens; chunks of lengths within a quarter of each other.

        Those that padding would push beyond the model's context are called on their own. Among the
        tokens that decide on scales there is none.
        """
        groups: dict[object, Rows] = defaultdict(list)
        for request, count in rows:
            # Lengths that differ in fewer bits are alike.
            exact = request.length == 0 and count < self._first
            shift = 0 if exact else max(count.bit_length() - 3, 0)
            most = ((count >> shift) + 1 << shift) - 1
            fits = self._context is None or request.length + most <= self._context
            groups[most if fits else request].append((request, count))
        return list(groups.values())

    def _read(self, rows: Rows) -> None:
        """Run the model on some requests' pending tokens; then give who has none its next one."""
        requests = [request for request, _ in rows]
        lengths = [request.length for request in requests]
        table = self._scheduler.table[[request.row for request in requests]]
        done = [index for index, (request, count) in enumerate(rows) if count == request.pending]
        chunks = [request.known[request.length : request.length + n] for request, n in rows]
        if max(map(len, chunks)) == 1:
            logits = self._decode([token for (token,) in chunks], lengths, table)[done]
        else:
            logits = self._prefill(chunks, lengths, table, done)
        for request, count in rows:
            self._scheduler.count(request, count)
        if done:
            self._continue([requests[index] for index in done], logits)

    def _prefill(
        self, chunks: list[list[int]], lengths: list[int], table: Tensor, asked: list[int]
    ) -> Tensor:
        """Read B chunks; the logits after the last token of the rows ``asked``, (len(asked), V)."""
        cache = self._memory.cache(len(chunks))
        cache.place(lengths, table)
        ids = right_padded(chunks, self.model.device)
        hidden = self.model.features(ids, cache)  # type: ignore[arg-type]  # (B, T, C)
        last = [len(chunks[index]) - 1 for index in asked]
        return self.model.lm_head(hidden[asked, last]) if asked else hidden[:0, 0]

    def _decode(self, tokens: list[int], lengths: list[int], table: Tensor) -> Tensor:
        """B tokens -> (B, V) the logits of the next."""
        count = len(tokens)
        if not graphs.captures(self.model):
            cache = self._memory.cache(count)
            cache.place(lengths, table)
            ids = torch.tensor(tokens, device=self.model.device)
            return decode(self.model, ids, cache)  # type: ignore[arg-type]
        decoder = self._decoder(count)
        size = decoder.cache.batch_size
        decoder.cache.place(lengths, table)
        return decoder(torch.tensor(tokens + [0] * (size - count), device="cpu"))[:count]

    def _decoder(self, count: int) -> graphs.GraphDecoder:
        """The captured step for the next power of two of sequences."""
        size = 1 << (count - 1).bit_length()
        if size not in self._decoders:
            cache = self._memory.cache(size)
            self._decoders[size] = graphs.GraphDecoder(decode, self.model, cache).capture()
        return self._decoders[size]

    def _continue(self, requests: list[Request], logits: Tensor) -> None:
        """The next token of each, from (B, V): chosen for all of one `Sampling` together."""
        alike: dict[Sampling, list[tuple[Request, Tensor]]] = defaultdict(list)
        for request, its in zip(requests, logits.split(1), strict=True):
            try:
                alike[request.sampling].append((request, _processed(request, its)))
            except Exception as error:  # of a caller's logits_processor; the others go on
                self._end(request, "error", error)
        for how, pairs in alike.items():
            numbers = [r.numbers[len(r.tokens)] for r, _ in pairs if r.numbers is not None]
            uniform = torch.stack(numbers) if numbers else None
            tokens = sampling.choose(torch.cat([its for _, its in pairs]), how, uniform)
            for (request, _), token in zip(pairs, tokens.tolist(), strict=True):
                self._accept(request, token)

    def _accept(self, request: Request, token: int) -> None:
        try:
            if token == sampling.NO_TOKEN:
                raise no_token(0, len(request.tokens))
            reason = request.accept(token)
        except Exception as error:  # of the model's numbers, or of a caller's on_token
            self._end(request, "error", error)
        else:
            if reason is not None:
                self._end(request, reason)


def _processed(request: Request, logits: Tensor) -> Tensor:
    """(1, V) logits after what asks for the tokens before."""
    how, device = request.sampling, logits.device
    if not how.asks_for_history:
        return logits
    new = len(request.tokens)
    return processors.process(
        logits,
        torch.tensor([request.known], device=device),
        torch.tensor([new], device=device),
        torch.tensor([new + 1 == request.max_new_tokens], device=device),
        how,
        request.ends,
    )
