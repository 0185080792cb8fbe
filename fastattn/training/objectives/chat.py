"""Dialogue: the assistant's answers in conversations (Ouyang et al. 2022, arXiv:2203.02155, 3.5).

Conversations are cut and joined to rows of a given number of tokens, without padding; the loss is
of the answers only, each with the token that ends its turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy

from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.contract import Batch, Example, Objective, Record
from fastattn.training.dialogue import TEMPLATE, TURN_TOKENS, encode_dialogue
from fastattn.training.objectives.collation import packed_batch


@dataclass(frozen=True)
class ChatSettings:
    """How a model learns to answer.

    Attributes:
        field: of a record, the list of messages {"role": ..., "content": ...}; roles are "system",
            "user" and "assistant".
    """

    field: str = "messages"


class Chat(Objective):
    """The assistant's answers in a conversation, by the tokenizer's chat template.

    A tokenizer without a template gets ours, `dialogue.TEMPLATE`, and is saved with it.

    Attributes:
        end_of_turn: the token that ends an answer, which a model that is trained should have among
            its eos_token_id.
    """

    name = "chat"
    settings_class = ChatSettings
    fields = ("input_ids", "answer")
    packs = True
    extra_tokens = TURN_TOKENS
    of_text = True

    def _derive(self) -> None:
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            turns = [tokenizer.token_to_id(token) for token in TURN_TOKENS]
            if not tokenizer.special_ids.issuperset(turns):
                raise ValueError(
                    "the tokenizer has no chat template, and not the special tokens "
                    f"{' and '.join(TURN_TOKENS)} of ours: train one with "
                    f"extra_tokens={TURN_TOKENS!r}, or take the tokenizer of a chat model"
                )
            tokenizer.chat_template = TEMPLATE
        sample = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        ids, answer = encode_dialogue(tokenizer, sample)
        self.end_of_turn = int(ids[answer][-1])

    def encode(self, record: Record) -> Iterable[Example]:
        ids, answer = encode_dialogue(self.tokenizer, self.value(record, self.settings.field))
        if not answer.any():
            raise ValueError(
                f"the field {self.settings.field!r} of a record has no message of the assistant"
            )
        yield {"input_ids": ids, "answer": answer.astype(numpy.int64)}

    def collate(self, examples: Sequence[Example], random: numpy.random.Generator) -> Batch:
        ids = [example["input_ids"] for example in examples]
        labels = [
            numpy.where(example["answer"], example["input_ids"].astype(numpy.int64), IGNORED)
            for example in examples
        ]
        return packed_batch(ids, labels, self.interface)
