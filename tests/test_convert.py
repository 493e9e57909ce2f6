"""Models of timm and transformers made into supernets in place."""

import copy
import pickle
import random

import pytest
import torch
from peers import peer
from torch import nn
from weightshare.convert import convert
from weightshare.export import export
from weightshare.nn import Linear
from weightshare.rules import Rule
from weightshare.space import PerLayer, SearchSpace

SMALL = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8)  # fmt: skip


def llama(kind="Llama", **more):
    transformers = peer("transformers")
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **more})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def vit(**more):
    module = peer("timm.models.vision_transformer")
    sizes = dict(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5)
    return module.VisionTransformer(**{**sizes, **more}).eval()


def randomised(model):
    """Nothing left at zero or one, where a wrong slice would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(model, x):
    y = model(x)
    return getattr(y, "logits", y)


def full_size(kind):
    """A model of real size, its input and a space of it."""
    torch.manual_seed(0)
    if kind == "llama":
        sizes = dict(vocab_size=4096, hidden_size=384, intermediate_size=1024,
                     num_hidden_layers=4, num_attention_heads=6, head_dim=64)  # fmt: skip
        space = {"embed": [192, 384], "ffn": [256, 512, 1024], "depth": [2, 3, 4],
                 "heads": [2, 4, 6]}  # fmt: skip
        return llama(**sizes), torch.randint(4096, (2, 12)), space
    model = peer("timm").create_model(kind).eval()
    x = torch.randn(1, 3, 224, 224)
    if kind.startswith("vit"):
        return model, x, {"embed": [192, 320, 384], "heads": PerLayer([3, 6], 12),
                          "mlp_ratio": PerLayer([2, 3.5, 4], 12), "depth": [10, 12]}  # fmt: skip
    space = {"depth.1": [1, 2], "depth.3": [2, 4], "expand.5": [1.5, 2, 3], "expand.14": [3, 4, 6]}
    return model, x, {**space, "kernel.4": [3, 5], "kernel.13": [1, 3, 5]}


@pytest.mark.parametrize("kind", ["llama", "vit_small_patch16_224", "mobilenetv3_large_100"])
def test_full_size_and_subnets(kind):
    model, x, space = full_size(kind)
    randomised(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    with torch.no_grad():
        want = logits(model, x)
        supernet = convert(model, space)
        assert supernet.model is model and list(model.state_dict()) == keys
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        torch.testing.assert_close(logits(model, x), want, rtol=1e-5, atol=1e-5 * want.std())
    rng = random.Random(0)
    for arch in (supernet.space.smallest(), supernet.space.sample(rng)):
        supernet.space.activate(arch)
        y = logits(model, x)
        y.square().mean().backward()
        small = export(model)
        torch.testing.assert_close(logits(small, x), y, rtol=1e-5, atol=1e-5 * y.std().item())
        assert b"weightshare" not in pickle.dumps(small)
        for name, tensor in small.state_dict().items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in parameters)


@pytest.mark.parametrize("arch", [(16, 2, 2, 2), (32, 4, 4, 3), (8, 1, 3, 1)])
def test_vit_loads_into_one_that_timm_builds(arch):
    embed, heads, ratio, depth = arch
    space = {"embed": [8, 16, 32], "heads": [1, 2, 4], "mlp_ratio": [2, 3, 4], "depth": [1, 2, 3]}
    supernet = convert(randomised(vit()), space)
    supernet.set_active_subnet({"embed": embed, "heads": heads, "mlp_ratio": ratio, "depth": depth})
    built = vit(embed_dim=embed, num_heads=heads, mlp_ratio=ratio, depth=depth)
    built.load_state_dict(supernet.get_active_subnet().state_dict())
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(supernet.model(x), built(x))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_language_models_load_into_ones_that_transformers_builds(kind, tied, tmp_path):
    space = {"embed": [16, 24, 32], "heads": [2, 4], "ffn": [16, 32, 48], "depth": [1, 2, 3]}
    supernet = convert(randomised(llama(kind, tie_word_embeddings=tied)), space)
    rng, tokens = random.Random(1), torch.randint(60, (2, 7))
    for arch in (supernet.space.smallest(), *(supernet.space.sample(rng) for _ in range(2))):
        supernet.set_active_subnet(arch)
        small = supernet.get_active_subnet()
        built = llama(
            kind, tie_word_embeddings=tied, hidden_size=arch["embed"],
            num_attention_heads=arch["heads"], intermediate_size=arch["ffn"],
            num_hidden_layers=arch["depth"],
        )  # fmt: skip
        built.load_state_dict(small.state_dict())
        torch.testing.assert_close(logits(built, tokens), logits(supernet.model, tokens))
        assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(small, tokens))


def test_classifier():
    transformers = peer("transformers")
    config = transformers.LlamaConfig(**SMALL, pad_token_id=0)
    model = randomised(transformers.LlamaForSequenceClassification(config).eval())
    supernet = convert(model, {"embed": [16, 32]})
    supernet.set_active_subnet({"embed": 16})
    tokens = torch.randint(1, 60, (2, 7))
    small = supernet.get_active_subnet()
    assert small.score.in_features == 16
    torch.testing.assert_close(logits(small, tokens), logits(model, tokens))


def test_generation():
    """A subnet generates as its export does, with the cache of keys and values."""
    supernet = convert(llama(), {"heads": [2, 4], "depth": [2, 3]})
    supernet.set_active_subnet(supernet.space.smallest())
    tokens, options = torch.randint(60, (1, 4)), {"max_new_tokens": 6, "do_sample": False}
    ours = supernet.model.generate(tokens, **options)
    assert ours.tolist() == supernet.get_active_subnet().generate(tokens, **options).tolist()


@pytest.mark.parametrize(
    ("arch", "kept"),
    [({"heads": 4}, [0, 1, 2, 3]), ({"heads": 2}, [0, 2]), ({"kv_heads": 1}, [0, 1])],
)
def test_query_heads_stay_with_their_key_head(arch, kept):
    """Smaller groups are cut one by one; a key head that goes takes its query heads along."""
    model = randomised(llama())
    attention = model.model.layers[0].self_attn
    rows = attention.q_proj.weight.view(4, 8, 32)
    space = {"heads": [2, 4]} if "heads" in arch else {"kv_heads": [1, 2]}
    convert(model, space).set_active_subnet(arch)
    small = export(model)
    got = small.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(got, rows[kept].flatten(0, 1))
    kv_heads = arch.get("kv_heads", 2)
    assert attention.num_key_value_groups == len(kept) // kv_heads
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (
        len(kept), kv_heads,
    )  # fmt: skip


def test_config_where_layers_differ():
    """A field that cannot say it stays as it was; the rest is set."""
    supernet = convert(llama(), {"ffn": PerLayer([16, 32, 48], 3), "embed": [16, 32]})
    supernet.set_active_subnet({"ffn": [16, 32, 16], "embed": 16})
    config = supernet.get_active_subnet().config
    assert (config.intermediate_size, config.hidden_size) == (48, 16)
    assert supernet.model.config.hidden_size == 32, "the supernet keeps its own config"


def one_hot(space, arch):
    alphas = {}
    for name, dim in space.dims.items():
        alpha = torch.zeros(len(dim.choices))
        alpha[dim.choices.index(arch[name])] = 1
        alphas[name] = alpha.requires_grad_()
    return alphas


def check_one_hot(supernet, x):
    """A mixture of one choice is that subnet, and its weights get gradients."""
    space, rng = supernet.space, random.Random(2)
    for arch in (space.smallest(), space.sample(rng), space.largest()):
        space.activate(arch)
        want = logits(supernet.model, x)
        alphas = one_hot(space, arch)
        space.mix(alphas)
        got = logits(supernet.model, x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        got.square().sum().backward()
        assert all(alpha.grad.isfinite().all() for alpha in alphas.values())
    assert all(alpha.grad.any() for alpha in alphas.values()), "no layer of the last is idle"


def test_mixture_of_a_vision_transformer():
    space = {"embed": [16, 24, 32], "mlp_ratio": PerLayer([2, 4], 3), "heads": [2, 4],
             "depth": [2, 3]}  # fmt: skip
    model = randomised(vit(init_values=0.5, reg_tokens=2))
    check_one_hot(convert(model, space), torch.randn(2, 3, 16, 16))


def test_mixture_of_a_language_model():
    supernet = convert(randomised(llama()), {"ffn": PerLayer([16, 48], 3), "heads": [2, 4]})
    check_one_hot(supernet, torch.randint(60, (2, 7)))


def test_export_while_mixed():
    """A copy has the sizes of the active choices."""
    supernet = convert(vit(), {"embed": [16, 32], "heads": [2, 4], "mlp_ratio": [2, 4]})
    space, x = supernet.space, torch.randn(1, 3, 16, 16)
    space.activate(space.smallest())
    want = supernet.model(x)
    space.mix(one_hot(space, space.largest()))
    torch.testing.assert_close(export(supernet.model)(x), want)


def mobilenet():
    return peer("timm").create_model("mobilenetv3_small_050", num_classes=5).eval()


def test_mixture_of_a_mobilenet():
    model = randomised(mobilenet())
    space = {"expand.4": [2, 4, 6], "kernel.4": [3, 5], "depth.2": [1, 2, 3]}
    check_one_hot(convert(model, space), torch.randn(2, 3, 32, 32))


def test_running_statistics_of_the_active_channels():
    model = mobilenet()
    supernet = convert(model, {"expand.4": [2, 4, 6]})
    supernet.set_active_subnet({"expand.4": 2})
    norm = model.blocks[2][1].bn1
    whole = norm._buffers["running_var"]
    model.train()(torch.randn(4, 3, 32, 32))
    active = norm.running_var.numel()
    assert active < whole.numel() and whole[:active].ne(1).all() and whole[active:].eq(1).all()


def test_optimizer_made_before():
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    supernet = convert(model, {"embed": [16, 32], "ffn": [16, 48]})
    supernet.set_active_subnet(supernet.space.smallest())
    tokens = torch.randint(60, (2, 7))
    before = [p.detach().clone() for p in model.parameters()]
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    weight = dict(zip([n for n, _ in model.named_parameters()], before, strict=True))
    now = model.model.layers[0].mlp.up_proj.weight
    old = weight["model.layers.0.mlp.up_proj.weight"]
    assert (now[:16, :16] != old[:16, :16]).any()
    assert torch.equal(now[16:], old[16:]) and torch.equal(now[:, 16:], old[:, 16:])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("make", [vit, llama])
def test_copies(make, duplicate):
    supernet = convert(randomised(make()), {"embed": [16, 32], "heads": [2, 4], "depth": [2, 3]})
    supernet.set_active_subnet(supernet.space.smallest())
    twin = duplicate(supernet)
    x = torch.randn(1, 3, 16, 16) if make is vit else torch.randint(60, (1, 7))
    torch.testing.assert_close(logits(twin.model, x), logits(supernet.model, x))
    twin.set_active_subnet(twin.space.largest())
    assert logits(twin.model, x).ne(logits(supernet.model, x)).any()


def test_hooks_and_mode_are_kept():
    model, calls = vit().train(), []
    model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    convert(model, {"mlp_ratio": [2, 4]})
    model(torch.randn(1, 3, 16, 16))
    assert calls == [1] and all(module.training for module in model.modules())


BAD = {
    "beyond the model": (llama, {"embed": [16, 64]}, r"embed: \[16, 64\].*1 to 32"),
    "largest missing": (llama, {"ffn": [16, 32]}, r"ffn: .*with 48 itself"),
    "heads do not divide": (llama, {"heads": [3, 4]}, r"heads: 3 do not fit 2 kv_heads.*\[2, 4\]"),
    "zero": (vit, {"embed": [0, 32]}, "embed: 0 is no whole number"),
    "fraction": (vit, {"heads": [1.5, 4]}, r"heads: 1\.5 is no whole number"),
    "ratio": (vit, {"mlp_ratio": [2, 5]}, r"mlp_ratio: .*up to 4"),
    "both": (vit, {"mlp_ratio": [2, 4], "ffn": [64, 128]}, "ffn: the space names mlp_ratio"),
    "too deep": (vit, {"depth": [2, 4]}, r"depth: .*blocks.*1 to 3"),
    "unknown": (vit, {"embed": [16, 32], "kernel": [3, 5]}, r"kernel: .*no such role.*mlp_ratio"),
    "unknown layer": (vit, {"ffn.3": [64, 128]}, r"ffn\.3: .*0\.\.2"),
    "layers": (vit, {"ffn": PerLayer([64, 128], 4)}, "ffn: 4 layers, but the model has 3"),
    "embed per layer": (vit, {"embed": PerLayer([16, 32], 3)}, "embed: .*one size for all layers"),
    "even kernel": (mobilenet, {"kernel.4": [2, 5]}, r"kernel\.4: .*steps of 2"),
    "expansion": (mobilenet, {"expand": [3, 6]}, r"expand: .*blocks\.1\.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_space_the_model_cannot_take(name):
    make, space, message = BAD[name]
    model, space = make(), SearchSpace(**space)
    before = [(path, type(module), id(module)) for path, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        convert(model, space)
    assert before == [(path, type(module), id(module)) for path, module in model.named_modules()]
    assert not any(dim.dependents for dim in space.dims.values())


def test_twice():
    model = vit()
    convert(model, {"heads": [2, 4]})
    with pytest.raises(TypeError, match=r"(converted|bound) already"):
        convert(model, {"heads": [2, 4]})


class Plain(nn.Module):
    """A model that no built-in rule knows."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.RMSNorm(12), nn.Linear(12, 6)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


