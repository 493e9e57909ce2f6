"""Exchange of an adapter while its model stays as it is."""

from __future__ import annotations

import os
from typing import cast

import torch
from peft import PeftModel

from weightshare.lora.tuner import files
from weightshare.lora.tuner.checks import PARTS, check_tensors
from weightshare.lora.tuner.layer import MoSLayer
from weightshare.lora.tuner.model import MoSModel, is_ours
from weightshare.lora.tuner.register import MoSConfig


@torch.no_grad()
def swap_adapter(model: PeftModel, adapter_name: str, folder: str | os.PathLike) -> None:
    """Load another adapter in the place of one, into the same memory: pools and index tables.

    No module and no parameter is made or replaced: optimizers and compiled graphs stay valid, and
    so do captured CUDA graphs where alpha / r is the same. All is checked before anything is
    written. The new adapter must have the shapes of the old one (r, equivalent rank, shards,
    target modules); for any other use ``load_adapter`` and ``delete_adapter``.

    Args:
        model: from ``get_peft_model`` with a :class:`weightshare.lora.MoSConfig`.
        adapter_name: the adapter that is replaced; it keeps this name.
        folder: what ``save_pretrained`` wrote.

    Raises:
        ValueError: there is no such adapter, it is merged, or the new one has another shape.
    """
    tuner = model.base_model
    if not isinstance(tuner, MoSModel) or adapter_name not in tuner.mos_pools:
        raise ValueError(f"there is no MoS adapter {adapter_name!r} in this model to replace")
    layers = [module for module in model.modules() if isinstance(module, MoSLayer)]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"{adapter_name!r} is merged; call unmerge_adapter() first")
    fields, tensors = files.load_adapter(folder)
    if fields.get("peft_type") != "MOS":
        raise ValueError(f"{folder} holds an adapter of type {fields.get('peft_type')}, not MOS")
    config, old = (
        MoSConfig.from_peft_type(**fields),
        cast(MoSConfig, model.peft_config[adapter_name]),
    )
    config.check_base(old.found or {})
    if config.modules_to_save or old.modules_to_save:
        raise ValueError("adapters with modules_to_save cannot be swapped; use load_adapter")
    pools = tuner.pools_of(adapter_name)
    check_tensors({key: value for key, value in tensors.items() if is_ours(key)}, pools)
    for kind, pool in pools.items():
        for part in PARTS:
            getattr(pool, part).copy_(tensors[f"{kind}.{part}"])
    for layer in layers:
        if adapter_name in layer.mos_scale:
            layer.mos_scale[adapter_name] = config.alpha / config.r
            layer.set_dropout(adapter_name, config.dropout)
    config.inference_mode = old.inference_mode
    model.peft_config[adapter_name] = config
