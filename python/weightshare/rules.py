"""Table for :func:`weightshare.convert`: which axis of which layer is what, by type of layer.

A rule speaks of *roles*: ``embed``, ``heads``, ``ffn``. The space of a supernet gives choices to
some of them; the others stay as they are in the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

Role = str | None
Axes = tuple[Role | list[str], ...]


@dataclass(frozen=True)
class Rule:
    """How modules of some type depend on roles.

    Paths are dotted names from the module on, numbers in them indices. A child, tensor or
    attribute that a module lacks is passed over, so that one rule serves a family of types.

    Args:
        kind: ``module.Class`` of the type, with wildcards as in file names; subclasses match too.
        sizes: role -> path of the model's own size: an attribute, or a number in a shape. What
            the rule needs: a module without one of them does not match. A role that starts with
            ``_`` is fixed.
        layers: path of a child -> the role of each axis of its weight, in the weight's order
            (``out, in`` of a linear layer); None is fixed, a list is blocks laid end to end.
        tensors: parameter or buffer of the module itself -> likewise.
        attributes: attribute that code of the module reads -> role.
        config: field of ``module.config`` to be set in an exported model -> role.
        depth: containers of equal layers, of which the first ``depth`` run; ``*`` is each child.
        fixed: children that stay as they are.

    From ``heads`` and ``_head_dim`` (and ``kv_heads``) follow ``queries`` (rows of the query
    heads), ``keys`` and ``groups`` (query heads per key and value head); ``RATIOS`` says which
    roles a space may give as multiples of another one.
    """

    kind: str
    sizes: Mapping[str, str]
    layers: Mapping[str, Axes] = field(default_factory=dict)
    tensors: Mapping[str, Axes] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    depth: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    def matches(self, module: nn.Module) -> bool:
        """Whether the rule speaks of this module."""
        names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
        return any(fnmatchcase(name, self.kind) for name in names) and all(
            read(module, path) is not None for path in self.sizes.values()
        )

    def containers(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        """Parent, name and module of each container of layers."""
        for path in self.depth:
            *parents, last = path.split(".")
            parent: nn.Module = read(module, ".".join(parents)) if parents else module
            names = list(parent._modules) if last == "*" else [last]
            for name in names:
                container = parent._modules.get(name)
                if container is not None:
                    yield parent, name, container


# role -> (role of the ratio, role that is multiplied, divisor that the product is rounded to)
RATIOS = {"ffn": ("mlp_ratio", "embed", 1), "hidden": ("expand", "_channels", 8)}

_NORM = ("embed",)

RULES = (
    # ---- timm: vision transformers
    Rule(
        "timm.models.vision_transformer.VisionTransformer",
        {"embed": "embed_dim"},
        {"norm_pre": _NORM, "norm": _NORM, "fc_norm": _NORM, "head": (None, "embed")},
        {
            "cls_token": (None, None, "embed"),
            "reg_token": (None, None, "embed"),
            "pos_embed": (None, None, "embed"),
        },
        {"embed_dim": "embed", "num_features": "embed", "head_hidden_size": "embed"},
        depth=("blocks",),
    ),
    Rule(
        "timm.layers.patch_embed.PatchEmbed",
        {"embed": "proj.out_channels"},
        {"proj": ("embed", None, None), "norm": _NORM},
    ),
    Rule(
        "timm.models.vision_transformer.*Block",
        {"embed": "norm1.weight.shape.0"},
        {"norm1": _NORM, "norm2": _NORM},
    ),
    Rule(
        "timm.*LayerScale",
        {"embed": "gamma.shape.0"},
        tensors={"gamma": _NORM},
    ),
    Rule(
        "timm.layers.attention.Attention",
        {"embed": "qkv.in_features", "heads": "num_heads", "_head_dim": "head_dim"},
        {
            "qkv": (["queries"] * 3, "embed"),
            "gate": ("queries", "embed"),
            "proj": ("embed", "queries"),
            "norm": ("queries",),
            "q_norm": ("_head_dim",),
            "k_norm": ("_head_dim",),
        },
        attributes={"num_heads": "heads", "attn_dim": "queries"},
    ),
    Rule(
        "timm.layers.mlp.Mlp",
        {"embed": "fc1.in_features", "ffn": "fc1.out_features"},
        {"fc1": ("ffn", "embed"), "norm": ("ffn",), "fc2": ("embed", "ffn")},
    ),
    # ---- timm: MobileNetV3, EfficientNet and their kin; widths of stages stay
    Rule(
        "timm.models.mobilenetv3.MobileNetV3",
        {"_channels": "conv_stem.out_channels"},
        depth=("blocks.*",),
        fixed=("conv_stem", "bn1", "conv_head", "norm_head", "classifier"),
    ),
    Rule(
        "timm.models.efficientnet.EfficientNet",
        {"_channels": "conv_stem.out_channels"},
        depth=("blocks.*",),
        fixed=("conv_stem", "bn1", "conv_head", "bn2", "classifier"),
    ),
    Rule(
        "timm.models._efficientnet_blocks.InvertedResidual",
        {
            "_channels": "conv_pw.in_channels",
            "hidden": "conv_dw.out_channels",
            "kernel": "conv_dw.kernel_size.0",
        },
        {
            "conv_pw": ("hidden", None, None),
            "bn1": ("hidden",),
            "conv_dw": ("hidden", None, "kernel"),
            "bn2": ("hidden",),
            "se.conv_reduce": (None, "hidden", None),
            "se.conv_expand": ("hidden", None, None),
            "conv_pwl": (None, "hidden", None),
        },
        fixed=("bn3",),
    ),
    Rule(
        "timm.models._efficientnet_blocks.DepthwiseSeparableConv",
        {"kernel": "conv_dw.kernel_size.0"},
        {"conv_dw": (None, None, "kernel")},
        fixed=("bn1", "se", "conv_pw", "bn2"),
    ),
    Rule(
        "timm.models._efficientnet_blocks.ConvBnAct",
        {"_channels": "conv.out_channels"},
        fixed=("conv", "bn1"),
    ),
    # ---- transformers: Llama and the many built like it
    Rule(
        "transformers.models.*ForCausalLM",
        {"embed": "lm_head.in_features"},
        {"lm_head": (None, "embed")},
    ),
    Rule(
        "transformers.models.*ForSequenceClassification",
        {"embed": "score.in_features"},
        {"score": (None, "embed")},
    ),
    Rule(
        "transformers.models.*Model",
        {"embed": "embed_tokens.embedding_dim"},
        {"embed_tokens": (None, "embed"), "norm": _NORM},
        config={"hidden_size": "embed", "num_hidden_layers": "depth"},
        depth=("layers",),
    ),
    Rule(
        "transformers.models.*DecoderLayer",
        {"embed": "input_layernorm.weight.shape.0"},
        {"input_layernorm": _NORM, "post_attention_layernorm": _NORM},
        attributes={"hidden_size": "embed"},
    ),
    Rule(
        "transformers.models.*Attention",
        {
            "embed": "q_proj.in_features",
            "heads": "config.num_attention_heads",
            "kv_heads": "config.num_key_value_heads",
            "_head_dim": "head_dim",
        },
        {
            "q_proj": ("queries", "embed"),
            "k_proj": ("keys", "embed"),
            "v_proj": ("keys", "embed"),
            "o_proj": ("embed", "queries"),
            "q_norm": ("_head_dim",),
            "k_norm": ("_head_dim",),
        },
        attributes={
            "hidden_size": "embed",
            "num_heads": "heads",
            "num_key_value_heads": "kv_heads",
            "num_key_value_groups": "groups",
        },
        config={
            "num_attention_heads": "heads",
            "num_key_value_heads": "kv_heads",
            "head_dim": "_head_dim",
        },
    ),
    Rule(
        "transformers.models.*MLP",
        {"embed": "gate_proj.in_features", "ffn": "gate_proj.out_features"},
        {"gate_proj": ("ffn", "embed"), "up_proj": ("ffn", "embed"), "down_proj": ("embed", "ffn")},
        attributes={"hidden_size": "embed", "intermediate_size": "ffn"},
        config={"intermediate_size": "ffn"},
    ),
)


def read(module, path: str):
    """What lies at a dotted path; None where there is nothing."""
    found = module
    for name in path.split("."):
        if name.isdigit() and not isinstance(found, nn.Module):
            found = found[int(name)] if int(name) < len(found) else None
        else:
            found = getattr(found, name, None)
        if found is None:
            return None
    return found
