"""The balancer on models of transformers as they are, which hold a bias and never update it."""

import copy
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from weightshare.integrations.transformers import patch  # noqa: E402
from weightshare.moe.balance import LoadBalancer  # noqa: E402

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    bos_token_id=0,
    eos_token_id=1,
    use_cache=False,
)
GROUPS = dict(
    n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1, n_shared_experts=1
)
LOW_RANK = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16
)
# Model -> its sizes; where the bias is: on the gate, on the block, a parameter [1, E] below.
MODELS = {
    "DeepseekV3": {**GROUPS, **LOW_RANK},
    "Glm4Moe": {**GROUPS, "head_dim": 16},
    "Dots1": GROUPS,
    "MiniMaxM2": dict(num_local_experts=8, rotary_dim=8, head_dim=16),
    "Ernie4_5_Moe": dict(moe_num_experts=8, moe_k=2),
    "Afmoe": dict(num_experts=8, num_shared_experts=1, num_dense_layers=1, head_dim=16),
    "Lfm2Moe": dict(num_experts=8, num_dense_layers=1, layer_types=["full_attention"] * 3),
}


def make(name, **sizes):
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM", None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    return kind(kind.config_class(**{**SIZES, **MODELS[name], **sizes})).train()


def batch(rows=4, length=12):
    words = torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(words)
    mask[1, 9:] = 0
    mask[3, :5] = 0
    return {"input_ids": words, "attention_mask": mask}


def pending(balancer):
    return [int(layer.counts.sum()) for layer in balancer._layers]


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_found_counted_and_moved(name):
    model = make(name)
    balancer = LoadBalancer(model, rate=0.01)
    assert len(balancer.names) == (3 if name == "MiniMaxM2" else 2)
    words = batch()
    real = int(words["attention_mask"].sum())
    model(**words)
    assert pending(balancer) == [2 * real] * len(balancer.names)
    balancer.step()
    saved = {key: value for key, value in model.state_dict().items() if key.endswith("bias")}
    moved = [saved[f"{layer.name}.{layer.attribute}"] for layer in balancer._layers]
    assert all(bias.any() and bias.dtype == torch.float32 for bias in moved)


@pytest.mark.parametrize("reentrant", [True, False])
def test_their_own_checkpointing_counts_once(reentrant):
    model = make("DeepseekV3")
    balancer = LoadBalancer(model)
    words = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its name changes with version 6
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for number in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # embeddings need no gradient, says the old mode
            model(**words, labels=words["input_ids"]).loss.backward()
        real = int(words["attention_mask"].sum())
        assert pending(balancer) == [2 * number * real] * 2


def test_compiled_whole_counts_once():
    torch._dynamo.reset()
    model = make("MiniMaxM2", num_hidden_layers=1)
    model.set_experts_implementation("batched_mm")  # theirs without a loop over the experts
    balancer = LoadBalancer(model)
    run, words = torch.compile(model, backend="aot_eager", fullgraph=True), batch()
    for number in (1, 2):
        run(**words, labels=words["input_ids"]).loss.backward()
        assert pending(balancer) == [2 * number * int(words["attention_mask"].sum())]


def test_a_model_on_our_kernels_counts_the_same():
    found = []
    for patched in (False, True):
        model = make("DeepseekV3")
        if patched:
            assert patch(model).gates == 2
        balancer = LoadBalancer(model)
        model(**batch())
        found.append([layer.counts.tolist() for layer in balancer._layers])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["DeepseekV3", "MiniMaxM2"])
def test_training_gets_balanced(name):
    model = make(name)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    balancer = LoadBalancer(model, rule="inverse_sqrt", rate=0.02).attach(optimizer)
    for layer in balancer._layers:
        layer.bias.copy_(torch.linspace(-0.1, 0.1, 8))  # the scores all lie near 0.5
    words, worst = batch(8, 32), []
    for _ in range(30):
        model(**words, labels=words["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        worst.append(balancer.max_violation().max().item())
    assert worst[0] > 1.5
    assert sum(worst[-5:]) / 5 < 0.4


@pytest.mark.parametrize("lower", ["bfloat16", "half"])
@pytest.mark.parametrize("name", ["DeepseekV3", "Ernie4_5_Moe", "MiniMaxM2"])
def test_the_bias_keeps_float32(name, lower):
    model = make(name)
    balancer = LoadBalancer(model, rate=0.3)
    model(**batch())
    balancer.step()
    exact = [layer.bias.clone() for layer in balancer._layers]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        getattr(model, lower)()
        model(**batch())
    assert sum("float32" in str(warning.message) for warning in said) == 1
    for layer, before in zip(balancer._layers, exact, strict=True):
        assert layer.bias.dtype == torch.float32 and torch.equal(layer.bias, before)
    other = make(name)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    for layer, before in zip(LoadBalancer(other)._layers, exact, strict=True):
        assert torch.equal(layer.bias, before)


def test_models_without_a_bias_are_refused():
    kind = transformers.Qwen3MoeForCausalLM
    model = kind(kind.config_class(**SIZES, num_experts=8, head_dim=16))
    with pytest.raises(ValueError, match="e_score_correction_bias"):
        LoadBalancer(model)
