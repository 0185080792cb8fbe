"""The byte-level BPE tokenizer: exact round trips, files that transformers reads, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastattn.training import Tokenizer
from fastattn.training.tokenizer import END_OF_TEXT

TEXTS = ["the quick brown fox jumps over the lazy dog\n" * 20, "今天天气很好，房间也很好。\n" * 20]
TRAINED = Tokenizer.train(TEXTS, vocab_size=400)


@settings(max_examples=300, deadline=None)
@given(st.text())
@example(" leading, trailing  ")  # no space is added or lost
@example("\r\n\t\x00\x7f")
@example("e\u0301 \u00e9")  # not normalised
@example("𝕏🧑‍🚀")  # outside the basic plane
@example(f"a{END_OF_TEXT}b")
def test_any_text_comes_back_exactly(text: str) -> None:
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert all(0 <= i < TRAINED.vocab_size for i in ids)


def test_merges_are_learnt() -> None:
    assert len(TRAINED.encode("今天天气很好")) < len("今天天气很好".encode()) / 2
    assert len(TRAINED.encode("the quick brown fox")) <= 5


def test_half_a_character_decodes_to_the_replacement() -> None:
    first, _ = TRAINED.encode("é")
    assert TRAINED.decode([first]) == "\ufffd"


def test_saved_folder_is_read_by_us_and_by_transformers(tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    text = " 今天天气很好 , the fox 's\n"
    read = Tokenizer.load(tmp_path)
    assert read.encode(text) == TRAINED.encode(text)
    assert (read.vocab_size, read.end_of_text) == (TRAINED.vocab_size, TRAINED.end_of_text)

    transformers = pytest.importorskip("transformers")
    for cls in (transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer):
        theirs = cls.from_pretrained(tmp_path)
        assert theirs(text)["input_ids"] == TRAINED.encode(text)
        assert theirs.decode(TRAINED.encode(text)) == text
        assert theirs.eos_token_id == TRAINED.end_of_text
        assert len(theirs) == TRAINED.vocab_size


def test_special_tokens_have_their_roles_and_come_back_from_a_folder(tmp_path: Path) -> None:
    special = {"mask": "<|mask|>", "pad": "<|pad|>", "cls": "<|cls|>", "sep": "<|sep|>"}
    trained = Tokenizer.train(TEXTS, 400, special_tokens=special, extra_tokens=["<extra_id_0>"])
    trained.chat_template = "{{ messages }}"
    trained.save(tmp_path)
    read = Tokenizer.load(tmp_path)
    assert (
        read.roles
        == trained.roles
        == {**special, **dict.fromkeys(["bos", "eos", "unk"], END_OF_TEXT)}
    )
    assert read.chat_template == trained.chat_template
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    for role, token in read.roles.items():
        assert read.token(role) == getattr(theirs, f"{role}_token_id") == read.token_to_id(token)
        assert read.encode(f"a{token}b")[1] == read.token(role)
    assert read.special_ids == {read.token(role) for role in read.roles} | {
        read.token_to_id("<extra_id_0>")
    }
    assert theirs.chat_template == trained.chat_template


def test_a_role_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"no 'mask' token, only bos, eos, unk: train one with"):
        TRAINED.token("mask")
    with pytest.raises(ValueError, match=r"one of bos, eos, .*; got 'msk'"):
        Tokenizer.train(TEXTS, 400, special_tokens={"msk": "<|mask|>"})
    with pytest.raises(ValueError, match="vocab_size must be at least 258"):
        Tokenizer.train(TEXTS, 257, special_tokens={"mask": "<|mask|>"})


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_words_are_the_tokens_with_their_places(text: str) -> None:
    words = TRAINED.words(text)
    assert words.ids.tolist() == TRAINED.encode(text)
    assert words.offsets.shape == (len(words.ids), 2)
    assert (words.word >= 0).all()  # no special token is in it
    assert (numpy.diff(words.word) >= 0).all()
    assert (
        "".join(text[a:b] for a, b in {tuple(pair): 0 for pair in words.offsets.tolist()}) == text
    )


def test_words_of_a_sentence() -> None:
    words = TRAINED.words(f"the quicker fox{END_OF_TEXT}")
    sizes = numpy.bincount(words.word[words.word >= 0])
    assert len(sizes) == 3 and words.word[-1] == -1
    assert words.offsets[-1].tolist() == [15, 15 + len(END_OF_TEXT)]


def test_bad_arguments_are_refused() -> None:
    for texts in ([], [""], ["", ""]):
        with pytest.raises(ValueError, match="texts is empty"):
            Tokenizer.train(texts)
    with pytest.raises(TypeError, match="texts must be strings in a list"):
        Tokenizer.train("one string")
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257.*got 256"):
        Tokenizer.train(TEXTS, vocab_size=256)
    with pytest.raises(ValueError, match=f"ids holds {TRAINED.vocab_size}"):
        TRAINED.decode([TRAINED.vocab_size])
    with pytest.raises(ValueError, match="surrogates not allowed"):
        TRAINED.encode("\ud800")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    TRAINED.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    foreign = json.loads(whole)  # without the token that tokenizer_config.json names
    foreign["added_tokens"] = []
    foreign["model"]["vocab"].pop(END_OF_TEXT)
    for content in (whole[: len(whole) // 2], "{}", json.dumps(foreign)):
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="is not a tokenizer that fastattn can read"):
            Tokenizer.load(tmp_path)


def test_equal_tokenizers_have_the_same_fingerprint(tmp_path: Path) -> None:
    def trained(text: str = "some text", **arguments: object) -> Tokenizer:
        return Tokenizer.train([text], vocab_size=300, **arguments)

    tokenizer = trained()
    tokenizer.save(tmp_path)
    assert tokenizer.fingerprint == trained().fingerprint == Tokenizer.load(tmp_path).fingerprint
    others = [trained("other text"), trained(special_tokens={"mask": "<|mask|>"}), trained()]
    others[-1].chat_template = "{{ messages }}"
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_literal_texts_have_no_special_token() -> None:
    text = f"a{END_OF_TEXT} b"
    assert TRAINED.end_of_text == TRAINED.encode(text)[1]
    ids = TRAINED.encode(text, literal=True)
    assert not TRAINED.special_ids & set(ids) and TRAINED.decode(ids) == text
    words = TRAINED.words(text, literal=True)
    assert words.ids.tolist() == ids and (words.word >= 0).all()
    assert TRAINED.encode("no such name", literal=True) == TRAINED.encode("no such name")


def test_the_layout_is_cls_and_sep_where_a_tokenizer_has_them(tmp_path: Path) -> None:
    special = {"cls": "<|cls|>", "sep": "<|sep|>"}
    tokenizer = Tokenizer.train(TEXTS, 300, special_tokens=special)
    cls, sep = tokenizer.token("cls"), tokenizer.token("sep")
    before, between, after, types = tokenizer.layout(pair=True)
    assert (before.tolist(), between.tolist(), after.tolist()) == (
        [[cls, 0]],
        [[sep, 0]],
        [[sep, 0]],
    )
    assert types == (0, 0)
    single = tokenizer.layout()
    assert (single.before.tolist(), len(single.between), single.after.tolist()) == (
        [[cls, 0]],
        0,
        [[sep, 0]],
    )
    assert all(len(part) == 0 for part in TRAINED.layout()[:3])
    # transformers puts the same tokens there.
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    a, b = tokenizer.encode("fox"), tokenizer.encode("天气")
    assert theirs("fox", "天气")["input_ids"] == [cls, *a, sep, *b, sep]


def test_a_file_that_cuts_and_pads_texts_does_neither_here(tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    contents = json.loads(path.read_text(encoding="utf-8"))
    contents["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    contents["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": END_OF_TEXT,
    }  # fmt: skip
    path.write_text(json.dumps(contents), encoding="utf-8")
    read = Tokenizer.load(tmp_path)
    for text in ("天", TEXTS[0]):
        assert read.encode(text) == TRAINED.encode(text)
