"""What the gradient collector allocates, keeps and rounds."""

import contextlib
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weightshare_kernels import _buffers, _collect, _select, accumulate_in_place, sliced_linear
from weightshare_kernels.ops.sliced_linear.cases import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("large", [False, True])
def test_nothing_outlives_its_graph(large):
    """Collectors and buffers die with the graph, whatever pass ran."""
    size = 2100 if large else 32  # large: 16 MiB and more, the numpy-backed buffer
    w = torch.randn(size, size, device=DEVICE, requires_grad=True)
    x = torch.randn(2, size, device=DEVICE, requires_grad=True)
    loss = sliced_linear(x, w, out=9).sum() + sliced_linear(x, w, out=size).sum()
    collector = _collect._live[id(w)][-1]
    torch.autograd.grad(loss, [x], retain_graph=True)
    assert not collector._buffers
    torch.autograd.grad(loss, [w, x], retain_graph=True)
    assert not collector._buffers
    loss.backward()
    assert not collector._buffers
    del loss
    gc.collect()
    assert not collector._uses and not collector._waiting
    key = id(w)
    del w
    assert key not in _collect._live


def sandwich(w, x, widths):
    return [sliced_linear(x[:, :n], w, out=n, in_=n).sin().sum() for n in widths]


def test_failed_backward_does_not_spoil_the_next():
    w = torch.randn(40, 40, dtype=torch.float64, device=DEVICE, requires_grad=True)
    x = torch.randn(3, 40, dtype=torch.float64, device=DEVICE)
    losses = sandwich(w, x, (40, 20, 10))
    failing = losses[0].register_hook(lambda g: 1 / 0)  # after the later slices have added theirs
    with pytest.raises(ZeroDivisionError):
        sum(losses).backward(retain_graph=True)
    failing.remove()
    w.grad = None
    sum(losses).backward()
    wanted = sum(eager(x[:, :n], w, out=n, in_=n).sin().sum() for n in (40, 20, 10))
    torch.testing.assert_close(w.grad, torch.autograd.grad(wanted, w)[0])
    collector = _collect._live[id(w)][-1]
    del losses, wanted
    gc.collect()
    assert not collector._uses
    del w.grad
    sliced_linear(x, w, out=9).sum().backward()  # drops what the failed pass left
    assert not collector._buffers and not collector._waiting


def test_many_steps_do_not_grow():
    """Tensors, collectors and cache entries die with each step's weight and index table."""
    x = torch.randn(2, 64, device=DEVICE)

    def step():
        w = torch.randn(64, 64, device=DEVICE, requires_grad=True)
        index = torch.randperm(64, device=DEVICE)[:40]
        loss = sum(sandwich(w, x, (64, 32))) + sliced_linear(x, w, out=index).sum()
        loss.backward()

    def alive():
        gc.collect()
        kinds = torch.Tensor, _collect.Collector
        objects = sum(issubclass(type(o), kinds) for o in gc.get_objects())
        return objects, len(_collect._live), len(_select._tables)

    step()
    before = alive()
    for _ in range(50):
        step()
    assert alive() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_sums_are_kept_in_fp32(dtype):
    """Over many slices of one weight our error is well below that of repeated rounding."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(48, 48, generator=generator).to(DEVICE, dtype).requires_grad_()
    xs = [torch.randn(4, 48, generator=generator).to(DEVICE, dtype) for _ in range(64)]

    def gradient(layer, weight, inputs):
        total = sum(layer(x, weight, out=40, in_=None).float().sum() for x in inputs)
        return torch.autograd.grad(total, weight)[0].double()

    exact = gradient(eager, w.detach().double().requires_grad_(), [x.double() for x in xs])
    ours, theirs = gradient(sliced_linear, w, xs), gradient(eager, w, xs)
    # The first slice and the sum are rounded once each.
    assert (ours - exact).norm() <= (theirs - exact).norm() / 2
    assert (ours - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.skipif(DEVICE != "cpu", reason="the GPU's allocator keeps its memory by itself")
def test_kept_buffers_are_reused_and_never_shared():
    _buffers.release()
    like = torch.empty(600, 600)
    first, second = _buffers.empty_like(like), _buffers.empty_like(like)
    assert first.data_ptr() != second.data_ptr() and first.data_ptr() % 64 == 0
    address, view = first.data_ptr(), first[3:]
    del first
    assert _buffers.empty_like(like).data_ptr() != address  # a view still lives on it
    del view
    gc.collect()
    assert _buffers.kept_bytes() >= like.nbytes
    again = [_buffers.empty_like(like) for _ in range(3)]
    assert address in {b.data_ptr() for b in again}
    assert len({b.data_ptr() for b in [second, *again]}) == 4
    del again, second
    _buffers.release()
    assert _buffers.kept_bytes() == 0


@pytest.mark.skipif(DEVICE != "cpu", reason="the GPU's allocator keeps its memory by itself")
def test_kept_buffers_are_bounded(monkeypatch):
    _buffers.release()
    monkeypatch.setattr(_buffers, "_LIMIT", 5 << 20)
    like = torch.empty(1 << 18)  # 1 MiB
    held = [_buffers.empty_like(like) for _ in range(9)]
    del held
    assert _buffers.kept_bytes() <= 5 << 20
    _buffers.release()


class Allocations(TorchDispatchMode):
    """Counts new storages of at least a given size that ops return."""

    def __init__(self, nbytes):
        super().__init__()
        self.nbytes, self.seen = nbytes, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        old = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.nbytes and storage.data_ptr() not in old:
                    self.seen[storage.data_ptr()] = function
        return result


@pytest.mark.parametrize("in_place", [False, True])
def test_sandwich_allocates_one_full_size_buffer(in_place, monkeypatch):
    w = torch.randn(256, 256, device=DEVICE, requires_grad=True)
    x = torch.randn(3, 256, device=DEVICE)
    losses = [sliced_linear(x[:, :n], w, out=n, in_=n).sum() for n in (250, 192, 128, 64)]
    made = []  # addresses only: a reference would force a copy
    original = _collect.empty_like

    def counted(*arguments):
        buffer = original(*arguments)
        made.append(buffer.data_ptr())
        return buffer

    monkeypatch.setattr(_collect, "empty_like", counted)
    context = accumulate_in_place() if in_place else contextlib.nullcontext()
    with context, Allocations(256 * 256 * 4) as allocations:
        sum(losses).backward()
    assert len(made) == 1
    assert set(allocations.seen) <= {made[0], w.data_ptr()}, allocations.seen
    assert w.grad.data_ptr() == made[0]  # handed over, not copied
