"""A model folder that the commands can talk to: random weights, a small tokenizer, a template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastattn import GPT, GPTConfig
from fastattn.cli import main
from fastattn.training import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no role ' ~ m.role) }}{% endif %}[{{ m.role }}] {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
CONTEXT = 96
END = 256  # <|endoftext|>


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str], str], None]:
    """`refused(argv, message)`: the command ends with 1, and prints one line, an error."""

    def check(argv: list[str], message: str) -> None:
        capsys.readouterr()
        assert main(argv) == 1, argv
        out, error = capsys.readouterr()
        assert message in error and error.count("\n") == 1 and out == "", error

    return check


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = Tokenizer.train(["the quick brown fox 今天天气很好 " * 20], vocab_size=300)
    torch.manual_seed(0)
    size = tokenizer.vocab_size
    config = GPTConfig(
        vocab_size=size, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.end_of_text,
    )  # fmt: skip
    model = GPT(config)
    with torch.no_grad():  # letters, spaces and Chinese; the end now and then
        model.wte.weight[128:256] *= 0.5
    model.save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder
