"""Makes PEFT know Mixture of Shards, for as long as the process runs."""

from __future__ import annotations

from peft import peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method

from weightshare.lora.tuner import files
from weightshare.lora.tuner.config import NAME, MoSConfig
from weightshare.lora.tuner.model import MoSModel

__all__ = ["MoSConfig", "MoSModel", "register"]


def register() -> None:
    """Add the type to PEFT's tables, and make its adapters' files be written whole; once is enough.

    Raises:
        RuntimeError: another library has taken the name.
    """
    kind = PeftType[NAME]
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if known is None:
        register_peft_method(
            name=NAME.lower(), config_cls=MoSConfig, model_cls=MoSModel, prefix=MoSModel.prefix
        )
    elif known.__module__ != MoSConfig.__module__:
        raise RuntimeError(f"PEFT knows a {NAME} of {known.__module__} already; use one of the two")
    else:  # this module was imported anew
        PEFT_TYPE_TO_CONFIG_MAPPING[kind] = MoSConfig
        PEFT_TYPE_TO_TUNER_MAPPING[kind] = MoSModel
    if not hasattr(peft_model.safe_save_file, "whole"):
        peft_model.safe_save_file = _whole(peft_model.safe_save_file)


def _whole(save_file):
    """PEFT's writer of safetensors, but for pools, which replace an old file in one step."""

    def save(tensors, filename, metadata=None):
        if any(name.endswith(".a_index") for name in tensors):
            files.write_tensors(filename, tensors)
        else:
            save_file(tensors, filename, metadata)

    save.whole = save_file  # type: ignore[attr-defined]
    return save


register()
