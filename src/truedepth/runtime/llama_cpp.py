"""Runs GGUF files in llama.cpp, through its C interface, as models that transformers can drive."""

from __future__ import annotations

import ctypes
import json
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from truedepth.errors import TruedepthError
from truedepth.runtime.empty import transformers_config
from truedepth.runtime.generation_config import as_written
from truedepth.sources.gguf.layout import GENERATION_CONFIG
from truedepth.sources.source import Source

BATCH = 512
"""Most tokens in one call of llama.cpp."""

ERROR = 4
"""llama.cpp's log level for errors."""


def library() -> Any:
    """Import the package `llama_cpp` and silence its log.

    Raises:
        TruedepthError: The package is not installed, or its library does not load.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: its library is broken
        raise TruedepthError(
            "This needs llama.cpp: pip install 'truedepth[gguf]' (this compiles it, which needs a"
            f" C++ compiler and takes minutes). {error}."
        ) from error
    llama_cpp.llama_log_set(_listen(llama_cpp), ctypes.c_void_p(0))
    return llama_cpp


_messages: list[str] = []
_listener: Any = None


def _listen(llama_cpp: Any) -> Any:
    """Make a log callback that keeps errors only; llama.cpp would print every message."""
    global _listener  # C code keeps no reference to it
    if _listener is None:

        def heard(level: int, text: bytes, _: object) -> None:
            if level == ERROR:
                _messages.append(text.decode(errors="replace").strip())

        _listener = llama_cpp.llama_log_callback(heard)
    return _listener


def _failed(what: str) -> TruedepthError:
    said = f": {_messages[0].rstrip('.')}" if _messages else ""
    return TruedepthError(f"llama.cpp {what}{said}.", 1)


def quantize(whole: Path, out: Path, kind: str) -> None:
    """Quantize a GGUF file with llama.cpp's quantizer.

    Args:
        whole: A GGUF file with float32, float16 or bfloat16 tensors.
        out: The GGUF file to write.
        kind: A type that llama.cpp names, such as `q4_k_m`.

    Raises:
        TruedepthError: llama.cpp is not installed, or the quantizer fails.
    """
    llama_cpp = library()
    _messages.clear()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    options.nthread = torch.get_num_threads()
    if llama_cpp.llama_model_quantize(os.fsencode(whole), os.fsencode(out), ctypes.byref(options)):
        raise _failed(f"cannot quantize to {kind}")


class Context:
    """A GGUF file loaded in llama.cpp, with a KV cache."""

    def __init__(self, path: Path, *, device: str = "cpu", exact: bool = True) -> None:
        """Load the file.

        Args:
            path: The GGUF file.
            device: `cpu`, or `cuda` to put all layers on GPUs if llama.cpp was built for them.
            exact: Keep the KV cache in float32 and turn off flash attention, which would round
                keys and values to float16. False: llama.cpp's defaults for both.

        Raises:
            TruedepthError: llama.cpp is not installed, or cannot load the file.
        """
        self._lib, self._exact = library(), exact
        self._context: Any = None
        self._free: Callable[[], object] = lambda: None
        _messages.clear()
        options = self._lib.llama_model_default_params()
        options.n_gpu_layers = 0 if device == "cpu" else 1 << 20
        self._model = self._lib.llama_model_load_from_file(os.fsencode(path), options)
        if not self._model:
            raise _failed(f"cannot load {path}")
        vocabulary = self._lib.llama_model_get_vocab(self._model)
        self.vocabulary = int(self._lib.llama_vocab_n_tokens(vocabulary))
        self._batch = self._lib.llama_batch_init(BATCH, 0, 1)
        weakref.finalize(self, self._lib.llama_model_free, self._model)
        weakref.finalize(self, self._lib.llama_batch_free, self._batch)
        self._capacity = 0
        self.held: list[int] = []
        """Token ids in the KV cache."""

    def run(self, tokens: Sequence[int], kept: int) -> Tensor:
        """Compute the logits of the last `kept` tokens of a text.

        The beginning that the text shares with the KV cache is not computed again.

        Returns:
            `[kept, vocabulary]` float32.

        Raises:
            TruedepthError: llama.cpp fails, for example for lack of memory.
        """
        self.room(len(tokens))
        first = len(tokens) - kept
        shared = 0
        while shared < min(first, len(self.held)) and self.held[shared] == tokens[shared]:
            shared += 1
        self.forget(shared)
        found = []
        for start in range(shared, len(tokens), BATCH):
            piece = tokens[start : start + BATCH]
            self.decode(piece, max(first - start, 0))
            if (outputs := start + len(piece) - max(first, start)) > 0:
                found.append(self.logits(outputs))
        return torch.cat(found)

    def logits(self, outputs: int) -> Tensor:
        """All logits of the last `decode`, `[outputs, vocabulary]` float32.

        Args:
            outputs: Number of tokens that `decode` computed logits for.
        """
        held = self._lib.llama_get_logits(self._context)
        whole = ctypes.POINTER(ctypes.c_float * (outputs * self.vocabulary))
        found = torch.frombuffer(ctypes.cast(held, whole).contents, dtype=torch.float32)
        return found.view(outputs, self.vocabulary).clone()

    def forget(self, kept: int = 0) -> None:
        """Drop all but the first `kept` tokens from the KV cache."""
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), 0, kept, -1)
        del self.held[kept:]

    def decode(self, tokens: Sequence[int], quiet: int = 0) -> None:
        """Run at most `BATCH` tokens and append them to the KV cache, which must have room.

        Args:
            tokens: The token ids.
            quiet: Number of tokens at the start for which no logits are computed.

        Raises:
            TruedepthError: llama.cpp fails.
        """
        batch, start = self._batch, len(self.held)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index >= quiet
        _messages.clear()
        if self._lib.llama_decode(self._context, batch):
            raise _failed(f"cannot run {len(tokens)} tokens")
        self.held += tokens

    def metadata(self, key: str) -> str | None:
        """A metadata value of the file, as text; None if the file lacks the key."""
        size = self._lib.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, size + 1)
        return buffer.value.decode()

    def room(self, tokens: int) -> None:
        """Make room for `tokens` tokens. If the KV cache has to grow, its contents are lost.

        Raises:
            TruedepthError: There is not enough memory.
        """
        if tokens <= self._capacity:
            return
        self._free()
        self._capacity = 0
        options = self._lib.llama_context_default_params()
        capacity = 1 << max(8, (tokens - 1).bit_length())
        options.n_ctx = capacity
        options.n_batch = options.n_ubatch = BATCH
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        if self._exact:
            options.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            options.type_k = options.type_v = self._lib.GGML_TYPE_F32
        _messages.clear()
        self._context, self.held = self._lib.llama_init_from_model(self._model, options), []
        if not self._context:
            self._free = lambda: None
            raise _failed(f"has no memory for {capacity} tokens")
        # Registered after the model's finalizer, and so called before it.
        self._free = weakref.finalize(self, self._lib.llama_free, self._context)
        self._capacity = capacity


class LlamaCppForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A GGUF file in llama.cpp, called like a model of transformers. It cannot be trained.

    It keeps llama.cpp's own KV cache, so that a text that continues the last one is not computed
    again from its start, and takes no cache of transformers.
    """

    main_input_name = "input_ids"
    _is_stateful = True  # tells transformers that it cannot rewind this model's cache

    def __init__(self, config: Any, context: Context) -> None:
        """Wrap a file in llama.cpp; `config` is transformers' config of the same model."""
        super().__init__(config)
        self.context = context

    @property
    def device(self) -> torch.device:
        """The device of the logits: the CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return torch.float32

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutput:
        """Compute the logits of the last `logits_to_keep` tokens of every text.

        Args:
            input_ids: `[batch, length]` int64.
            attention_mask: `[batch, length]`; 0 marks padding, at either end.
            logits_to_keep: Number of positions; 0 for all.

        Returns:
            Logits `[batch, positions, vocabulary]` float32; zeros at padding.
        """
        batch, length = input_ids.shape
        kept = logits_to_keep or length
        logits = torch.zeros(batch, kept, self.context.vocabulary)
        for row, ids in enumerate(input_ids):
            real = torch.arange(length)
            if attention_mask is not None:
                real = attention_mask[row].nonzero()[:, 0].cpu()
            wanted = real[real >= length - kept]
            if len(wanted):
                found = self.context.run(ids[real].tolist(), len(wanted))
                logits[row, wanted - (length - kept)] = found
        return CausalLMOutput(logits=logits)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> dict[str, Any]:
        """Pass the whole text at every step; `Context.run` skips what its cache holds."""
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "logits_to_keep": logits_to_keep,
        }


def load_llama_cpp(source: Source, device: torch.device) -> LlamaCppForCausalLM:
    """Load a GGUF file in llama.cpp, with a KV cache in float32.

    Raises:
        TruedepthError: llama.cpp is not installed, or cannot load the file.
    """
    config = transformers_config(source.config, source.path)
    model = LlamaCppForCausalLM(config, Context(source.path, device=device.type))
    if defaults := model.context.metadata(GENERATION_CONFIG):
        model.generation_config = as_written(_settings(defaults, source))
    model.eval()
    return model


def _settings(defaults: str, source: Source) -> dict[str, Any]:
    try:
        settings = json.loads(defaults)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise TruedepthError(f"{GENERATION_CONFIG} in {source.path} is not a JSON object.")
    return settings
