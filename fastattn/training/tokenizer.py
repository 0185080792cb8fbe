"""A byte-level BPE tokenizer, trained on one's own text.

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) over the bytes of UTF-8, with GPT-2's
splitting into words (Radford et al. 2019): every text has an encoding, and decoding it gives the
text back exactly. The training and the encoding are done by the package `tokenizers`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from fastattn.files import local_path, write_text, written_beside
from fastattn.training.optional import require

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and END_OF_TEXT


class Tokenizer:
    """Text to token ids and back.

        tokenizer = Tokenizer.train(["some text", "more text"], vocab_size=4096)
        tokenizer.decode(tokenizer.encode("天气 ok")) == "天气 ok"
        tokenizer.save("folder")  # transformers' AutoTokenizer.from_pretrained("folder") reads it

    The literal text "<|endoftext|>" encodes to the one token `end_of_text`.
    """

    def __init__(self, backend: Any) -> None:
        """Args: backend: a `tokenizers.Tokenizer`; `train` and `load` make one."""
        self._backend = backend
        end_of_text = backend.token_to_id(END_OF_TEXT)
        if end_of_text is None:
            raise ValueError(f"backend has no token {END_OF_TEXT!r}")
        self.end_of_text: int = end_of_text

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
        """Learn the merges from `texts`; the same texts give the same tokenizer.

        Args:
            texts: at least one non-empty string.
            vocab_size: how many tokens to learn, at least 257; a small corpus may yield fewer.

        Raises:
            ValueError: `texts` holds no text, or `vocab_size` is too small.
            ImportError: the package `tokenizers` is not installed.
        """
        tokenizers = _tokenizers()
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size must be at least {SMALLEST_VOCABULARY} (256 bytes and "
                f"{END_OF_TEXT}); got {vocab_size}"
            )
        if isinstance(texts, str):
            raise TypeError("texts must be strings in a list, not one string: pass [text]")
        texts = [text for text in texts if text]
        if not texts:
            raise ValueError("texts is empty: a tokenizer needs text to learn from")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read the tokenizer.json of `folder`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a tokenizer with the token "<|endoftext|>".
        """
        tokenizers = _tokenizers()
        path = local_path("folder", folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(
                f"{path} is not a tokenizer that fastattn can read: {error}"
            ) from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, and tokenizer_config.json for transformers' AutoTokenizer."""
        target = local_path("folder", folder)
        with written_beside(target / "tokenizer.json") as temporary:
            self._backend.save(str(temporary))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        }
        write_text(target / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")

    @property
    def vocab_size(self) -> int:
        """How many token ids there are: ids are 0 .. vocab_size - 1."""
        return int(self._backend.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; [] for the empty text.

        Raises:
            ValueError: `text` holds half of a surrogate pair, which UTF-8 cannot write.
        """
        text.encode()  # UnicodeEncodeError is a ValueError; tokenizers would raise a TypeError
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 (half a character) become U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"ids holds {i}; this tokenizer has ids 0 to {self.vocab_size - 1}"
                )
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


def _tokenizers() -> Any:
    return require("tokenizers", "train", "the tokenizer")
