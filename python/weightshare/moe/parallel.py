"""Expert parallelism: each rank of a group keeps a block of the experts, and tokens travel.

Experts are split as ``DTensor`` splits a dimension among W ranks: into blocks of ``ceil(E / W)``
in order of the ranks, the last ones smaller or empty. A rank routes its own tokens, sends each to
the ranks of its experts, computes its own experts on what arrives and sends the results back,
which their sources weigh with the gates and add up (:mod:`weightshare.moe.exchange`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightshare.moe import plain
from weightshare.moe.exchange import block_of, parallel_moe_mlp
from weightshare.moe.layer import Experts
from weightshare_kernels import Routing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_SHARDED = ("gate_up", "down")


class ParallelExperts(Experts):
    """Experts of which each rank keeps a block; made by :func:`parallelize_experts`.

    Parameters keep their names and whole shapes, as DTensors with placement ``Shard(0)``.
    ``load_state_dict`` takes whole tensors, of which it keeps the rank's block, as well as
    DTensors.

    Attributes:
        mesh: the ranks. (DTensors know theirs too, but confuse groups of the same ranks.)
        average: whether gradients of the experts are divided by the number of ranks.
    """

    mesh: DeviceMesh
    average: bool

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """The gated sum of experts of all ranks, on this rank's tokens: ``[T, d]`` in and out."""
        own: Any = [getattr(self, name).to_local() for name in _SHARDED]
        settings: Any = {"activation": self.activation, "width": self.width}
        return parallel_moe_mlp(
            x, *own, routing, self.mesh.get_group(), average=self.average, **settings
        )

    def export(self) -> plain.Experts:
        """As ``Experts.export``, of the experts of all ranks; all must call it together."""
        options = {"activation": self.activation, "device": "meta"}
        whole = Experts(self.num_experts, self.dim, self.hidden, **options)  # type: ignore[arg-type]
        for name in _SHARDED:
            own = getattr(self, name)
            setattr(whole, name, nn.Parameter(own.detach().full_tensor(), own.requires_grad))
        whole._active = self._active
        return whole.train(self.training).export()

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in _SHARDED:
            value, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(value, Tensor) and not _is_sharded(value) and value.shape == own.shape:
                state_dict[prefix + name] = _shard(value, self.mesh)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def parallelize_experts(
    module: nn.Module,
    group: DeviceMesh | dist.ProcessGroup | None = None,
    *,
    average: bool = True,
) -> nn.Module:
    """Spread the experts of every MoE layer in a module over the ranks of a group.

    Each rank keeps a contiguous block of every layer's experts, as it has them (nothing is sent),
    and frees the others. Experts need not divide evenly, and a rank may own none. The rest of the
    module (routers, shared experts, everything else) stays replicated. All ranks of the group
    must call this with modules of the same shape, before an optimizer is made.

    **Gradients.** A rank's experts get tokens from all ranks, and so sums over all of them; with
    ``average`` they are divided by the number of ranks W, which makes them what data parallelism
    makes of the replicated parameters: the gradient of the mean of the ranks' losses. That equals
    the gradient of one process on the concatenated batch where the loss is a mean and the ranks
    hold equally many tokens; else let each rank's loss be its sum over tokens times W over the
    number of tokens of all ranks. Replicated parameters are averaged by the user's choice of:

    - :func:`average_gradients_`, called between backward and the optimizer's step;
    - ``DistributedDataParallel`` around the very module that was given to this function: it has
      been told to leave the experts alone;
    - FSDP2: ``fully_shard(model, mesh=mesh, ignored_params=set(expert_parameters(model)))``. Where
      experts are themselves replicated, as on ``mesh["ep"]`` of a mesh (dp, ep), shard them over
      the rest: ``fully_shard(layer.experts, mesh=mesh["dp"])``. It averages over dp what comes out
      of ``average`` over ep: the mean over all ranks.

    With ``average=False`` they are left as sums: where the loss has been divided by the number of
    all tokens and replicated gradients are summed.

    **Checkpoints.** The state dict has the same keys and whole shapes as before. DTensors are
    saved, loaded and spread over another number of ranks by ``torch.distributed.checkpoint``;
    ``load_state_dict`` takes a state dict of one process, too.

    **Calls must match.** Forward and backward exchange tokens: all ranks of the group run the same
    layers the same number of times, a rank without tokens as well (its loss may be
    ``output.sum()``). A peer that dies or does not take part raises RuntimeError in the others
    within the timeout of the group.

    Args:
        module: a model, an ``MoE`` or ``Experts``; it is changed in place. Parameters may be on
            the meta device.
        group: mesh of one dimension, or process group; None: all processes.
        average: whether experts' gradients are divided by the number of ranks.

    Returns:
        The module itself.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError: an argument is of the wrong kind.
        ValueError: this rank is not in the group, the mesh has several dimensions, the module
            holds no experts or sharded ones, or modules of the ranks differ.
    """
    found = _found(module)
    mesh = _mesh(group, next(found[0].parameters()).device)
    _agree(found, mesh.get_group())
    blocks: dict[nn.Parameter, nn.Parameter] = {}  # layers may share their experts
    for experts in found:
        for name in _SHARDED:
            whole = getattr(experts, name)
            if whole not in blocks:
                own = _shard(whole.detach(), mesh)
                blocks[whole] = nn.Parameter(own, whole.requires_grad)
            setattr(experts, name, blocks[whole])
        # The same object, as fully_shard does it: hooks and references to it stay.
        experts.__class__ = ParallelExperts
        spread = cast(ParallelExperts, experts)
        spread.mesh, spread.average = mesh, average
    sharded = set(expert_parameters(module))
    ignored = [name for name, p in module.named_parameters() if p in sharded]
    ignored += getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    return module


