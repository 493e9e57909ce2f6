"""Configuration of Mixture of Shards as an adapter of PEFT."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from weightshare.lora.plan import check_ranks
from weightshare.lora.tuner import files

NAME = "MOS"


def _extend() -> None:
    """Add the type to PEFT's enumeration, which Python closes after its definition."""
    member = str.__new__(PeftType, NAME)
    fields = {"_name_": NAME, "_value_": NAME, "__objclass__": PeftType}
    for name, value in {**fields, "_sort_order_": len(PeftType.__members__)}.items():
        setattr(member, name, value)
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member


if NAME not in PeftType.__members__:
    _extend()


@dataclass
class MoSConfig(PeftConfig):
    """Mixture of Shards for ``peft.get_peft_model``: LoRA of rank r at the cost of rank e.

    The modules of one projection type (the last part of their names, as ``q_proj``) share a pool
    of A shards and a pool of B shards, with ``equivalent_rank * layers * (d_in + d_out)``
    parameters; see :class:`weightshare.lora.ShardPlan`. They must be of one shape.

    Importing this class makes PEFT know the method: ``PeftModel.from_pretrained`` needs it, too.

    Args:
        r: rank of every module's matrices.
        equivalent_rank: e, the rank of the plain LoRA that has as many parameters.
        private_rank: p of the r ranks that a module does not share.
        shards: l, pieces of each vector; divides the widths of all target modules.
        alpha: strength of the update, divided by r (not by e).
        dropout: share of the inputs of the update that are dropped in training.
        seed: of the index tables, which are saved with the adapter.
        dissociate: whether A and B are drawn apart.
        target_modules: names, endings of names, a regular expression or ``"all-linear"``, as in
            ``peft.LoraConfig``. None: what PEFT adapts in this kind of model.
        exclude_modules: modules to leave out, likewise.
        layers_to_transform: numbers of the layers to adapt; None for all.
        layers_pattern: name of the list of layers that these numbers count.
        modules_to_save: modules that are trained and saved whole.
        layers: of a loaded adapter, the base model it was made for: ``{type: [layers, d_in,
            d_out]}``. Set it to None to use a loaded configuration for another model.

    Raises:
        TypeError: a size is not an integer.
        ValueError: sizes do not fit together; the message names the constraint and the numbers.

    Source: MoS (Wang et al., ICLR 2025, arXiv 2410.00938).

    Example::

        config = MoSConfig(
            r=16, equivalent_rank=2, private_rank=1, shards=4, target_modules=["q_proj", "v_proj"]
        )
        model = peft.get_peft_model(model, config)
    """

    r: int = 16
    equivalent_rank: int = 2
    private_rank: int = 1
    shards: int = 4
    alpha: float = 16.0
    dropout: float = 0.1
    seed: int = 0
    dissociate: bool = True
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers: dict[str, list[int]] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        check_ranks(self.r, self.equivalent_rank, self.private_rank, self.shards)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be a finite number, got {self.alpha}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: which layers to adapt")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        # What the model has that this configuration is used with; no field beside ``layers``, so
        # that one configuration serves several models until it is saved with one.
        self.found: dict[str, list[int]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        whole = super().to_dict()
        whole["layers"] = self.found or self.layers
        return {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in whole.items()
        }

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write ``adapter_config.json``; a crash leaves the old file or the new one."""
        whole = self.to_dict()
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        if auto_mapping is not None:
            whole["auto_mapping"] = auto_mapping
        files.write_config(save_directory, whole)

    def check_base(self, found: dict[str, list[int]]) -> None:
        """Remember the modules of the model at hand, which must be those of a loaded adapter.

        Raises:
            ValueError: the adapter was made for another base model.
        """
        if self.layers is not None and {k: list(v) for k, v in self.layers.items()} != found:
            name = self.base_model_name_or_path
            raise ValueError(
                f"this adapter was made for another base model{f' ({name})' if name else ''}: it "
                f"adapts {_described(self.layers)}, but this model has {_described(found)}"
            )
        self.found = found


def _described(layers: dict[str, list[int]]) -> str:
    return ", ".join(
        f"{kind}: {count} of {d_in} -> {d_out}"
        for kind, (count, d_in, d_out) in sorted(layers.items())
    )
