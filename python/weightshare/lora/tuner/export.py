"""Adapters of Mixture of Shards as plain LoRA, without loss."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from weightshare.lora.tuner import files
from weightshare.lora.tuner.layer import MoSLayer
from weightshare.lora.tuner.model import is_ours


def export_lora(
    model: PeftModel, folder: str | os.PathLike, adapter_name: str | None = None
) -> None:
    """Write an adapter as LoRA of rank r, which PEFT, vLLM and others load.

    A and B of every module are put together, nothing is approximated: the exported adapter gives
    what this one gives. It has ``r / equivalent_rank`` times the parameters.

    Args:
        model: from ``get_peft_model`` with a :class:`weightshare.lora.MoSConfig`.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` are written; each is
            whole or not there.
        adapter_name: which adapter; None for the active one.

    Raises:
        ValueError: there is no such adapter, or several are active.
    """
    if adapter_name is None:
        active = model.active_adapters
        if len(active) != 1:
            raise ValueError(f"adapter_name: which of the active adapters {active}?")
        adapter_name = active[0]
    config: Any = model.peft_config.get(adapter_name)
    if config is None:
        raise ValueError(
            f"adapter_name: there is no {adapter_name!r}, only {sorted(model.peft_config)}"
        )
    whole = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {key: value for key, value in whole.items() if not is_ours(key)}
    adapted, others, transposed = [], [], False
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, MoSLayer) and adapter_name in module.mos_pools:
            adapted.append(name)
            tensors |= _matrices(f"base_model.model.{name}", module, adapter_name)
            transposed = transposed or module.transposed
        else:
            others.append(name)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        lora_dropout=config.dropout,
        target_modules=_targets(adapted, others),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in lora.to_dict().items()}
    files.save_adapter(folder, plain, tensors)


@torch.no_grad()
def _matrices(name: str, layer: MoSLayer, adapter: str) -> dict[str, Tensor]:
    a, b = layer.pool_of(adapter).matrices(layer.mos_layer[adapter])
    return {f"{name}.lora_A.weight": a.contiguous(), f"{name}.lora_B.weight": b.contiguous()}


def _targets(adapted: list[str], others: list[str]) -> list[str]:
    """The ends of the names, as vLLM wants them, where they tell what is adapted; or the names."""
    ends = sorted({name.rpartition(".")[2] for name in adapted})
    if any(name == end or name.endswith(f".{end}") for name in others for end in ends):
        return adapted
    return ends