def test_own_rule():
    model = Plain()
    with pytest.raises(ValueError, match=r"up\.weight: no rule knows .*rules=\[Rule"):
        convert(model, {"ffn": [4, 12]})
    layers = {"up": ("ffn", None), "norm": ("ffn",), "down": (None, "ffn")}
    rule = Rule("*.Plain", {"ffn": "up.out_features"}, layers)
    supernet = convert(model, {"ffn": [4, 12]}, [rule])
    assert type(model.up) is Linear
    supernet.set_active_subnet({"ffn": 4})
    x = torch.randn(3, 6)
    torch.testing.assert_close(supernet.get_active_subnet()(x), model(x))


def test_one_graph_for_many_subnets(traced):
    space = {"embed": [8, 16, 24, 32], "mlp_ratio": [1, 2, 3, 4], "heads": [2, 3, 4]}
    supernet = convert(randomised(vit(depth=1)), space)
    x, rng = torch.randn(2, 3, 16, 16), random.Random(0)
    with torch.no_grad():
        compiled = traced(supernet.model)
        for _ in range(4):
            arch = supernet.space.sample(rng)
            while arch["embed"] == 32 or arch["heads"] == 4:  # whole axes are cases apart
                arch = supernet.space.sample(rng)
            supernet.set_active_subnet(arch)
            torch.testing.assert_close(compiled(x), supernet.model(x))
    assert len(traced.graphs) == 1
