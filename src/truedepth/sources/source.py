"""What every opener gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truedepth.families import Family, family_of
from truedepth.tensors import LazyTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Source:
    """A model that can be read: config, tensors, tokenizer."""

    name: str
    """Hub id, or the name of the directory or file."""

    origin: str
    """Where it was found, for the reader: `directory`, `Hugging Face hub`, …"""

    path: Path
    """The directory or file."""

    config: dict[str, Any]
    """config.json, under transformers' names."""

    read_tensors: Callable[[], Mapping[str, LazyTensor]] = field(repr=False)
    """Opens the weights; called at most once, through `tensors`."""

    save_companions: Callable[[Path], None] = field(repr=False)
    """Writes everything but config and weights (tokenizer, generation config) to a directory."""

    load_tokenizer: Callable[[], PreTrainedTokenizerBase] = field(repr=False)
    """Loads the tokenizer; called at most once, through `tokenizer`."""

    quantization: str | None = None
    """How the weights were quantized, if they were: they are dequantized when they are read."""

    @cached_property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """Every tensor by the name that transformers gives it, in the order of the file."""
        return self.read_tensors()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as transformers loads it."""
        return self.load_tokenizer()

    @cached_property
    def family(self) -> Family:
        """The model's family; raises TruedepthError where it is not supported."""
        return family_of(self.config, str(self.path))

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config["num_hidden_layers"])
