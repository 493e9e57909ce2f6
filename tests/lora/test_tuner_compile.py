"""torch.compile without a break, in training and inference."""

import pytest
import torch

pytest.importorskip("peft")

import tiny_llama as tiny
from tiny_llama import IDS


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(layers=1, **changes):
    return tiny.adapted(model=tiny.base(torch.float32, layers), r=1 + layers, **changes)


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def test_training_equals_eager():
    model = small(layers=2).train()
    loss = model(IDS, labels=IDS).loss
    wanted = tiny.gradients(model, loss)
    got = compiled(model)(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(got, loss)
    for name, grad in tiny.gradients(model, got).items():
        torch.testing.assert_close(grad, wanted[name])
    assert any(grad.abs().max() > 0 for grad in wanted.values())


def test_inference_equals_eager_and_follows_the_adapter():
    model = small().eval()
    tiny.add(model, "b", 4, r=2)
    run = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(run(IDS).logits, model(IDS).logits)
        model.set_adapter("b")
        torch.testing.assert_close(run(IDS).logits, model(IDS).logits)
        tiny.fill(model, "b", 9)
        torch.testing.assert_close(run(IDS).logits, model(IDS).logits)
        with model.disable_adapter():
            torch.testing.assert_close(run(IDS).logits, model(IDS).logits)


def test_swap_needs_no_new_graph(tmp_path):
    from weightshare.lora import swap_adapter

    other = small(seed=7)
    tiny.fill(other, seed=8)
    other.save_pretrained(tmp_path)
    model, graphs = small().eval(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        run(IDS)
        swap_adapter(model, "default", tmp_path)
        torch.testing.assert_close(run(IDS).logits, other.eval()(IDS).logits)
    assert len(graphs) == 1


def test_mixed_batches():
    model = small()
    tiny.add(model, "b", 4, r=2)
    names = ["b", "default", "__base__", "b"]
    wanted = tiny.gradients(model, model(IDS, adapter_names=names).logits.square().sum())
    run = compiled(model.get_base_model())
    with model.base_model._enable_peft_forward_hooks(adapter_names=names):
        loss = run(input_ids=IDS).logits.square().sum()
    for name, grad in tiny.gradients(model, loss).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-4)


def test_dropout():
    model = small(dropout=0.5).train()
    run = compiled(model)
    one, two = run(IDS, labels=IDS).loss, run(IDS, labels=IDS).loss
    assert one != two and one.isfinite()
    assert any(grad.abs().max() > 0 for grad in tiny.gradients(model, one).values())
