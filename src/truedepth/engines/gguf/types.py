"""Types that the matrices of a GGUF file can have."""

from __future__ import annotations

from enum import StrEnum

from truedepth.errors import TruedepthError


class MatrixType(StrEnum):
    """By llama.cpp's names; `auto` is the checkpoint's own."""

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
        """By its name, in small or capital letters.

        Raises:
            TruedepthError: There is no such type.
        """
        try:
            return cls(name.lower())
        except ValueError:
            raise TruedepthError(
                f"There is no type {name!r}; there are {', '.join(cls)}."
            ) from None

    @property
    def needs_llama_cpp(self) -> bool:
        """Whether only llama.cpp's own quantizer makes it."""
        return "_k" in self.value or self.value.startswith("iq")

    @property
    def quantized(self) -> bool:
        """Whether its values share scales."""
        return "q" in self.value

    @property
    def balanced(self) -> bool:
        """Whether weights are balanced before. llama.cpp's own quantizer weighs columns itself, and
        gains nothing by it.
        """
        return self.quantized and not self.needs_llama_cpp
