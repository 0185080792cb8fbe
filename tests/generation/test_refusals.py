"""Settings of generate that say nothing, have no effect or exclude each other, by method."""

from __future__ import annotations

from typing import Any

import pytest
from generation.small import make_model

GENERAL: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_new_tokens": None}, ValueError, "max_new_tokens must be given: no generation config"),
    ({"max_new_tokens": None, "max_length": 2}, ValueError, "max_length must be more than the 2"),
    ({"max_new_token": 3}, TypeError, "no argument 'max_new_token': did you mean 'max_new_to"),
    ({"xyz": 3}, TypeError, "generate has no argument 'xyz'$"),
    ({"generation_config": {"top_k": 3}}, TypeError, "must be a fastattn.*got dict"),
    ({"do_sample": 1.5}, TypeError, "do_sample must be True or False"),
    ({"streamer": print}, TypeError, r"streamer must have put\(tokens\)"),
    ({"num_return_sequences": 2}, ValueError, "num_return_sequences = 2 needs do_sample=True or"),
]
PROCESSORS = [
    ({"no_repeat_ngram_size": -1}, ValueError, "no_repeat_ngram_size must be at least 0"),
    ({"bad_words_ids": [[1], []]}, ValueError, "bad_words_ids must have no empty sequence"),
    ({"bad_words_ids": [["a"]]}, TypeError, "each of bad_words_ids must be an integer"),
    ({"bad_words_ids": 3}, TypeError, "bad_words_ids must be lists of ids, got 3"),
    ({"forced_bos_token_id": [3]}, TypeError, "forced_bos_token_id must be an integer, got"),
    ({"bad_words_ids": [[61]]}, ValueError, "bad_words_ids must be from 0 .* = 60, got 61"),
    ({"suppress_tokens": [-1]}, ValueError, "each of suppress_tokens must be at least 0"),
    ({"forced_eos_token_id": 61}, ValueError, "forced_eos_token_id must be from 0 .*got 61"),
    ({"min_p": 1.5, "do_sample": True}, ValueError, r"min_p must be in \[0, 1\], or None"),
    ({"min_p": 0.5}, ValueError, "min_p would have no effect"),
    ({"presence_penalty": float("nan")}, ValueError, "presence_penalty must be finite"),
    ({"min_new_tokens": 5}, ValueError, "min_new_tokens must be at most what max_new_tokens"),
    ({"logits_processor": 3}, TypeError, "logits_processor must be a function or several"),
    ({"logits_processor": [3]}, TypeError, "logits_processor must be a function or several"),
]
BEAMS = [
    ({"num_beams": 0}, ValueError, "num_beams must be at least 1, got 0"),
    ({"num_beams": 2, "num_return_sequences": 3}, ValueError, "at most num_beams = 2, got 3"),
    ({"num_beams": 62}, ValueError, "num_beams = 62 is too many for a vocabulary of 61 tokens"),
    ({"num_beams": 2, "temperature": 0.5}, ValueError, "temperature would have no effect"),
    ({"num_beams": 2, "seed": 3}, ValueError, "seed would have no effect"),
    (
        {"num_beams": 2, "penalty_alpha": 0.5, "top_k": 4},
        ValueError,
        "num_beams=2 and penalty_alpha=0.5 exclude each other",
    ),
    (
        {"num_beams": 2, "prompt_lookup_num_tokens": 3},
        ValueError,
        "num_beams=2 and prompt_lookup_num_tokens=3 exclude",
    ),
    ({"num_beams": 2, "early_stopping": "always"}, ValueError, 'must be True, False or "never"'),
    ({"length_penalty": 2.0}, ValueError, "length_penalty would have no effect: give num_beams"),
    ({"num_beams": 2, "on_token": print}, ValueError, "on_token does not go with num_beams"),
]
CONTRASTIVE = [
    ({"penalty_alpha": 0.6}, ValueError, "penalty_alpha needs top_k, at least 2 .* got None"),
    ({"penalty_alpha": 0.6, "top_k": 1}, ValueError, "needs top_k, at least 2 .* got 1"),
    ({"penalty_alpha": 0.6, "top_k": 62}, ValueError, "at most the vocabulary's 61 tokens"),
    ({"penalty_alpha": 1.5, "top_k": 4}, ValueError, r"must be in \[0, 1\], got 1.5"),
    ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": True}, ValueError, "excludes do_sample"),
    ({"penalty_alpha": 0.6, "top_k": 4, "num_return_sequences": 2}, ValueError, "only one answer"),
]
# "draft": the changes of a draft model.
SPECULATIVE = [
    ({"draft": {"vocab_size": 60}}, ValueError, "vocabulary of 61 tokens, got 60"),
    ({"draft": {"n_positions": 5}}, ValueError, "6 together, and has n_positions = 5"),
    ({"draft": {}, "prompt_lookup_num_tokens": 3}, ValueError, "draft_model and prompt_lookup"),
    ({"draft": {}, "num_beams": 2}, ValueError, "num_beams=2 and draft_model exclude each other"),
    ({"draft": {}, "assistant_model": 3}, TypeError, "did you mean 'draft_model'"),
    ({"prompt_lookup_num_tokens": 0}, ValueError, "prompt_lookup_num_tokens must be at least"),
    ({"num_assistant_tokens": 3}, ValueError, "num_assistant_tokens would have no effect"),
    ({"max_matching_ngram_size": 3}, ValueError, "max_matching_ngram_size would have no effect"),
    (
        {"prompt_lookup_num_tokens": 3, "on_token": print},
        ValueError,
        "on_token goes with speculation only for a single prompt, got 2",
    ),
    (
        {"draft": {}, "do_sample": True, "num_return_sequences": 2},
        ValueError,
        "num_return_sequences = 2 does not go with speculation",
    ),
]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [*GENERAL, *PROCESSORS, *BEAMS, *CONTRASTIVE, *SPECULATIVE],
    ids=str,
)
def test_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    settings = {"max_new_tokens": 4, **settings}
    if "draft" in settings:
        settings["draft_model"] = make_model(1, **settings.pop("draft"))
    with pytest.raises(error, match=message):
        make_model().generate([[1, 2], [3]], **settings)
