"""Several processes that train as one: those that torchrun started, and the few exchanges between them.

W processes share a batch of B images: process r has rows r B / W to (r + 1) B / W. In one process each exchange is an identity,
so code that uses them reads, and computes, as if there were no others.
"""

import contextlib
import datetime
import math
import os
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from tutorial_moco.errors import BadPicture, DataError, LostProcess, UsageError

BEAT = 1.0  # seconds between two signs of life
JOINING = 1800.0  # seconds for all to arrive, which may read a list of a million pictures first
_heart: "Heart | None" = None


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, as its environment tells, until the end of the block; alone it does nothing.

    Tensors on GPUs travel by NCCL, others by gloo. At the end all wait for the last.

    Raises:
        UsageError: there are more processes on this machine than GPUs.
        LostProcess: another one has ended without a word, is frozen, or cannot be reached.
    """
    global _heart
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    device = _own_gpu()
    store, r, W = next(rendezvous("env://"))
    store = dist.PrefixStore(_room(store, r, W), store)
    # No exchange has a time-out: a long evaluation is none's fault, and who is silent is the heart's business.
    backend = "cpu:gloo,cuda:nccl" if device else "gloo"
    dist.init_process_group(backend, store=store, rank=r, world_size=W, timeout=datetime.timedelta(days=30), device_id=device)
    _heart = Heart(dist.PrefixStore("beats", store.clone()), r, W, _silence())
    try:
        yield
        dist.barrier()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what gloo says when a connection is gone
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it at once, and nobody would say what has happened
        if lost := _heart.lost():
            raise LostProcess(lost) from error
        raise
    finally:
        _heart.stopped.set()
        _heart = None
        dist.destroy_process_group()


def _room(store: dist.Store, r: int, W: int) -> str:
    """A name that these W processes share, and none before them.

    torchrun's store outlives the processes that it starts again, and with it the addresses of those before: without a name of
    their own, a process may call one that is gone. No count of starts that all agree on is to be had (torchrun's own differs
    between machines), so the first process asks who is there: each leaves a name that it has just drawn, and finds its answer.
    """
    me, end = uuid.uuid4().hex, time.monotonic() + JOINING
    if r:
        store.set(f"here/{r}", me)
        try:
            store.wait([f"room/{me}"], datetime.timedelta(seconds=JOINING))
        except RuntimeError as error:
            raise LostProcess(f"process 0 was not met within {JOINING / 60:.0f} minutes") from error
        room = store.get(f"room/{me}").decode()
        store.set(f"{room}/{r}", "met")
        return room
    missing = list(range(1, W))
    while missing:
        for other in missing:
            if store.check([f"here/{other}"]):  # who was there before does not answer
                store.set(f"room/{store.get(f'here/{other}').decode()}", me)
        missing = [other for other in missing if not store.check([f"{me}/{other}"])]
        if time.monotonic() > end:
            raise LostProcess(f"process {missing[0]} was not met within {JOINING / 60:.0f} minutes")
        time.sleep(0.02)
    return me


def _own_gpu() -> torch.device | None:
    if not torch.cuda.is_available():
        return None
    here, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
        raise UsageError(f"this machine has {gpus} GPUs: start at most so many processes on it (--nproc-per-node {gpus})")
    torch.cuda.set_device(here)
    return torch.device("cuda", here)


def _silence() -> float:
    """Seconds without a sign of life until a process is given up."""
    told = os.environ.get("TUTORIAL_MOCO_SILENCE", "60")
    if not told.replace(".", "", 1).isdigit() or float(told) < 3 * BEAT:
        raise UsageError(f"TUTORIAL_MOCO_SILENCE must be a number of seconds, at least {3 * BEAT:g}, not {told}")
    return float(told)


def at_step(step: int) -> None:
    """Tell the others how far this process is."""
    if _heart is not None:
        _heart.step = step


class Heart:
    """Tells the others each second that this process lives, and looks whether they do.

    Without it a process that is frozen, or behind a cut cable, would leave the others waiting, and none could say for whom.
    The first looks at all and writes down whom it has lost, the others look at the first and read: some W messages a second.
    """

    def __init__(self, store: dist.Store, r: int, W: int, silence: float):
        self.store, self.rank, self.silence, self.step, self.beats = store, r, silence, 0, 0
        self.heard = {other: ("1 0", time.monotonic()) for other in range(W) if other != r and 0 in (r, other)}
        self.verdict = ""  # the first process's
        self.alarm = math.inf  # when the first process heard that an exchange of others has failed
        self.stopped = threading.Event()
        for work in (self.talk, self.judge):  # two, because a talk over a cut cable does not come back
            threading.Thread(target=work, daemon=True).start()

    def talk(self) -> None:
        """Say how far this process is, and hear how far the others are."""
        while not self.stopped.wait(BEAT):
            self.beats += 1
            with contextlib.suppress(RuntimeError):  # the store is with the first process's torchrun: it may be gone
                self.store.set(str(self.rank), f"{self.beats} {self.step}")
                self.verdict = self.verdict or self.read("lost", "")
                if self.rank == 0 and self.read("failed", ""):
                    self.alarm = min(self.alarm, time.monotonic())
                for other, (before, _) in self.heard.items():
                    if (sign := self.read(str(other), before)) != before:
                        self.heard[other] = sign, time.monotonic()

    def read(self, key: str, otherwise: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else otherwise  # get would wait for it

    def judge(self) -> None:
        """End this process if another is silent for too long: the main thread may be waiting for it in an exchange."""
        while not self.stopped.wait(BEAT):
            alarmed = time.monotonic() - self.alarm > 3 * BEAT
            if lost := self.verdict or self.silent(2.5 * BEAT if alarmed else self.silence):
                print(f"tutorial-moco (process {self.rank}): {LostProcess(lost)}", file=sys.stderr, flush=True)
                self.spread(lost)
                os._exit(LostProcess.exit_status)

    def silent(self, seconds: float) -> str:
        """Who has not been heard of for so long, as a sentence; "" if all have."""
        now = time.monotonic()
        return " and ".join(
            f"process {other} has not been heard of for {now - when:.0f} s, since step {int(sign.split()[1]):,}"
            for other, (sign, when) in self.heard.items()
            if now - when > seconds
        )

    def spread(self, lost: str) -> None:
        """The first process tells the others, and gives them time to hear it."""
        if self.rank == 0:
            with contextlib.suppress(RuntimeError):
                self.store.set("lost", lost)
            time.sleep(3 * BEAT)

    def lost(self) -> str:
        """After an exchange has failed: who does not beat any more, as the first process sees it; "" if all do."""
        end = time.monotonic() + (4 * BEAT if self.rank == 0 else 10 * BEAT)
        with contextlib.suppress(RuntimeError):
            self.store.set("failed", str(self.rank))  # the first process may not have met it yet
        while time.monotonic() < end and not self.verdict:
            time.sleep(BEAT / 4)
        if lost := self.verdict or self.silent(2.5 * BEAT):
            self.spread(lost)
        return lost


def world() -> int:
    """W, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 .. W - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def mine(rows: Tensor) -> Tensor:
    """This process's rows (B / W, ...) of a batch (B, ...)."""
    return rows.chunk(world())[rank()]


