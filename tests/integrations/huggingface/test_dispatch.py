"""Which families take the name "fastattn", and which masks they get."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from integrations.huggingface.architectures import ARCHITECTURES, ENCODER, VISION
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from fastattn.integrations.huggingface import NAME, dispatch
from fastattn.integrations.huggingface.dispatch import refusal, takes_boolean_masks

# They ask for masks, and compute attention of their own.
OWN = (
    "BloomForCausalLM", "MptForCausalLM", "GPTNeoXJapaneseForCausalLM", "XGLMForCausalLM",
    "TrOCRForCausalLM", "ImageGPTForCausalImageModeling", "MvpForConditionalGeneration",
    "LEDForConditionalGeneration", "RoFormerModel", "RemBertModel", "MegatronBertModel",
    "MPNetModel", "ConvBertModel", "SqueezeBertModel", "VisualBertModel", "VitsModel",
    # Those would look the name up in a table of their own.
    "FalconForCausalLM", "GPTNeoForCausalLM",
)  # fmt: skip
BLOOM = transformers.BloomConfig(**ARCHITECTURES["bloom"][1])

# They dispatch. Those of the tests beside this one are run too.
DISPATCH = (
    "BartModel", "BertModel", "CLIPModel", "Cohere2ForCausalLM", "DeepseekV3ForCausalLM",
    "DistilBertModel", "Gemma2ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM",
    "GptOssForCausalLM", "Idefics3ForConditionalGeneration", "LlamaForCausalLM", "MarianMTModel",
    "MistralForCausalLM", "MllamaForConditionalGeneration", "OPTForCausalLM",
    "PaliGemmaForConditionalGeneration", "PegasusForConditionalGeneration", "Phi3ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration", "Qwen3ForCausalLM", "RobertaModel", "SiglipModel",
    "T5ForConditionalGeneration", "T5GemmaForConditionalGeneration", "ViTModel", "Wav2Vec2Model",
    "WhisperForConditionalGeneration",
)  # fmt: skip

# They ask for no masks: what does not dispatch in them computes as ever.
WITHOUT_MASKS = ("CTRLLMHeadModel", "SwinModel", "XLNetModel", "DonutSwinModel", "ResNetModel")


def model_class(name: str) -> type[PreTrainedModel]:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    cls: type[PreTrainedModel] = getattr(transformers, name)
    return cls


@pytest.mark.parametrize("name", OWN)
def test_attention_of_its_own_is_refused_when_chosen(name: str) -> None:
    cls = model_class(name)
    config = cls.config_class()
    message = (
        rf"^{name} does not dispatch .* \({cls.__module__} computes its own\).* "
        r'use attn_implementation="eager"; .* attn_implementation=\{"": "fastattn", .*: "eager"\}$'
    )
    with torch.device("meta"):
        with pytest.raises(ValueError, match=message):
            cls._from_config(config, attn_implementation=NAME)
        assert cls._from_config(config, attn_implementation="eager").config is not None


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_of_its_own_is_refused_masks(
    compiled: bool, tokens: torch.Tensor, device: str
) -> None:
    """Where the name came past the choice."""
    cls = transformers.BloomForCausalLM
    model = cls._from_config(copy.copy(BLOOM), attn_implementation="eager").to(device)
    model.config._attn_implementation = NAME
    run = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(Exception, match="does not dispatch its attention"):
        run(tokens)


def test_refused_as_a_part_of_a_model() -> None:
    """And the fix that the message names, only for that part."""
    vision, text = transformers.ViTConfig(**VISION), transformers.TrOCRConfig(d_model=48)
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs
    cls = transformers.VisionEncoderDecoderModel
    with pytest.raises(ValueError, match="TrOCRForCausalLM does not dispatch"):
        cls._from_config(both(vision, text), attn_implementation=NAME)
    model = cls._from_config(
        both(vision, text), attn_implementation={"": NAME, "encoder": NAME, "decoder": "eager"}
    )
    assert model.encoder.config._attn_implementation == NAME
    assert model.decoder.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", [*DISPATCH, *WITHOUT_MASKS])
def test_not_refused(name: str) -> None:
    assert refusal(model_class(name)) is None


class Attention(torch.nn.Module):
    """This file asks for masks (above), and none of its own attention dispatches."""


class WithItsOwnAttention(transformers.LlamaForCausalLM):
    masks = create_causal_mask


def test_models_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    class MyBloom(transformers.BloomForCausalLM):
        pass

    class Inherited(transformers.models.llama.modeling_llama.LlamaAttention):
        __module__ = __name__

    monkeypatch.setattr(MyBloom, "__module__", "elsewhere")
    assert "MyBloom does not dispatch" in str(refusal(MyBloom))
    assert f"({__name__} computes its own)" in str(refusal(WithItsOwnAttention))
    monkeypatch.setitem(globals(), "Attention", Inherited)
    assert refusal(WithItsOwnAttention) is None


def test_other_implementations_are_not_asked_about() -> None:
    model = transformers.BloomForCausalLM._from_config(BLOOM)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match='"nonsense"` is not supported'):
        transformers.BloomForCausalLM._from_config(BLOOM, attn_implementation="nonsense")


def test_the_choice_is_wrapped_once() -> None:
    before = PreTrainedModel.get_correct_attn_implementation
    dispatch.refuse_when_chosen()
    assert PreTrainedModel.get_correct_attn_implementation is before


@pytest.mark.parametrize(
    ("name", "boolean"),
    [
        ("LlamaConfig", True),
        ("GptOssConfig", True),
        ("T5GemmaModuleConfig", True),  # of no model: with the others of its file
        ("NllbMoeConfig", False),
        ("SplinterConfig", False),
        ("InformerConfig", False),
        ("GitConfig", False),
        ("Gemma4AudioConfig", False),
    ],
)
def test_masks(name: str, boolean: bool) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, name)
    file = config.__module__.replace("configuration_", "modeling_")
    pytest.importorskip(file)
    assert takes_boolean_masks(config) is boolean
    assert takes_boolean_masks(type("Mine", (config,), {})) is boolean


def test_masks_of_an_unknown_config() -> None:
    assert not takes_boolean_masks(type("Mine", (transformers.PreTrainedConfig,), {}))


def test_git_after_its_choice(tokens: torch.Tensor, device: str) -> None:
    """Its layers are chosen when it is built, and add the mask to their scores."""
    config = transformers.GitConfig(vision_config=VISION, **ENCODER)
    torch.manual_seed(0)
    model = transformers.GitForCausalLM._from_config(config, attn_implementation="eager")
    model = model.to(device).eval()
    expected = model(tokens, use_cache=False).logits
    model.set_attn_implementation(NAME)
    assert model.config._attn_implementation == NAME
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected)
