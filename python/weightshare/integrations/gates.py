"""Table for :func:`weightshare.integrations.transformers.patch`: how each model's gate routes.

A row says in the terms of :func:`weightshare_kernels.route` what the ``forward`` of a family of
gates computes; options that a model configures are named by the attribute that holds them. All
these gates take hidden states and return ``(logits, weights, experts)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

ARGUMENT = "()"  # the bias comes with the call


@dataclass(frozen=True)
class Gate:
    """What one family of gates computes.

    Args:
        kinds: ``model.Class`` of each, as in ``transformers.models.<model>``; wildcards as in file
            names.
        score_fn: of ``route``.
        product: dtype of the logits: ``"float32"``, or that of the ``"input"``.
        weights: dtype of the weights that go to the experts: ``"float32"``, that of the
            ``"logits"`` or that of the ``"input"``.
        logits: dtype in which the logits are returned: None (as they are) or ``"float32"``.
        bias: attribute that holds the balance bias; ``ARGUMENT`` if calls bring it.
        groups: attributes with the number of groups and of those that take part.
        normalize: whether weights are divided by their sum, or the attribute that says so.
        scale: factor of the weights, or the attribute that says so.
        where: attributes and the values that they must have for this row to be true.
    """

    kinds: tuple[str, ...]
    score_fn: str
    product: str = "float32"
    weights: str = "float32"
    logits: str | None = None
    bias: str | None = None
    groups: tuple[str, str] | None = None
    normalize: bool | str = True
    scale: float | str = 1.0
    where: tuple[tuple[str, Any], ...] = ()

    def matches(self, module: nn.Module) -> bool:
        """Whether this row tells what the module computes.

        The class that defines its ``forward`` counts, so that a subclass with another one does not
        match; nor does a module that lacks an attribute the row names (of another version).
        """
        owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
        name = f"{owner.__module__}.{owner.__qualname__}"
        if not any(
            fnmatchcase(name, "transformers.models.{}.*.{}".format(*kind.split(".")))
            for kind in self.kinds
        ):
            return False
        return all(hasattr(module, name) for name in self._attributes()) and all(
            getattr(module, name, None) == value for name, value in self.where
        )

    def _attributes(self) -> Iterator[str]:
        yield from ("weight", "top_k", *(self.groups or ()))
        for option in (self.bias, self.normalize, self.scale):
            if isinstance(option, str) and option != ARGUMENT:
                yield option


def gate_of(module: nn.Module) -> Gate | None:
    """The row that tells what a module computes, if there is one."""
    return next((row for row in GATES if row.matches(module)), None)


GATES = (
    # Sigmoid scores, a bias for the choice, limited to the groups whose two best sum highest.
    Gate(
        (
            "axk1.AXK1TopkRouter",
            "bailing_hybrid.BailingHybridTopkRouter",
            "deepseek_v3.DeepseekV3TopkRouter",
            "deepseek_v32.DeepseekV32TopkRouter",
            "dots1.Dots1TopkRouter",
            "dots3_note.Dots3NoteTextTopkRouter",
            "exaone_moe.ExaoneMoeTopkRouter",
            "glm4_moe.Glm4MoeTopkRouter",
            "glm4_moe_lite.Glm4MoeLiteTopkRouter",
            "glm4v_moe.Glm4vMoeTextTopkRouter",
            "glm5_next.Glm5NextTextTopkRouter",
            "glm_moe_dsa.GlmMoeDsaTopkRouter",
            "hy_v4.HYV4TopkRouter",
            "kimi_linear.KimiLinearTopkRouter",
            "mimo_v2_flash.MiMoV2FlashTopkRouter",
            "nemotron_h.NemotronHTopkRouter",
            "solar_open.SolarOpenTopkRouter",
        ),
        "sigmoid",
        bias="e_score_correction_bias",
        groups=("num_group", "topk_group"),
        normalize="norm_topk_prob",
        scale="routed_scaling_factor",
    ),
    # Softmax over all experts; the model says whether weights are normalised.
    Gate(
        (
            "flex_olmo.FlexOlmoTopKRouter",
            "mellum.MellumTopKRouter",
            "olmoe.OlmoeTopKRouter",
            "qwen2_moe.Qwen2MoeTopKRouter",
            "qwen3_moe.Qwen3MoeTopKRouter",
            "qwen3_next.Qwen3NextTopKRouter",
            "qwen3_omni_moe.Qwen3OmniMoeThinkerTextTopKRouter",
            "qwen3_omni_moe.Qwen3OmniMoeTalkerTextTopKRouter",
            "qwen4_exp.Qwen4ExpTextTopKRouter",
        ),
        "softmax",
        product="input",
        weights="logits",
        normalize="norm_topk_prob",
    ),
    # The same, always normalised.
    Gate(
        (
            "qwen3_5_moe.Qwen3_5MoeTopKRouter",
            "qwen3_omni_moe.Qwen3OmniMoeTextTopKRouter",
            "qwen3_vl_moe.Qwen3VLMoeTextTopKRouter",
        ),
        "softmax",
        product="input",
        weights="logits",
    ),
    Gate(
        ("minimax.MiniMaxTopKRouter", "mixtral.MixtralTopKRouter"),
        "softmax",
        product="input",
    ),
    # A softmax over the chosen logits is one over all of them, normalised.
    Gate(
        ("granitemoe*.GraniteMoe*TopKRouter",),
        "softmax",
        product="input",
        weights="input",
        logits="float32",
    ),
    Gate(
        ("jamba.JambaTopKRouter",),
        "softmax",
        product="input",
        weights="input",
        normalize=False,
    ),
    Gate(
        ("deepseek_v2.DeepseekV2TopkRouter", "*ocr*.*TextTopkRouter"),
        "softmax",
        normalize=False,
        scale="routed_scaling_factor",
        where=(("topk_method", "greedy"),),  # its groups are ranked by their best expert alone
    ),
    # Sigmoid scores without groups; the block owns the bias and passes it.
    Gate(
        ("hy_v3.HYV3TopKRouter", "dots3_note.Dots3NoteVisionTopKRouter"),
        "sigmoid",
        bias=ARGUMENT,
        scale="router_scaling_factor",
    ),
    Gate(
        ("minimax_m2.MiniMaxM2TopKRouter",),
        "sigmoid",
        product="weight",
        bias=ARGUMENT,
    ),
    Gate(
        ("flint.FlintTopKRouter",),
        "sigmoid",
        normalize="norm_topk_prob",
    ),
)