def filled_up(rows: Tensor) -> Tensor:
    """Rows (n, ...) and some of the first ones again, so that there are as many for each process."""
    return rows[torch.arange(math.ceil(len(rows) / world()) * world()) % len(rows)]


def gather(rows: Tensor) -> Tensor:
    """All processes' rows (B, ...) of each one's own (B / W, ...), in the batch's order.

    The gradient comes back to the process that made a row, summed over the processes that used it.
    """
    return rows if world() == 1 else _Gather.apply(rows)


def gather_views(rows: Tensor, n: int) -> Tensor:
    """`gather` of rows that are V views of n images each, (V n, ...) to (V W n, ...): each view's in the batch's order."""
    return rows if world() == 1 else torch.cat([gather(view) for view in rows.split(n)])


def my_views(rows: Tensor, views: int) -> Tensor:
    """`mine` of rows that are so many views of a batch."""
    return rows if world() == 1 else torch.cat([mine(view) for view in rows.chunk(views)])


class _Gather(torch.autograd.Function):
    """torch.distributed.nn has one that is deprecated, and its successor is private."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return mine(grad)


def mean(*values: float | Tensor, device: torch.device) -> list[float]:
    """The mean of each number over the processes; one that is not finite anywhere makes it not finite everywhere."""
    return [value / world() for value in _reduced(values, dist.ReduceOp.SUM, device)]


def highest(*values: float, device: torch.device) -> list[float]:
    """The highest of each number over the processes: the time of the slowest, a signal that any of them has caught."""
    return _reduced(values, dist.ReduceOp.MAX, device)


def _reduced(values: Sequence[float | Tensor], how: dist.ReduceOp, device: torch.device) -> list[float]:
    values = [value.detach() if isinstance(value, Tensor) else value for value in values]
    if world() == 1:
        return [float(value) for value in values]
    stacked = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    dist.all_reduce(stacked, how)
    return stacked.tolist()


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Put the mean over the processes into float32 tensors, in one exchange."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, values in zip(tensors, (flat / world()).split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


def replica_of(module: nn.Module) -> nn.Module | None:
    """The module with its gradients averaged over the processes, overlapping with the backward pass; None if this one is alone.

    Buffers are not copied about at each step: they are equal by what they are made of.
    """
    if world() == 1:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the argument's new name came with torch 2.14
        return DistributedDataParallel(module, broadcast_buffers=False)


def unsent(replica: nn.Module | None):
    """Context in which gradients of a `replica_of` a module are summed up here, for a later backward pass to average."""
    return contextlib.nullcontext() if replica is None else replica.no_sync()


@torch.no_grad()
def copy_first_(module: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers: another processor may have rounded otherwise."""
    if world() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)


def every(value: object) -> list:
    """What each process has, in their order: small things, such as a name."""
    found = [value]
    if world() > 1:
        found = [None] * world()
        dist.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def one_for_all() -> Iterator[None]:
    """A mistake that a user can mend, made on any process in this block, is raised on all: none waits for who has given up."""
    told = None
    try:
        yield
    except (UsageError, DataError) as error:
        if world() == 1 or isinstance(error, BadPicture):  # the others may be in an exchange by then
            raise
        told = type(error), str(error)
    kind, message = next((one for one in every(told) if one), (None, ""))
    if kind:
        raise kind(message)


@contextlib.contextmanager
def one_after_another() -> Iterator[None]:
    """The first process of each machine does the block before the others of it: what it downloads or decodes, they find.

    If it fails they need not try. See `one_for_all`.
    """
    first = world() == 1 or int(os.environ["LOCAL_RANK"]) == 0
    with one_for_all():
        if first:
            yield
    with one_for_all():
        if not first:
            yield


def check_share(batch_size: int, accumulate: int = 1) -> None:
    """Whether W processes can share batches of B, each taken in so many parts.

    Raises:
        UsageError: the share of a process in a part is no whole number, or below 2.
    """
    shares = world() * accumulate
    if batch_size % shares or batch_size // shares < 2:
        parts = f"with --accumulate {accumulate} " * (accumulate > 1)
        raise UsageError(
            f"--batch-size {batch_size} {parts}is not to be shared by {world()} process{'es' * (world() > 1)}: "
            f"take a multiple of {shares}, {2 * shares} or more"
        )
