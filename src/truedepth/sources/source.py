"""What every opener returns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from truedepth.errors import TruedepthError, reason_of
from truedepth.families.family import Family
from truedepth.families.lookup import family_of, quantization_of
from truedepth.sources.dtypes import check_dtypes
from truedepth.sources.limits import check_config
from truedepth.sources.names import current_names
from truedepth.sources.outer import OuterModel
from truedepth.sources.stamps import Stamps
from truedepth.tensors import LazyTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Source:
    """A model that can be read: config, tensors, tokenizer.

    Openers pass tensors, tokenizer and generation config as functions; read them through the
    properties, which call each function at most once.
    """

    name: str
    """Hub id, or the name of the directory or file."""

    origin: str
    """Where it was found, for the reader: `directory`, `Hugging Face hub`, …"""

    path: Path
    """The directory or file."""

    config: dict[str, Any]
    """config.json, under transformers' names."""

    read_tensors: Callable[[], Mapping[str, LazyTensor]] = field(repr=False)
    load_tokenizer: Callable[[], PreTrainedTokenizerBase] = field(repr=False)

    save_companions: Callable[[Path], None] = field(repr=False)
    """Writes what is neither config nor weights (tokenizer, generation config) to a directory."""

    check_companions: Callable[[], None] = field(default=lambda: None, repr=False)
    """Raises TruedepthError if that could not be done; to be called before any long work."""

    read_generation_config: Callable[[], Mapping[str, Any]] = field(default=dict, repr=False)
    stamps: Stamps = field(default_factory=Stamps, repr=False, compare=False)
    """Stamps of the files that were opened."""

    quantization: str | None = None
    """The quantization types of the weights, if any: they are dequantized when read."""

    outer: OuterModel | None = field(default=None, repr=False, compare=False)
    """The model that takes other input than text, if config and tensors are of one inside it."""

    def __post_init__(self) -> None:
        check_config(self.config, self.path)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config["num_hidden_layers"])

    def check_plain(self, why: str) -> None:
        """Refuse weights that are quantized.

        Args:
            why: Why they must not be, such as `which cannot be folded exactly`.

        Raises:
            TruedepthError: config.json says that they are.
        """
        if method := quantization_of(self.config):
            raise TruedepthError(
                f"{self.path} holds quantized weights ({method}), {why}; use the unquantized model"
                " and quantize the result. A plan of stages, such as [F14 A15], leaves weights as"
                " they are."
            )

    @cached_property
    def family(self) -> Family:
        """The model's family; raises TruedepthError if it is not supported."""
        return family_of(self.config, str(self.path))

    @cached_property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """Every tensor by the name that transformers gives it, in the file's order.

        A hub model's weights are downloaded now. Raises TruedepthError if a file is broken, or its
        weights are quantized in a way that config.json does not name.
        """
        tensors = current_names(self.read_tensors(), self.config, self.path)
        check_dtypes(tensors, self.config, self.path)
        return tensors

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json, or what a GGUF file says in its place; empty if there is none.

        Raises TruedepthError if the file is broken.
        """
        return self.read_generation_config()

    def check_unchanged(self) -> None:
        """Raise TruedepthError if a file has changed since it was opened."""
        self.stamps.check()

    @property
    def label(self) -> str:
        """The model's name and where it was found, for the reader."""
        return f"{self.name} ({self.origin})"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the config and all tensors: 16 hex digits. Reads all weights.

        Special tokens are left out: they change no output.
        """
        config = {key: value for key, value in self.config.items() if key not in SPECIAL_TOKENS}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
            for block in tensor.blocks(1 << 22):
                digest.update(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; raises TruedepthError if there is none that can be loaded."""
        try:
            return self.load_tokenizer()
        except TruedepthError:
            raise
        except Exception as error:  # tokenizers of every kind raise errors of every kind
            raise TruedepthError(
                f"transformers cannot load the tokenizer of {self.path}: {reason_of(error)}"
            ) from error
