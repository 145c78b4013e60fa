"""Models that take other input than text, opened as the language model inside them.

In such a model, `LlavaForConditionalGeneration` for one, a decoder reads the embeddings of text and
of what an encoder makes of pictures or sound. config.json describes it under `text_config`. It is
opened with the head as a model of text like any other. What is written is the whole model again,
with the decoder converted in its place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from truedepth import modeling
from truedepth.errors import TruedepthError, reason_of
from truedepth.families.family import Family
from truedepth.families.lookup import CONVERTED, OURS, described_family, traced, unconverted
from truedepth.sources.parameters import renamed
from truedepth.tensors import LazyTensor

OF_THE_WHOLE = (
    *OURS,
    *("model_type", "architectures", "auto_map", "dtype", "torch_dtype"),
    *("tie_word_embeddings", "quantization_config", "transformers_version"),
)
"""Keys of config.json that are the whole model's, not its decoder's."""

HEADED = (
    *("AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    *("AutoModelForSpeechSeq2Seq", "AutoModelForCausalLM"),
)
"""The auto classes that such a model may have, the first that it has being used."""


@dataclass(frozen=True)
class OuterModel:
    """A model with a decoder and a head inside that are a model of text."""

    config: Mapping[str, Any]
    """Its config.json."""

    path: Path
    read_tensors: Callable[[], Mapping[str, LazyTensor]]
    """Gives its tensors by their names in the files."""

    @property
    def model_type(self) -> str:
        """The original's `model_type`."""
        return unconverted(str(self.config.get("model_type")))

    @property
    def class_name(self) -> str:
        """The name of transformers' class."""
        return modeling.auto_classes(self.model_type)[self.auto_class]

    @property
    def auto_class(self) -> str:
        """The auto class that loads it."""
        classes = modeling.auto_classes(self.model_type)
        return next(auto for auto in HEADED if auto in classes)

    @cached_property
    def inside(self) -> dict[str, Any]:
        """config.json of the model of text.

        Raises:
            TruedepthError: transformers does not know the whole, or truedepth not its decoder.
        """
        whole, text = self._whole_config, self._whole_config.text_config
        config: dict[str, Any] = text.to_dict()
        tied = (getattr(each, "tie_word_embeddings", None) for each in (whole, text))
        config["tie_word_embeddings"] = next((each for each in tied if each is not None), False)
        for key in ("dtype", "torch_dtype", "quantization_config"):
            if value := self.config.get(key):
                config[key] = value
        try:
            described_family(config) or traced(config)
        except TruedepthError as error:
            raise TruedepthError(
                f"{self.path} ({whole.model_type}) takes input other than text, and its language"
                f" model ({text.model_type}) is not supported: {error}."
            ) from error
        if str(self.config["model_type"]).startswith(CONVERTED):
            config["model_type"] = f"{CONVERTED}{text.model_type}"
            config |= {key: self.config[key] for key in OURS if key in self.config}
        return config

    def tensors_inside(self) -> dict[str, LazyTensor]:
        """The tensors of the model of text, by its own names for them."""
        return {
            ours: tensor
            for name, tensor in self._tensors.items()
            if (ours := self._names[name]) is not None
        }

    def with_inside(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, LazyTensor],
        dtype: torch.dtype | None = None,
    ) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
        """The whole model with another model of text inside: config.json and tensors.

        Args:
            config: config.json of the model of text.
            tensors: Its tensors by name.
            dtype: Dtype of the tensors of the rest; default: as they are.
        """
        text = dict(self.config["text_config"])
        for key in config.keys() - set(OF_THE_WHOLE):
            if config[key] != self.inside.get(key):
                text[key] = config[key]
        if "dtype" in text or "torch_dtype" in text:
            text.pop("torch_dtype", None)
            text["dtype"] = config["dtype"]
        classes = modeling.auto_classes(self.model_type)
        whole = {key: value for key, value in self.config.items() if key != "torch_dtype"}
        whole |= {key: config[key] for key in (*OURS, "dtype") if key in config}
        whole["text_config"] = text
        whole["model_type"] = f"{CONVERTED}{self.model_type}"
        whole["architectures"] = [f"{modeling.PREFIX}{self.class_name}"]
        whole["auto_map"] = modeling.auto_map(classes)
        if config["tie_word_embeddings"] != self.inside["tie_word_embeddings"]:
            whole["tie_word_embeddings"] = config["tie_word_embeddings"]
        rest = {
            name: tensor if dtype is None else tensor.to(dtype)
            for name, tensor in self._tensors.items()
            if self._names[name] is None
        }
        theirs = {ours: name for name, ours in self._names.items() if ours is not None}
        return whole, rest | {theirs.get(n) or self._outer_name(n): t for n, t in tensors.items()}

    @cached_property
    def _whole_config(self) -> Any:
        """The original's config, an instance of transformers' class."""
        from transformers import AutoConfig

        if not self._has_a_class():
            text = self.config["text_config"].get("model_type")
            raise TruedepthError(
                f"{self.path} ({self.model_type}) takes input other than text, and transformers has"
                f" no class of its own for it; save its language model ({text}) as a checkpoint of"
                " its own and convert that."
            )
        config = {key: value for key, value in self.config.items() if key not in OURS}
        try:
            return AutoConfig.for_model(**copy.deepcopy(config | {"model_type": self.model_type}))
        except Exception as error:  # config classes raise exceptions of any type
            reason = reason_of(error)
            raise TruedepthError(
                f"transformers refuses the config of {self.path}: {reason}"
            ) from error

    def _has_a_class(self) -> bool:
        """Whether transformers has a class for it, which is not that of another type of model."""
        import transformers

        classes = modeling.auto_classes(self.model_type)
        if "AutoConfig" not in classes or not any(auto in classes for auto in HEADED):
            return False
        used = getattr(transformers, self.class_name).config_class
        return bool(used.__name__ == classes["AutoConfig"] and "text_config" in used.sub_configs)

    @cached_property
    def _model(self) -> Any:
        """The whole model, without weights."""
        import transformers

        try:
            with torch.device("meta"):
                return getattr(transformers, self.class_name)._from_config(self._whole_config)
        except Exception as error:  # model classes raise exceptions of any type
            reason = reason_of(error)
            raise TruedepthError(
                f"transformers cannot build the model of {self.path}: {reason}"
            ) from error

    @cached_property
    def _places(self) -> dict[str, str]:
        """Where decoder and head are in the model of text: where they are in the whole."""
        model, family = self._model, self._family
        names = {id(module): name for name, module in model.named_modules()}
        decoder, head = model.get_decoder().base_model, model.get_output_embeddings()
        if type(decoder).__name__ != family.classes[1] or id(head) not in names:
            raise TruedepthError(
                f"{self.path} ({self.model_type}) takes input other than text, and its language"
                f" model is not a {family.classes[1]} with a head."
            )
        body = family.layer.removesuffix("layers.{}.")
        return {body: f"{names[id(decoder)]}.", f"{family.outside[2]}.": f"{names[id(head)]}."}

    @property
    def _family(self) -> Family:
        inside = self.inside | {"model_type": self._whole_config.text_config.model_type}
        return described_family(inside) or traced(inside)

    @cached_property
    def _tensors(self) -> Mapping[str, LazyTensor]:
        return self.read_tensors()

    @cached_property
    def _names(self) -> dict[str, str | None]:
        """For each tensor of the files its name in the model of text; None if it is not in it."""
        return {name: self._inner_name(renamed(self._model, name)) for name in self._tensors}

    def _inner_name(self, name: str) -> str | None:
        for ours, theirs in self._places.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return None

    def _outer_name(self, name: str) -> str:
        for ours, theirs in self._places.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name


def outer_model(
    config: Mapping[str, Any], path: Path, read_tensors: Callable[[], Mapping[str, LazyTensor]]
) -> OuterModel | None:
    """The model of a config.json if it takes other input than text; None for a model of text.

    Args:
        config: The contents of config.json.
        path: The model's path, for messages.
        read_tensors: Gives its tensors by their names in the files.
    """
    if not isinstance(config.get("text_config"), dict):
        return None
    family = described_family({"model_type": unconverted(str(config.get("model_type")))})
    return None if family else OuterModel(config, path, read_tensors)
