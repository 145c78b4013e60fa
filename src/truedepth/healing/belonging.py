"""Whether a checkpoint was made from a model: what is trained toward another one is spoilt."""

from __future__ import annotations

import torch

from truedepth.errors import TruedepthError
from truedepth.healing.options import Train
from truedepth.plan.config import plan_of
from truedepth.sources.source import Source
from truedepth.widening.layout import Layout


def check_belong(source: Source, original: Source) -> None:
    """Check that a checkpoint can be healed toward a model.

    Raises:
        TruedepthError: It cannot, or was made from another model.
    """
    plan = plan_of(source.config)
    if plan is None:
        raise TruedepthError(
            f"{source.path} is not a checkpoint that truedepth has made; convert a model first."
        )
    if source.path.is_file():
        raise TruedepthError(
            f"{source.path} is a GGUF file; heal the checkpoint it was exported from."
        )
    if Layout.of(source).is_original:
        raise TruedepthError(
            f"{source.path} computes what its original does: there is nothing to heal."
        )
    if plan_of(original.config) is not None or original.num_layers != plan.num_layers:
        raise TruedepthError(
            f"{original.name} is not the original of {source.path}, which was made from a model of"
            f" {plan.num_layers} layers."
        )
    for name in ("vocab_size", "hidden_size"):
        if original.config[name] != source.config[name]:
            raise TruedepthError(
                f"{original.name} is not the original of {source.path}: {name} differs,"
                f" {original.config[name]} and {source.config[name]}."
            )
    _check_weights(source, original)
    source.check_companions()


def _check_weights(source: Source, original: Source) -> None:
    """Compare embedding, head and last norm, which only training of all weights changes.

    Models of one shape have the same config: a chat model and what it was tuned from.
    """
    healed = (source.config.get("truedepth") or {}).get("healing")
    if healed and healed["options"]["train"] == Train.all:
        return
    for name, tensor in source.tensors.items():
        theirs = original.tensors.get(name)
        if theirs is None or original.family.split(name)[0] is not None:
            continue
        ours = tensor.read()
        if not torch.equal(ours, theirs.read().to(ours.dtype)):
            raise TruedepthError(
                f"{original.name} is not the original of {source.path}: it has the same shape, and"
                f" another {name}. Give the model that was converted."
            )
