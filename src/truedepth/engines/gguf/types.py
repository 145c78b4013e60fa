"""Tensor types for the matrices of a GGUF file."""

from __future__ import annotations

from enum import StrEnum

from truedepth.errors import TruedepthError


class MatrixType(StrEnum):
    """A type by llama.cpp's name; `auto` is the type that holds the checkpoint's values exactly."""

    auto = "auto"
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q5_1 = "q5_1"
    q5_0 = "q5_0"
    q4_1 = "q4_1"
    q4_0 = "q4_0"
    q6_k = "q6_k"
    q5_k_m = "q5_k_m"
    q5_k_s = "q5_k_s"
    q4_k_m = "q4_k_m"
    q4_k_s = "q4_k_s"
    q3_k_l = "q3_k_l"
    q3_k_m = "q3_k_m"
    q3_k_s = "q3_k_s"
    q2_k = "q2_k"
    iq4_nl = "iq4_nl"
    iq4_xs = "iq4_xs"

    @classmethod
    def of(cls, name: str) -> MatrixType:
        """Find a type by its name; case does not matter.

        Raises:
            TruedepthError: The name is unknown.
        """
        try:
            return cls(name.lower())
        except ValueError:
            raise TruedepthError(f"{name!r} is not a type; choose from {', '.join(cls)}.") from None

    @property
    def needs_llama_cpp(self) -> bool:
        """Whether only llama.cpp's own quantizer writes this type."""
        return "_k" in self.value or self.value.startswith("iq")

    @property
    def quantized(self) -> bool:
        """Whether blocks of values share a scale."""
        return "q" in self.value

    @property
    def balanced(self) -> bool:
        """Whether weights are balanced before they are quantized.

        llama.cpp's own quantizer weights columns itself and gains nothing from balancing.
        """
        return self.quantized and not self.needs_llama_cpp
