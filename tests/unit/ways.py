"""Training loops as people write them, each beside the same in bare torch.

A way is (loop, bare): the loop takes a worker, the bare one takes batches and yields mean losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn import functional

Losses = Iterator[float]
Batches = Iterable[dict[str, torch.Tensor]]


def make_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


def summed(net: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(net(batch["x"]).float(), batch["y"], reduction="sum")


def mean_gradients(net: torch.nn.Module, rows: int) -> None:
    for p in net.parameters():
        if p.grad is not None:
            p.grad /= rows


def autocast(net: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        scores = net(batch["x"])
    assert scores.dtype == torch.bfloat16
    return functional.cross_entropy(scores.float(), batch["y"], reduction="sum")


def autocast_loop(worker: Any) -> None:
    net = make_net()
    worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.01))
    for batch in worker.batches():
        worker.step(autocast(net, batch))


def autocast_bare(batches: Batches) -> Losses:
    net = make_net()
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    for batch in batches:
        loss = autocast(net, batch) / len(batch["y"])
        opt.zero_grad()
        loss.backward()
        opt.step()
        yield loss.item()


def pieces(batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    for x, y in zip(batch["x"].split(7), batch["y"].split(7), strict=True):
        yield {"x": x, "y": y}


def accumulate(net: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(())
    for piece in pieces(batch):
        loss = summed(net, piece)
        loss.backward()
        total += loss.detach()
    return total


def accumulation_loop(worker: Any) -> None:
    net = make_net()
    worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.01))
    for batch in worker.batches():
        worker.step(accumulate(net, batch))


def accumulation_bare(batches: Batches) -> Losses:
    net = make_net()
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    for batch in batches:
        opt.zero_grad()
        total = accumulate(net, batch)
        mean_gradients(net, len(batch["y"]))
        opt.step()
        yield total.item() / len(batch["y"])


def clipping_loop(worker: Any) -> None:
    net = make_net()
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9))
    for batch in worker.batches():
        worker.step(summed(net, batch), clip=0.1)


def clipping_bare(batches: Batches) -> Losses:
    net = make_net()
    opt = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    for batch in batches:
        loss = summed(net, batch) / len(batch["y"])
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        opt.step()
        yield loss.item()


def schedule_of(opt: torch.optim.Optimizer) -> Any:
    warm = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=4)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)
    return torch.optim.lr_scheduler.SequentialLR(opt, [warm, fall], milestones=[4])


def schedule_loop(worker: Any) -> None:
    net = make_net()
    opt = torch.optim.AdamW(net.parameters(), lr=0.05)
    schedule = schedule_of(opt)
    worker.attach(net=net, opt=opt, schedule=schedule)
    for batch in worker.batches():
        worker.step(summed(net, batch))
        schedule.step()


def schedule_bare(batches: Batches) -> Losses:
    net = make_net()
    opt = torch.optim.AdamW(net.parameters(), lr=0.05)
    schedule = schedule_of(opt)
    for batch in batches:
        loss = summed(net, batch) / len(batch["y"])
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        yield loss.item()


def optimisers_of(net: Any) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    return (
        torch.optim.Adam(net[0].parameters(), lr=0.01),
        torch.optim.SGD(net[2].parameters(), lr=0.1),
    )


def optimisers_loop(worker: Any) -> None:
    net = make_net()
    low, high = optimisers_of(net)
    worker.attach(net=net, low=low, high=high)
    for batch in worker.batches():
        worker.step(summed(net, batch))


def optimisers_bare(batches: Batches) -> Losses:
    net = make_net()
    both = optimisers_of(net)
    for batch in batches:
        loss = summed(net, batch) / len(batch["y"])
        net.zero_grad()
        loss.backward()
        for opt in both:
            opt.step()
        yield loss.item()


def sign_step(net: torch.nn.Module) -> None:
    """A rule of one's own: fixed steps against the gradient's sign, nothing else."""
    with torch.no_grad():
        for p in net.parameters():
            if p.grad is not None:
                p -= 0.002 * p.grad.sign()


def own_rule_loop(worker: Any) -> None:
    net = make_net()
    worker.attach(net=net)
    for batch in worker.batches():
        found = torch.autograd.grad(summed(net, batch), list(net.parameters()))
        for p, gradient in zip(net.parameters(), found, strict=True):
            p.grad = gradient.clamp(-1e3, 1e3)  # a backward pass of one's own
        loss = summed(net, batch).detach()
        worker.step(loss, update=lambda: sign_step(net))


def own_rule_bare(batches: Batches) -> Losses:
    net = make_net()
    for batch in batches:
        loss = summed(net, batch)
        net.zero_grad()
        loss.backward()
        mean_gradients(net, len(batch["y"]))
        sign_step(net)
        yield loss.item() / len(batch["y"])


def two_nets_loop(worker: Any) -> None:
    """Turn and turn about: one net in even steps, the other in odd ones, as a GAN does."""
    nets = [make_net(), make_net()]
    opts = [torch.optim.Adam(n.parameters(), lr=0.01) for n in nets]
    worker.attach(a=nets[0], b=nets[1], opt_a=opts[0], opt_b=opts[1])
    for batch in worker.batches():
        turn = worker.step_number % 2
        worker.step(summed(nets[turn], batch), update=opts[turn].step)


def two_nets_bare(batches: Batches) -> Losses:
    nets = [make_net(), make_net()]
    opts = [torch.optim.Adam(n.parameters(), lr=0.01) for n in nets]
    for number, batch in enumerate(batches):
        loss = summed(nets[number % 2], batch) / len(batch["y"])
        opts[number % 2].zero_grad()
        loss.backward()
        opts[number % 2].step()
        yield loss.item()


def compiled_loop(worker: Any, backend: str = "aot_eager") -> None:
    net: Any = torch.compile(make_net(), backend=backend, dynamic=True)
    worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.01))
    for batch in worker.batches():
        worker.step(summed(net, batch))


def compiled_bare(batches: Batches) -> Losses:
    net = make_net()
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    for batch in batches:
        loss = summed(net, batch) / len(batch["y"])
        opt.zero_grad()
        loss.backward()
        opt.step()
        yield loss.item()


WAYS: dict[str, tuple[Callable[[Any], None], Callable[[Batches], Losses], float]] = {
    "bf16 autocast": (autocast_loop, autocast_bare, 2e-2),
    "accumulation": (accumulation_loop, accumulation_bare, 1e-4),
    "clipping": (clipping_loop, clipping_bare, 1e-4),
    "a schedule": (schedule_loop, schedule_bare, 1e-4),
    "several optimisers": (optimisers_loop, optimisers_bare, 1e-4),
    "a rule of one's own": (own_rule_loop, own_rule_bare, 1e-3),
    "two nets in turn": (two_nets_loop, two_nets_bare, 1e-4),
    "a compiled net": (compiled_loop, compiled_bare, 1e-4),
}
"""Name to loop, bare loop, and how far losses may be apart, as a share. In bf16 a sum over rows is
rounded to 8 bits in each slice; a step by the sign alone turns around at a gradient near 0."""