def expert_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that :func:`parallelize_experts` has spread over ranks."""
    for experts in module.modules():
        if isinstance(experts, ParallelExperts):
            for name in _SHARDED:
                yield getattr(experts, name)


def average_gradients_(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Average the gradients of replicated parameters over ranks, in place.

    What DistributedDataParallel does during backward, for training loops without it. A parameter
    that was used on no rank keeps no gradient; one that was used on some counts as zero on the
    others. Sharded parameters (DTensors) are left as they are.

    Args:
        module: the same on all ranks.
        group: ranks that hold replicas; None: all processes.

    Raises:
        RuntimeError: torch.distributed is not initialised, or a peer failed or did not call this
            within the group's timeout.
    """
    _require_processes()
    replicated = [p for p in module.parameters() if p.requires_grad and not _is_sharded(p)]
    if not replicated:
        return
    flags = [p.grad is not None for p in replicated]
    used = torch.tensor(flags, dtype=torch.int32, device=replicated[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group)
    pending = []
    for parameter, anywhere in zip(replicated, used.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            work = dist.all_reduce(parameter.grad, group=group, async_op=True)
            pending.append((parameter.grad, work))
    for grad, work in pending:
        work.wait()
        grad.div_(dist.get_world_size(group))


def clip_gradients_(module: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their 2-norm, over all ranks, is at most ``max_norm``.

    ``torch.nn.utils.clip_grad_norm_`` refuses DTensors beside plain tensors, and DTensors of
    different meshes. Call it after replicated gradients have been averaged.

    Args:
        module: the same on all ranks.
        max_norm: greatest norm.

    Returns:
        The norm before, a scalar on every rank.
    """
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.grad is not None:
            kinds.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms: list[Any] = [
        nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])
        for kind in kinds.values()
    ]
    if not norms:
        return torch.zeros(())
    norms = [norm.full_tensor() if _is_sharded(norm) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for parameters in kinds.values():
        nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _shard(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """A DTensor of this rank's block of a whole tensor, in memory of its own."""
    from torch.distributed.tensor import DTensor, Shard

    own = block_of(whole.shape[0], mesh.size(), mesh.get_local_rank())
    device = whole.device if whole.is_meta else torch.device(mesh.device_type)
    local = whole[own.start : own.stop].to(device, copy=True).contiguous()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _require_processes() -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised; call torch.distributed.init_process_group() "
            "first, in processes started by torchrun"
        )


def _found(module: nn.Module) -> list[Experts]:
    """The experts of a module, of which none is spread yet."""
    _require_processes()
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "module: is wrapped by DistributedDataParallel, which holds on to whole experts; "
            "spread the experts first and wrap the result"
        )
    found = [(name, part) for name, part in module.named_modules() if isinstance(part, Experts)]
    if not found:
        raise ValueError(
            "module: has no weightshare.moe.Experts; build its layers as weightshare.moe.MoE"
        )
    for name, experts in found:
        where = f"module: {name or 'it'}"
        if isinstance(experts, ParallelExperts):
            raise ValueError(f"{where} is spread over ranks already; call this once a model")
        if any(_is_sharded(p) for p in experts.parameters()):
            raise ValueError(
                f"{where} has DTensor parameters; spread the experts before fully_shard"
            )
        if type(experts) is not Experts:
            raise TypeError(
                f"{where} is a {type(experts).__name__}, whose forward may differ from that of "
                "Experts; give its forward parallel_moe_mlp instead"
            )
    return [experts for _, experts in found]


def _mesh(group, device: torch.device) -> DeviceMesh:
    """The group as a mesh of one dimension that this rank is in."""
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group: the mesh has {group.ndim} dimensions {group.mesh_dim_names}; give one of "
                'them, such as mesh["ep"]'
            )
        if group.get_coordinate() is None:
            raise ValueError(f"group: rank {dist.get_rank()} is not in the mesh {group}")
        return group
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"group: rank {dist.get_rank()} is not in it; call this on its members alone"
        )
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: expected a DeviceMesh or a ProcessGroup, got {type(group).__name__}"
        )
    kind = "cuda" if dist.get_backend(group) == "nccl" else device.type
    return DeviceMesh.from_group(group, "cpu" if kind == "meta" else kind)


def _agree(found: list[Experts], group) -> None:
    """Require the same experts on all ranks: else the first exchange would wait for ever."""
    own = [
        (name, tuple(p.shape), str(p.dtype))
        for part in found
        for name, p in part.named_parameters()
    ]
    each: list[Any] = [None] * group.size()
    dist.all_gather_object(each, own, group)
    for rank, other in enumerate(each):
        if other != own:
            raise ValueError(
                f"module: rank {rank} of the group has experts {other}, but this rank has {own}; "
                "build the same model on all ranks"
            )
