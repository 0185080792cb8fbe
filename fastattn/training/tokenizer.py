"""A byte-level BPE tokenizer, trained on one's own text.

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) over the bytes of UTF-8, with GPT-2's
splitting into words (Radford et al. 2019): every text has an encoding, and decoding it gives the
text back exactly. The training and the encoding are done by the package `tokenizers`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from fastattn.files import local_path, read_json, read_whole, write_text, written_beside
from fastattn.training.optional import require

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and END_OF_TEXT
ROLES = ("bos", "eos", "pad", "mask", "cls", "sep", "unk")  # of special tokens


class Words(NamedTuple):
    """A text's tokens with their places.

    Attributes:
        ids: (n,) token ids.
        offsets: (n, 2) where each begins and ends in the text, in characters.
        word: (n,) the number of the word that each is of; -1 for a special token.
    """

    ids: numpy.ndarray
    offsets: numpy.ndarray
    word: numpy.ndarray


class Layout(NamedTuple):
    """The special tokens around a text, or around two: rows of (id, type of segment).

    Attributes:
        before, between, after: (n, 2) before the first text, between both, after the last.
        types: the segments' types of the first text's tokens and of the second's.
    """

    before: numpy.ndarray
    between: numpy.ndarray
    after: numpy.ndarray
    types: tuple[int, int]


class Tokenizer:
    """Text to token ids and back.

        tokenizer = Tokenizer.train(["some text", "more text"], vocab_size=4096)
        tokenizer.decode(tokenizer.encode("天气 ok")) == "天气 ok"
        tokenizer.save("folder")  # transformers' AutoTokenizer.from_pretrained("folder") reads it

    The literal text "<|endoftext|>" of a trained one encodes to the one token `end_of_text`, unless
    it is encoded with literal=True, as texts of strangers are.

    Attributes:
        roles: the special tokens, by what they are for: "bos", "eos", "pad", "mask", "cls", "sep",
            "unk".
        special_ids: the ids of all special tokens, those without a role too.
        chat_template: how a dialogue is written, a template of Jinja; None without one.
    """

    def __init__(
        self, backend: Any, roles: Mapping[str, str], chat_template: str | None = None
    ) -> None:
        """Args: backend: a `tokenizers.Tokenizer`; `train` and `load` make one."""
        self._backend = backend
        backend.no_truncation()  # files of transformers may have both switched on
        backend.no_padding()
        self.roles = dict(roles)
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder().items()
        self.special_ids = frozenset(i for i, token in added if token.special)
        for role, token in self.roles.items():
            if role not in ROLES:
                raise ValueError(f"a special token is one of {', '.join(ROLES)}; got {role!r}")
            if backend.token_to_id(token) is None:
                raise ValueError(f"backend has no token {token!r}, which is said to be {role!r}")
        if backend.post_processor is None and {"cls", "sep"} <= self.roles.keys():
            backend.post_processor = self._cls_and_sep()

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 4096,
        *,
        special_tokens: Mapping[str, str] | None = None,
        extra_tokens: Sequence[str] = (),
    ) -> Tokenizer:
        """Learn the merges from `texts`; the same texts give the same tokenizer.

        Args:
            texts: at least one non-empty string.
            vocab_size: how many tokens to learn, at least 257; a small corpus may yield fewer.
            special_tokens: beside "<|endoftext|>", which is "bos", "eos" and "unk" unless they are
                here: a token for each role, as {"mask": "<|mask|>"}.
            extra_tokens: others that are never cut, as "<extra_id_0>".

        Raises:
            ValueError: `texts` holds no text, or `vocab_size` is too small.
            ImportError: the package `tokenizers` is not installed.
        """
        tokenizers = _tokenizers()
        roles = {"bos": END_OF_TEXT, "eos": END_OF_TEXT, "unk": END_OF_TEXT} | dict(
            special_tokens or {}
        )
        special = list(dict.fromkeys([END_OF_TEXT, *roles.values(), *extra_tokens]))
        smallest = SMALLEST_VOCABULARY - 1 + len(special)
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size must be at least {smallest} (256 bytes and {', '.join(special)}); "
                f"got {vocab_size}"
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
            special_tokens=special,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, roles)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read the tokenizer.json of `folder`, ours or transformers', and what is beside it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a tokenizer.
        """
        tokenizers = _tokenizers()
        place = local_path("folder", folder)
        path = place / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no tokenizer.json")
        settings = {
            **_settings(place / "special_tokens_map.json"),
            **_settings(place / "tokenizer_config.json"),
        }
        roles = {role: _content(settings.get(f"{role}_token")) for role in ROLES}
        template = settings.get("chat_template")
        template_file = place / "chat_template.jinja"
        if template_file.is_file():
            template = read_whole(template_file).decode()
        try:
            return cls(
                tokenizers.Tokenizer.from_file(str(path)),
                {role: token for role, token in roles.items() if token is not None},
                template if isinstance(template, str) else None,
            )
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(
                f"{path} is not a tokenizer that fastattn can read: {error}"
            ) from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, and tokenizer_config.json for transformers' AutoTokenizer."""
        target = local_path("folder", folder)
        with written_beside(target / "tokenizer.json") as temporary:
            self._backend.save(str(temporary))
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {f"{role}_token": token for role, token in self.roles.items()}
        settings["clean_up_tokenization_spaces"] = False
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        write_text(
            target / "tokenizer_config.json",
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        )

    @property
    def vocab_size(self) -> int:
        """How many token ids there are: ids are 0 .. vocab_size - 1."""
        return int(self._backend.get_vocab_size())

    @property
    def vocabulary(self) -> dict[str, int]:
        """The tokens and their ids."""
        return dict(self._backend.get_vocab())

    @property
    def end_of_text(self) -> int:
        """The token after a document: that of the role "eos", or "sep" where there is none."""
        return self.token("sep" if "eos" not in self.roles and "sep" in self.roles else "eos")

    @property
    def fingerprint(self) -> str:
        """A digest of all that it is; equal tokenizers have the same."""
        parts = (self._backend.to_str(), self.roles, self.chat_template)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def token(self, role: str) -> int:
        """The id of a special token, by what it is for ("mask").

        Raises:
            ValueError: the tokenizer has none.
        """
        if role not in self.roles:
            raise ValueError(
                f"the tokenizer has no {role!r} token, only {', '.join(self.roles) or 'none'}: "
                f'train one with special_tokens={{"{role}": "<|{role}|>"}}, or take the tokenizer '
                "of a model that was trained for the same objective"
            )
        return int(self._backend.token_to_id(self.roles[role]))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its text; None if there is none."""
        i: int | None = self._backend.token_to_id(token)
        return i

    def encode(self, text: str, *, literal: bool = False) -> list[int]:
        """Token ids of `text`; [] for the empty text.

        Args:
            literal: whether the name of a special token in `text` is a text like any other.

        Raises:
            ValueError: `text` holds half of a surrogate pair, which UTF-8 cannot write.
        """
        return self.encode_many([text], literal=literal)[0]

    def encode_many(self, texts: Sequence[str], *, literal: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        for text in texts:
            text.encode()  # UnicodeEncodeError is a ValueError; tokenizers would raise a TypeError
        backend = self._literal if literal else self._backend
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def words(self, text: str, *, literal: bool = False) -> Words:
        """The tokens of `text` with their places, and the words that they are parts of.

        Words are what the tokenizer first cuts a text into: with a byte-level one a run of letters
        with the space before it, so that Chinese sentences are not cut.

        Args and errors are those of `encode`.
        """
        text.encode()
        backend = self._literal if literal else self._backend
        encoding = backend.encode(text, add_special_tokens=False)
        word = [-1 if i in self.special_ids else w for i, w in zip(encoding.ids, encoding.word_ids)]
        return Words(
            numpy.array(encoding.ids, dtype=numpy.int64),
            numpy.array(encoding.offsets, dtype=numpy.int64).reshape(-1, 2),
            numpy.array(word, dtype=numpy.int64),
        )

    def layout(self, pair: bool = False) -> Layout:
        """The special tokens that a model of this tokenizer expects around a text, or around two.

        They are those of the tokenizer's file, or "cls" and "sep" where it has such tokens and
        says no more, as a trained one: cls text sep, cls text sep text sep.
        """
        encoding = self._backend.encode("a", "a" if pair else None)
        place = [-1 if number is None else number for number in encoding.sequence_ids]
        rows = numpy.array([encoding.ids, encoding.type_ids], dtype=numpy.int64).T
        first, last = place.index(0), len(place) - place[::-1].index(int(pair))
        end = len(place) - place[::-1].index(0)
        between = rows[end : place.index(1)] if pair else rows[:0]
        return Layout(
            rows[:first], between, rows[last:], (int(rows[first, 1]), int(rows[last - 1, 1]))
        )

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

    @functools.cached_property
    def _literal(self) -> Any:
        """The same backend, to which special tokens in a text are nothing special."""
        backend = _tokenizers().Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def _cls_and_sep(self) -> Any:
        cls, sep = self.roles["cls"], self.roles["sep"]
        return _tokenizers().processors.TemplateProcessing(
            single=[cls, "$A:0", sep],
            pair=[cls, "$A:0", sep, "$B:0", sep],
            special_tokens=[(cls, self.token("cls")), (sep, self.token("sep"))],
        )


def _settings(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; {} if there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return {}
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold an object, got {type(settings).__name__}")
    return settings


def _content(token: object) -> str | None:
    """A token's text, which transformers writes as a string or as an object with its settings."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _tokenizers() -> Any:
    return require("tokenizers", "train", "the tokenizer")
