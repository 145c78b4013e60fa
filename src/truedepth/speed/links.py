"""The time of an all-reduce on common links, for machines where it cannot be measured."""

from __future__ import annotations

from dataclasses import dataclass

from truedepth.errors import TruedepthError


@dataclass(frozen=True)
class Link:
    """A link between ranks; an all-reduce over N ranks is a ring of 2(N - 1) steps."""

    name: str
    base: float
    """Seconds of every all-reduce, whatever its size and the number of ranks."""

    step: float
    """Seconds that every step of the ring adds."""

    bandwidth: float
    """Bytes per second in one direction."""

    source: str
    """Where these figures come from."""

    def all_reduce(self, size: int, ranks: int) -> float:
        """Seconds of an all-reduce of `size` bytes over `ranks` ranks."""
        steps = 2 * (ranks - 1)
        return self.base + steps * (self.step + size / ranks / self.bandwidth)


_NCCL = "NCCL's own model of a ring with its low-latency protocol, src/graph/tuning.cc"
_V100 = "github.com/haohervchb/sglang-V100/pull/2"
_GLOO = "263 µs for small messages over 4 hosts by TCP, gloo's README"

LINKS = {
    link.name: link
    for link in (
        Link(
            "nvlink-custom",
            4e-6,
            0.0,
            65e9,
            "3.7 to 5.9 µs for 0.5 to 4 kB on 2 to 8 H100, 20 to 34 µs for 1 MB,"
            " github.com/sgl-project/sglang/pull/2904",
        ),
        Link(
            "nvlink-nccl",
            19e-6,
            0.0,
            250e9,
            "19 µs for 1 kB and 136 µs for 16 MB on 8 H100,"
            " github.com/ByteDance-Seed/Triton-distributed/issues/57",
        ),
        # Two H100s take 6 µs with CUDA graphs: github.com/NVIDIA/nccl/issues/1259
        Link("nvlink", 6.6e-6, 0.6e-6, 450e9, f"{_NCCL}; NVLink 4"),
        Link(
            "pcie-oneshot",
            3e-6,
            0.0,
            4.7e9,
            f"5 µs for 8 kB and 45 µs for 128 kB on 4 V100 behind one switch, {_V100}",
        ),
        Link(
            "pcie-switch",
            20e-6,
            0.0,
            9.1e9,
            f"NCCL takes 20 µs for 8 kB and 84 µs for 384 kB on 4 V100 behind one switch, {_V100}",
        ),
        Link(
            "pcie-nccl",
            25e-6,
            0.0,
            0.36e9,
            "NCCL takes 45 µs for 4 kB and 344 µs for 64 kB on 8 RTX 6000D,"
            " github.com/sgl-project/sglang/pull/32479",
        ),
        Link(
            "pcie-host",
            34e-6,
            0.0,
            1.9e9,
            "NCCL without peer access takes 39 µs for 10 kB and 10.9 ms for 20 MB on 2 RTX 5070 Ti,"
            " github.com/sgl-project/sglang/pull/39605",
        ),
        Link("pcie5", 6.6e-6, 1.0e-6, 63e9, f"{_NCCL}; PCIe 5.0 x16"),
        Link("pcie4", 6.6e-6, 1.0e-6, 31.5e9, f"{_NCCL}; PCIe 4.0 x16"),
        Link(
            "infiniband",
            6.6e-6,
            6.2e-6,
            25e9,
            "19 µs between two hosts on HDR, github.com/NVIDIA/nccl-tests/issues/150",
        ),
        Link("40gbe", 0.0, 44e-6, 5e9, _GLOO),
        Link("10gbe", 0.0, 44e-6, 1.25e9, f"{_GLOO}, for 40 Gb/s"),
    )
}


def parse_link(text: str, also: str = "") -> Link:
    """Read a link: a name of `LINKS`, or microseconds and GB/s, such as `30,12.5`.

    Args:
        text: What to read.
        also: What else the message names, which the caller takes besides links.

    Raises:
        TruedepthError: The text is neither.
    """
    if text in LINKS:
        return LINKS[text]
    try:
        latency, bandwidth = map(float, text.split(","))
    except ValueError:
        latency = bandwidth = 0.0
    if not (latency >= 0 and bandwidth > 0):
        raise TruedepthError(
            f"A link is one of {', '.join(LINKS)}, or the latency of an all-reduce in microseconds"
            f" and the bandwidth in GB/s, such as 30,12.5{also}; not {text!r}."
        )
    return Link(text, latency * 1e-6, 0.0, bandwidth * 1e9, "given")
