"""Tokenizers and records that the tests of objectives with labels share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastattn.training import Tokenizer

TEXTS = ["The quick brown fox jumps over the lazy dog, 1990s.\n", "北京是中国的首都，天气很好。\n"]


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """Trained here, with the tokens that an encoder needs."""
    roles = ("cls", "sep", "pad", "mask", "unk")
    special = {role: f"<|{role}|>" for role in roles}
    return Tokenizer.train([text * 20 for text in TEXTS], 330, special_tokens=special)


@pytest.fixture(scope="session")
def word_pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """BERT's, as transformers writes it: lower case, types of segments, truncation switched on."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, processors

    pieces = ["the", "quick", "brown", "fox", "jump", "##s", "over", "lazy", "dog", "1990", ","]
    pieces += list("北京是中国的首都")
    roles = {role: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    vocabulary = {token: number for number, token in enumerate([*roles.values(), *pieces])}
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(list(roles.values()))
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    folder: Path = tmp_path_factory.mktemp("bert")
    backend.save(str(folder / "tokenizer.json"))
    config = {f"{role}_token": token for role, token in roles.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)
