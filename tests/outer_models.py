"""Small models that take pictures or sound too, with a decoder of text inside."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoConfig

import traced_models
from truedepth import modeling

SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), 4),
    "encoder_attention_heads": 4,
    **dict.fromkeys(("image_size", "projection_dim"), 16),
    **dict.fromkeys(("patch_size", "head_dim"), 8),
    **dict.fromkeys(("mm_hidden_size", "out_hidden_size"), 64),
}
"""Sizes of what is not the decoder."""

PICTURES: dict[str, tuple[dict[str, Any], int]] = {
    "llava": ({"image_token_index": 5}, 4),
    "gemma3": ({"image_token_index": 5, "mm_tokens_per_image": 4}, 4),
    "internvl": ({"image_token_id": 5}, 1),
    "mistral3": ({"image_token_index": 5, "spatial_merge_size": 1}, 4),
    "idefics3": ({"image_token_id": 5, "scale_factor": 2}, 1),
}
"""What their configs need for pictures, and the tokens of a picture of 16 x 16."""

OTHERS = ("aria", "kimi_k25", "qwen2_audio", "exaone4_5", "got_ocr2", "fuyu")
"""A mixture, latent attention, sound, norms behind, another decoder, one found by tracing."""

MORE = (
    *("deepseek_vl", "deepseek_vl_hybrid", "glmasr", "hyperclovax_vision_v2", "idefics2"),
    *("lighton_ocr", "llava_next", "llava_next_video", "llava_onevision"),
    *("moss_transcribe_diarize", "ovis2", "qianfan_ocr", "qwen3_asr", "smolvlm"),
    *("video_llama_3", "video_llava", "vipllava", "voxtral"),
)
"""Tested too, as slow tests."""


def config_of(name: str) -> Any:
    """A config with a decoder of 6 small layers."""
    given = AutoConfig.for_model(name).to_dict()
    given["text_config"] = _text(given["text_config"]["model_type"]).to_dict()
    for key in [key for key in given if key.endswith("_config") and key != "text_config"]:
        if isinstance(given[key], dict):
            given[key] |= {k: SMALL[k] for k in given[key].keys() & SMALL.keys()}
    return AutoConfig.for_model(**given | PICTURES.get(name, ({}, 0))[0])


def _text(model_type: str) -> Any:
    if model_type in traced_models.ARCHITECTURES:
        return traced_models.config_of(model_type)
    usual = AutoConfig.for_model(model_type)
    sizes = traced_models.TINY | {"head_dim": 16, "sliding_window": 8}
    own = {key: value for key, value in sizes.items() if getattr(usual, key, None) is not None}
    if hasattr(usual, "layer_types"):
        own.pop("rope_parameters", None)  # may be given by type of layer
    return AutoConfig.for_model(model_type, **copy.deepcopy(own))


def auto_of(name: str) -> Any:
    """The auto class that loads it."""
    classes = modeling.auto_classes(name)
    image = "AutoModelForImageTextToText"
    return getattr(transformers, image if image in classes else "AutoModelForMultimodalLM")


def model_of(name: str) -> Any:
    """A random model whose sub-layers all matter, in float32."""
    torch.manual_seed(0)
    model = auto_of(name).from_config(config_of(name), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0, 0.1) if parameter.ndim == 1 else parameter.normal_(0.0, 0.2)
    return model.eval()


def picture_inputs(name: str, ids: Any) -> dict[str, Any]:
    """Token ids `[1, length]` that hold a picture, and the picture."""
    tokens = PICTURES[name][1]
    given = ids.clone().clamp(min=6)
    given[0, 2 : 2 + tokens] = 5
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    found = {"input_ids": given, "pixel_values": pixels}
    if name == "mistral3":
        found["image_sizes"] = torch.tensor([[16, 16]])
    if name == "idefics3":
        found["pixel_values"] = pixels[None]
    if name == "gemma3":
        found["token_type_ids"] = (given == 5).long()
    return found
