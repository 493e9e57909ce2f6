"""One training step of many subnets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from weightshare.supernet.samplers import ArchSampler
from weightshare.supernet.supernet import Supernet
from weightshare_kernels import accumulate_in_place


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Distillation loss ``T^2 KL(teacher || student)``, the mean over all but the last axis.

    Args:
        student: logits ``[..., classes]``.
        teacher: logits of the same shape; a constant.
        temperature: by which both are divided; T^2 keeps the size of the gradients.

    Source: Hinton et al., 2015, arXiv 1503.02531.
    """
    classes = student.shape[-1]
    ours = F.log_softmax(student / temperature, -1).view(-1, classes)
    theirs = F.log_softmax(teacher.detach() / temperature, -1).view(-1, classes)
    kl = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return kl * temperature**2


def sandwich_step(
    supernet: Supernet,
    sampler: ArchSampler,
    step: int,
    forward: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    *,
    distill: Callable[[Tensor, Tensor], Tensor] | None = kl_divergence,
    teacher: Tensor | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> list[Tensor]:
    """Run a batch through the subnets of a step and accumulate the gradients of all their losses.

    The first subnet, the largest one in a sandwich, learns from the data; the others learn what
    it says. There is one backward pass per subnet, and gradients are summed in place: no
    full-size gradient per subnet. Zero the gradients before, step the optimizer after. The active
    subnet is afterwards what it was before.

    Under DDP ranks talk once, in the last backward pass, which also takes that of the first
    subnet: the largest uses every parameter, so none is missing where the last subnet skips
    layers, and ``find_unused_parameters`` is not needed. (With a sampler that does not start with
    the largest, give ``Layers`` the option ``zero_grads``.) Under FSDP2 nothing is special.

    Args:
        supernet: its ``model`` is what ``forward`` calls, DDP's wrapper if there is one.
        sampler: says which subnets; a :class:`SandwichSampler` for the sandwich rule.
        step: number of the step, for the sampler.
        forward: runs the batch through ``supernet.model`` and returns the logits.
        loss: of an output against the data.
        distill: loss of an output against the teacher's; None: all subnets learn from the data,
            as with a :class:`FairSampler`.
        teacher: output of another network, in place of the first subnet's; the first then learns
            from both it and the data.
        backward: how to run a backward pass, such as a gradient scaler's.

    Returns:
        The loss of each subnet, detached, in the order of the draws.

    Raises:
        ValueError: there is a teacher, but ``distill`` is None.

    Source: Universally Slimmable Networks (Yu & Huang, 2019, arXiv 1903.05134).

    Example::

        sampler = SandwichSampler(space, random=2)
        for step, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            sandwich_step(supernet, sampler, step, lambda: supernet.model(x),
                          lambda logits: F.cross_entropy(logits, y))
            optimizer.step()
    """
    if teacher is not None and distill is None:
        raise ValueError("teacher: is not used without distill; pass a loss against its output")
    model = supernet.model
    ddp = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
    archs = [draw.arch for draw in sampler.sample(step)]
    losses: list[Tensor] = []
    held: list[Tensor] = []  # under DDP: the first subnet's loss, until the last pass
    with supernet.space.restored():
        for arch in archs:
            first, last = not losses, len(losses) == len(archs) - 1
            supernet.set_active_subnet(arch)
            with ddp.no_sync() if ddp and not last else contextlib.nullcontext():
                output = forward()
            value = loss(output) if first or distill is None else output.new_zeros(())
            if distill is not None and teacher is not None:
                value = value + distill(output, teacher)
            losses.append(value.detach())
            if teacher is None:
                teacher = output.detach()
            if ddp and first and not last:
                held.append(value)
            elif ddp and last:
                backward(sum(held, start=value))
            else:
                with accumulate_in_place():
                    backward(value)
    return losses
