"""Experts on several processes give what one process gives with the whole batch."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import parallel_job
from parallel_job import KINDS, Net, make
from torch.distributed.device_mesh import init_device_mesh
from weightshare.moe import Experts
from weightshare.moe.exchange import block_of, parallel_moe_mlp
from weightshare.moe.parallel import (
    average_gradients_,
    clip_gradients_,
    expert_parameters,
    parallelize_experts,
)

from weightshare_kernels import moe_mlp, routing_of


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Where four processes left what they found, from one ``torchrun``."""
    path = tmp_path_factory.mktemp("job") / "found"
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--standalone"]
    job = [*run, parallel_job.__file__, str(path)]
    done = subprocess.run(job, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def found(results):
    return [torch.load(f"{results}.{rank}", weights_only=True) for rank in range(4)]


# -- Training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_processes_equal_one(kind, found):
    """Outputs, all gradients, weights, biases and counts, after steps of AdamW and a balancer."""
    alone, tokens = parallel_job.alone(kind), KINDS[kind]["tokens"]
    for rank, out in enumerate(alone.pop("out").split(tokens)):
        mine = dict(found[rank][kind])
        torch.testing.assert_close(mine.pop("out"), out)
        if KINDS[kind].get("wrap") == "ddp":  # it puts a name of its own in front of none of them
            assert list(mine["state"]) == list(alone["state"])
        torch.testing.assert_close(mine, alone)


def test_the_kinds_cover_what_they_are_for():
    """All tokens meet on one rank; experts are fewer than ranks, or do not divide evenly."""
    skewed = make(**KINDS["four_on_one"])
    x, _, _ = parallel_job.batch(KINDS["four_on_one"]["tokens"])
    routing = skewed.moes[0].router(skewed.stem(x))[0]
    assert set(routing.experts.flatten().tolist()) == {2, 3} == set(block_of(6, 4, 1))
    assert [len(block_of(6, 4, rank)) for rank in range(4)] == [2, 2, 2, 0]
    assert [len(block_of(5, 4, rank)) for rank in range(4)] == [2, 2, 1, 0]
    assert [len(block_of(3, 4, rank)) for rank in range(4)] == [1, 1, 1, 0]
    norm = parallel_job.alone("pair_clipped")["norm"]
    assert norm > KINDS["pair_clipped"]["clip"]


def test_blocks_are_those_of_torch_chunk():
    for experts in range(1, 20):
        for ranks in range(1, 9):
            chunks = list(torch.arange(experts).chunk(ranks))
            chunks += [torch.empty(0)] * (ranks - len(chunks))
            blocks = [list(block_of(experts, ranks, rank)) for rank in range(ranks)]
            assert blocks == [chunk.tolist() for chunk in chunks]


# -- Checkpoints and other ways in -------------------------------------------------------------


def test_checkpoint_of_two_read_by_four(found):
    trained, moments = found[0]["pair"]["state"], found[0]["moments"]
    for rank in found:
        torch.testing.assert_close(rank["loaded"]["state"], trained, rtol=0, atol=0)
        torch.testing.assert_close(rank["loaded"]["moments"], moments, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_of_two_read_by_one_that_is_not_distributed(results, found):
    from torch.distributed import checkpoint

    net = make()
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    state = net.state_dict()
    checkpoint.load({"model": state}, checkpoint_id=f"{results}.checkpoint", no_dist=True)
    assert list(state) == list(found[0]["pair"]["state"])
    torch.testing.assert_close(dict(state), found[0]["pair"]["state"], rtol=0, atol=0)


def test_export_holds_the_experts_of_all_processes(found):
    net = make()
    net.load_state_dict(found[0]["pair"]["state"])
    for rank in found:
        torch.testing.assert_close(
            dict(rank["loaded"]["export"]), dict(net.moes[0].export().state_dict()), rtol=0, atol=0
        )


@pytest.mark.parametrize("way", ["meta", "copy"])
def test_whole_state_into_empty_experts_and_a_copy(way, found):
    tokens = (2, 3, 4, 5)
    alone = make()(parallel_job.batch(tokens)[0], None).detach()
    for rank, out in zip(found, alone.split(tokens), strict=True):
        torch.testing.assert_close(rank["variants"][way], out)


def test_autocast_where_a_process_has_no_expert(found):
    """Every process sends bfloat16; errors against float64 are those of one process."""
    net, (x, _, _) = make(experts=3), parallel_job.batch((2, 3, 4, 5))
    x = make().stem(x).detach().float()

    def run(moe, x, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = moe(x)
        y.to(torch.promote_types(y.dtype, torch.float32)).square().sum().backward()
        return y.detach(), moe.experts.gate_up.grad

    exact = run(copy.deepcopy(net.moes[0]), x.double(), False)
    alone = run(copy.deepcopy(net.moes[0]).float(), x, True)
    y = torch.cat([rank["variants"]["bfloat16"] for rank in found])
    grad = found[3]["variants"]["bfloat16_grad"] * 4  # it is a mean over processes
    assert y.dtype == alone[0].dtype == torch.bfloat16
    for ours, theirs, truth in zip((y, grad), alone, exact, strict=True):
        error = (ours.double() - truth).norm()
        assert error <= 2 * (theirs.double() - truth).norm()


# -- Peers that fail ---------------------------------------------------------------------------


def test_peers_that_fail_raise_in_time(results):
    late = torch.load(f"{results}.fail.0", weights_only=True)
    dead = torch.load(f"{results}.fail.2", weights_only=True)
    for name, (message, seconds) in {**late, **dead}.items():
        assert "a peer died, or did not run this layer" in message, name
        # The group's timeout, and as much again for a busy machine.
        assert seconds < 2 * parallel_job.PATIENCE + 10, name
    assert late.keys() | dead.keys() == {"forward", "backward", "death"}


def test_models_that_differ_and_a_mesh_of_others(found):
    for rank, mine in enumerate(found):
        other = 1 if rank == 0 else 0
        assert f"rank {other} of the group has experts" in mine["refused"]["different"]
        assert "build the same model on all ranks" in mine["refused"]["different"]
        assert (f"rank {rank} is not in the mesh" in mine["refused"]["outside"]) == (rank > 1)


# -- One process -------------------------------------------------------------------------------


@pytest.fixture
def single():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def draw(tokens=5, experts=4, k=2, d=3, f=2, dtype=torch.float64):
    torch.manual_seed(0)
    ids = torch.rand(tokens, experts).topk(k).indices
    x, gates = torch.randn(tokens, d, dtype=dtype), torch.rand(tokens, k, dtype=dtype)
    weights = torch.randn(experts, 2 * f, d, dtype=dtype), torch.randn(experts, d, f, dtype=dtype)
    return ids, [tensor.requires_grad_() for tensor in (x, gates, *weights)]


def test_gradcheck(single):
    ids, tensors = draw()
    mask = torch.tensor([False, True, False, False, False])

    def call(x, gates, gate_up, down):
        return parallel_moe_mlp(x, gate_up, down, routing_of(ids, gates, 4, mask), single)

    assert torch.autograd.gradcheck(call, tensors)


def test_two_runs_are_bitwise_equal_and_padding_is_not_read(single):
    ids, (x, gates, *weights) = draw(40, 6, 3)
    mask = torch.arange(40) % 5 == 2
    x = torch.where(mask[:, None], torch.nan, x.detach()).requires_grad_()

    def run():
        y = parallel_moe_mlp(x, *weights, routing_of(ids, gates, 6, mask), single)
        return y, *torch.autograd.grad(y.square().sum(), (x, gates, *weights))

    first, second = run(), run()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    y, dx, dgates, *_ = first
    for part in (y, dx, dgates):
        assert part.isfinite().all() and not part[mask].any() and part[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_the_op(dtype, single):
    ids, exact = draw(64, 6, 4, 16, 8)
    low = [t.detach().to(dtype if i != 1 else torch.float32) for i, t in enumerate(exact)]
    for tensor, value in zip(exact, low, strict=True):  # the same numbers, in float64
        tensor.data = value.double()

    def errors(function, *rest):
        x, gates, *weights = tensors = [t.clone().requires_grad_() for t in low]
        y = function(x, *weights, routing_of(ids, gates, 6), *rest)
        return [y, *torch.autograd.grad(y.float().square().sum(), tensors)]

    x, gates, *weights = exact
    truth = moe_mlp(x, *weights, routing_of(ids, gates, 6))
    truths = [truth, *torch.autograd.grad(truth.square().sum(), exact)]
    results = zip(errors(parallel_moe_mlp, single), errors(moe_mlp), truths, strict=True)
    for ours, op, truth in results:
        assert ours.dtype == op.dtype
        assert (ours.double() - truth).norm() <= 2 * (op.double() - truth).norm()


def test_a_pair_that_is_dropped_adds_nothing(single):
    ids, (x, gates, *weights) = draw()
    gates = gates.detach().clone()
    ids[1, 0], gates[1, 0] = -1, torch.nan
    routing = routing_of(ids, gates.requires_grad_(), 4)
    ours, op = parallel_moe_mlp(x, *weights, routing, single), moe_mlp(x, *weights, routing)
    torch.testing.assert_close(ours, op)
    grads = [torch.autograd.grad(y.sum(), (x, gates, *weights)) for y in (ours, op)]
    torch.testing.assert_close(*grads)


def test_module_on_one_process(single):
    """Equal to what it was, keys unchanged; compiled around, copied, and written as a whole."""
    net, x = make(), parallel_job.batch((7,))[0]
    expected, keys = net(x, None), list(net.state_dict())
    assert parallelize_experts(net) is net
    assert list(net.state_dict()) == keys
    assert [p.shape[0] for p in expert_parameters(net)] == [6] * 4
    torch.testing.assert_close(net(x, None), expected)
    torch.testing.assert_close(torch.compile(net, backend="eager")(x, None), expected)
    torch.testing.assert_close(copy.deepcopy(net)(x, None), expected)
    file = io.BytesIO()
    torch.save({name: parallel_job.whole(value) for name, value in net.state_dict().items()}, file)
    file.seek(0)
    other = make()
    nn.init.zeros_(other.moes[0].experts.down)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(x, None), expected)


def test_layers_that_share_experts_still_do(single):
    net = Net().double()
    net.moes[1].experts = net.moes[0].experts
    parallelize_experts(net)
    assert len(list(expert_parameters(net))) == 2
    x = torch.randn(4, 6, dtype=torch.float64)
    net(x, None).sum().backward()
    assert net.moes[1].experts.down.grad is net.moes[0].experts.down.grad is not None


def test_gradients_of_unused_parameters_stay_none(single):
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    net[0](torch.ones(1, 2)).sum().backward()
    average_gradients_(net)
    assert net[0].weight.grad is not None and net[1].weight.grad is None
    assert float(clip_gradients_(nn.Linear(2, 2), 1.0)) == 0


def test_bad_input_without_processes():
    with pytest.raises(RuntimeError, match="init_process_group"):
        parallelize_experts(make())
    with pytest.raises(RuntimeError, match="init_process_group"):
        average_gradients_(make())


def test_bad_input(single):
    class Own(Experts):
        pass

    net = parallelize_experts(make())
    with pytest.raises(ValueError, match="spread over ranks already"):
        parallelize_experts(net)
    with pytest.raises(ValueError, match=r"build its layers as weightshare\.moe\.MoE"):
        parallelize_experts(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got str"):
        parallelize_experts("model")
    with pytest.raises(TypeError, match="expected a DeviceMesh or a ProcessGroup, got int"):
        parallelize_experts(make(), 2)
    with pytest.raises(ValueError, match="is not in it"):
        parallelize_experts(make(), dist.GroupMember.NON_GROUP_MEMBER)
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep"))
    with pytest.raises(ValueError, match=r'such as mesh\["ep"\]'):
        parallelize_experts(make(), mesh)
    with pytest.raises(ValueError, match="wrap the result"):
        parallelize_experts(nn.parallel.DistributedDataParallel(make()))
    with pytest.raises(ValueError, match="before fully_shard"):
        parallelize_experts(dist.fsdp.fully_shard(make(), mesh=init_device_mesh("cpu", (1,))))
    with pytest.raises(TypeError, match="give its forward parallel_moe_mlp"):
        parallelize_experts(Own(4, 8, 8))


def test_bad_arguments_of_the_function(single):
    ids, (x, gates, gate_up, down) = draw()
    routing = routing_of(ids, gates, 4)
    with pytest.raises(ValueError, match=r"gate_up: has 3 experts, but .* owns 4, 0\.\.4"):
        parallel_moe_mlp(x, gate_up[:3], down, routing, single)
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 3\] with the 5 tokens"):
        parallel_moe_mlp(x[:4], gate_up, down, routing, single)
    with pytest.raises(ValueError, match=r"width\[2\]: 3 is outside 0\.\.2"):
        parallel_moe_mlp(x, gate_up, down, routing, single, width=[1, 2, 3, 0])
    with pytest.raises(TypeError, match=r"down: is torch\.float64"):
        parallel_moe_mlp(x.float(), gate_up.float(), down, routing, single)
