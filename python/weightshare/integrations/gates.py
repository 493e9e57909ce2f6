"""Table for :func:`weightshare.integrations.transformers.patch`: how each model's gate routes.

A row says in the terms of :func:`weightshare_kernels.route` what the ``forward`` of a family of
gates computes; options that a model configures are named by the attribute that holds them. All
these gates take hidden states and return ``(logits, weights, experts)``.

Gates have changed under the same names between versions of transformers (in 5.4 a gate returned
probabilities where 5.12 returns logits), so a row is tied to the source of the forward that it
describes. A gate with another source is left alone.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

ARGUMENT = "()"  # the bias comes with the call


@dataclass(frozen=True)
class Gate:
    """What one family of gates computes.

    Args:
        kinds: ``model.Class`` of each, as in ``transformers.models.<model>``.
        source: :func:`fingerprint` of their ``forward``.
        score_fn: of ``route``.
        product: dtype of the logits: ``"float32"``, or that of the ``"input"`` or ``"weight"``.
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
    source: str
    score_fn: str
    product: str = "float32"
    weights: str = "float32"
    logits: str | None = None
    bias: str | None = None
    groups: tuple[str, str] | None = None
    normalize: bool | str = True
    scale: float | str = 1.0
    where: tuple[tuple[str, Any], ...] = ()

    def names(self, module: nn.Module) -> bool:
        """Whether the module is of a kind of this row.

        The class that defines its ``forward`` counts: a subclass with another one is not.
        """
        owner = _owner(module)
        library, _, rest = owner.__module__.partition(".models.")
        name = f"{rest.partition('.')[0]}.{owner.__qualname__}"
        return library == "transformers" and name in self.kinds

    def doubt(self, module: nn.Module) -> str | None:
        """Why this row may not tell what a module of its kinds computes; None if it does."""
        attributes = [name for name in self._attributes() if not hasattr(module, name)]
        if attributes or fingerprint(vars(_owner(module))["forward"]) != self.source:
            return "is a gate of this name in another version, with other code"
        for name, value in self.where:
            if getattr(module, name, None) != value:
                return f"routes by {name}={getattr(module, name, None)!r}, which `route` does not"
        return None

    def _attributes(self) -> Iterator[str]:
        yield from ("weight", "top_k", *(self.groups or ()))
        for option in (self.bias, self.normalize, self.scale):
            if isinstance(option, str) and option != ARGUMENT:
                yield option


def _owner(module: nn.Module) -> type:
    return next(kind for kind in type(module).__mro__ if "forward" in vars(kind))


@functools.cache
def fingerprint(function: Callable) -> str:
    """Digest of a function's code without comments and layout; empty where there is no source."""
    try:
        # Of the code object: of a wrapped function, `inspect` would look through the wrapper.
        source = textwrap.dedent(inspect.getsource(function.__code__))
    except (AttributeError, OSError):
        return ""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    words = " ".join(token.string for token in tokens if token.type not in layout)
    return hashlib.sha256(words.encode()).hexdigest()[:12]


def gate_of(module: nn.Module) -> Gate | None:
    """The row of a module's kind, if there is one."""
    return next((row for row in GATES if row.names(module)), None)


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
        "113fbeae3aae",
        "sigmoid",
        bias="e_score_correction_bias",
        groups=("num_group", "topk_group"),
        normalize="norm_topk_prob",
        scale="routed_scaling_factor",
    ),
    Gate(
        ("beam.BeamTopKRouter",),
        "b8eca9b049cb",
        "sigmoid",
        bias="e_score_correction_bias",
        groups=("num_group", "topk_group"),
        normalize="norm_topk_prob",
    ),
    Gate(
        ("mistral_large4.MistralLarge4TextTopkRouter",),
        "8783cc496ffd",
        "softmax",
        groups=("num_group", "topk_group"),
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
        "30dd64fa0dc9",
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
        "aaf8a17ee66b",
        "softmax",
        product="input",
        weights="logits",
    ),
    Gate(
        ("minimax.MiniMaxTopKRouter", "mixtral.MixtralTopKRouter"),
        "6d353ee837da",
        "softmax",
        product="input",
    ),
    # A softmax over the chosen logits is one over all of them, normalised.
    Gate(
        (
            "granitemoe.GraniteMoeTopKRouter",
            "granitemoe_swa.GraniteMoeSWATopKRouter",
            "granitemoehybrid.GraniteMoeHybridTopKRouter",
            "granitemoeshared.GraniteMoeSharedTopKRouter",
        ),
        "0ac245dc26cd",
        "softmax",
        product="input",
        weights="input",
        logits="float32",
    ),
    Gate(
        ("jamba.JambaTopKRouter",),
        "fdd87c0312b6",
        "softmax",
        product="input",
        weights="input",
        normalize=False,
    ),
    Gate(
        (
            "deepseek_ocr2.DeepseekOcr2TextTopkRouter",
            "deepseek_v2.DeepseekV2TopkRouter",
            "unlimited_ocr.UnlimitedOcrTextTopkRouter",
        ),
        "0df719c3b24d",
        "softmax",
        normalize=False,
        scale="routed_scaling_factor",
        where=(("topk_method", "greedy"),),  # its groups are ranked by their best expert alone
    ),
    # Sigmoid scores without groups; the block owns the bias and passes it.
    Gate(
        ("hy_v3.HYV3TopKRouter", "dots3_note.Dots3NoteVisionTopKRouter"),
        "e975cad467cc",
        "sigmoid",
        bias=ARGUMENT,
        scale="router_scaling_factor",
    ),
    Gate(
        ("minimax_m2.MiniMaxM2TopKRouter",),
        "d1e753d218eb",
        "sigmoid",
        product="weight",
        bias=ARGUMENT,
    ),
    Gate(
        ("flint.FlintTopKRouter",),
        "5f23e793f97a",
        "sigmoid",
        normalize="norm_topk_prob",
    ),
)
