"""The one training loop: whichever mechanism keeps the dictionary, a step is the paper's Algorithm 1."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from tqdm.auto import tqdm

from tutorial_moco import official
from tutorial_moco.augment import AUGMENTATIONS, MEAN, STD, RecordedViews, one_view, plain_view, two_views
from tutorial_moco.checkpoint import load_checkpoint, pack, previous_of, save_checkpoint, unpack
from tutorial_moco.distributed import (
    at_step,
    average_,
    check_share,
    copy_first_,
    every,
    filled_up,
    gather,
    highest,
    mean,
    mine,
    one_for_all,
    rank,
    replica_of,
    unsent,
    world,
)
from tutorial_moco.encoded import EncodedImages, Making, in_turn
from tutorial_moco.encoders import Encoder, SplitBatchNorm2d, build_encoder
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.evaluate import extract_features, knn_top1, notebooks_knn_top1
from tutorial_moco.files import make_folder
from tutorial_moco.images import ImageSet
from tutorial_moco.lars import LARS
from tutorial_moco.losses import estimate_log_z, info_nce, nce, pretext_accuracy
from tutorial_moco.mechanisms import Contrast, EndToEnd, Mechanism, MemoryBank, MoCo, MoCoV3, SimCLR
from tutorial_moco.randomness import permutation
from tutorial_moco.recipes import Recipe
from tutorial_moco.speed import (
    autocast,
    choose_precision,
    default_device,
    grad_scaler,
    keep_freed_memory,
    machine_memory,
    mark,
    peak_memory_bytes,
    products_in,
    reset_peak_memory,
    synchronize,
)
from tutorial_moco.stopping import Stop

STEPS = (0.6, 0.8)  # of the training, where the paper's schedule takes a tenth: epochs 120 and 160 of 200
UNSCALED = ("--precision float32", "a lower --lr")  # mends where float16 does not reach
SAVE_EVERY = 600  # seconds, beside the saves at each reading of the kNN
AHEAD = 3  # batches of encoded images that are made beside the one in use
LOG_EVERY = 10  # steps between two points of the loss curve
MONITOR_TRAIN, MONITOR_TEST = 10_000, 2_000  # images of the quick kNN during training


@dataclass
class Run:
    """A training: what it is, how far it is, and what was seen on the way. With the data, all that resuming needs."""

    recipe: Recipe
    mechanism: Mechanism
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype
    n: int  # training images
    data_hash: str = ""  # theirs: a run does not go on with others
    step: int = 0
    seconds: float = 0.0  # of training; evaluation is not counted
    stalled: float = 0.0  # of them in which the encoders waited for images; on a GPU at most so many
    window: list[float] = field(default_factory=list)  # losses since the last point of the curve
    pretext_accuracy: float = 0.0  # of the last step that `is_logged`
    losses: list[dict[str, float]] = field(default_factory=list)  # the curve, a point every LOG_EVERY steps
    monitor: list[dict[str, float]] = field(default_factory=list)  # the kNN during training
    peak_memory_bytes: int = 0
    device: torch.device = field(default_factory=default_device)
    views: Callable[..., tuple[Tensor, Tensor]] = two_views
    replica: nn.Module | None = None  # of several processes: the mechanism, with gradients averaged over all
    undo: "Undo | None" = None

    def __post_init__(self) -> None:
        self.scaler = grad_scaler(self.device, self.dtype)

    @property
    def images_seen(self) -> int:
        return self.step * self.recipe.batch_size

    @property
    def stall_percent(self) -> float:
        """Share of the training's time in which the encoders waited for images, in percent."""
        return 100 * self.stalled / self.seconds if self.seconds else 0.0

    def summary(self) -> dict[str, object]:
        """The run's own figures, under the names that every result of this package uses."""
        stall = {"data_stall_percent": round(self.stall_percent, 1)} if self.recipe.view_size else {}
        return {
            "mechanism": self.recipe.mechanism,
            "seed": self.recipe.seed,
            "steps": self.step,
            "images_seen": self.images_seen,
            "train_seconds": round(self.seconds, 2),
            "images_per_second": round(self.images_seen / self.seconds, 1) if self.seconds else 0.0,
            "dictionary_bytes": self.mechanism.dictionary_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "precision": str(self.dtype).removeprefix("torch."),
            **stall,
        }


def pretrain(
    recipe: Recipe,
    train: ImageSet,
    test: ImageSet | None = None,
    *,
    minutes: float | None = None,
    out: Path | None = None,
    monitor: int | Sequence[int] = 5,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    progress: bool = True,
) -> Run:
    """Pre-train an encoder without labels.

    Args:
        recipe: the settings.
        train: the images; their labels serve the kNN monitor only.
        test: images for the kNN monitor; without them there is none.
        minutes: stop after this much training time, the schedule fitted to it, in place of ``recipe.epochs``.
        out: folder for ``checkpoint.safetensors``; if it holds one of the same recipe, the run goes on from there.
        monitor: how many times the quick kNN is taken, or after which of the recipe's epochs.
        dtype: number format of the encoders; measured and chosen if None.
        compile: let torch.compile write the encoders' kernels: about a minute once, and on a GPU then faster steps.

    Raises:
        UsageError: fewer images than a batch; K or minutes out of range; ``out`` holds a run of another recipe or number
            format; the loss is not finite any more.
        DataError: ``out`` cannot be written, or what it holds is damaged; of several processes one has other images.
        KeyboardInterrupt, SystemExit: stopped by Ctrl-C or SIGTERM, after the step at hand is finished and saved.
    """
    check(recipe, len(train), minutes)
    device = device or default_device()
    keep_freed_memory()
    reset_peak_memory(device)
    with one_for_all():
        run = start(recipe, train, device, dtype, compile=compile)
        if out is not None:
            if not rank():
                make_folder(out)
            resume(run, out, dtype)
    check_all_agree(
        ("images", "bring the same to each machine", run.data_hash),
        (f"steps in --out {out}", "name a folder that all machines share", run.step),
    )
    steps_of_epoch = len(train) // recipe.batch_size
    total = 60 * minutes if minutes else recipe.epochs * steps_of_epoch
    moments = [(i + 1) / monitor for i in range(monitor)] if isinstance(monitor, int) else [e / recipe.epochs for e in monitor]
    saved, caught, worked = time.monotonic(), 0, None
    feed = closing(fed(run, train.images))
    with Stop() as stop, progress_bar(run, total, bool(minutes), progress) as bar, feed as feed:
        while True:
            done = (run.seconds if minutes else run.step) / total
            seen = run.monitor[-1]["step"] if run.monitor else -1
            if test is not None and seen < run.step and len(run.monitor) < sum(done > moment - 1e-9 for moment in moments):
                watch(run, train, test)
                saved = -math.inf
                (caught,) = highest(stop.caught or 0, device=device)
            if out is not None and time.monotonic() - saved > SAVE_EVERY:
                save_run(run, out)
                saved = time.monotonic()
            if done >= 1 or caught:
                break
            set_learning_rate(run.optimizer, recipe, done)
            if recipe.m_rises:
                run.mechanism.m = 1 - (1 - recipe.m) * cosine(done)
            start_time = time.perf_counter()
            epoch, index, images = next(feed)
            if worked is None or worked.query():  # a GPU that is still at the last step does not wait
                run.stalled += time.perf_counter() - start_time
            loss, contrast = train_step(run, images, index, epoch)
            worked = mark(device)
            run.window.append(loss)
            if is_logged(run.step):
                log(run, contrast, steps_of_epoch)
            spent = time.perf_counter() - start_time  # on a GPU up to the loss: the rest of a step runs into the next
            spent, caught = highest(spent, stop.caught or 0, device=device)  # all processes stop after the same step
            run.seconds += spent
            show(bar, run, spent if minutes else 1)
        bar.close()  # a line may be said below it
        synchronize(device)
        run.peak_memory_bytes = max(run.peak_memory_bytes, peak_memory_bytes(device))
        if out is not None:
            save_run(run, out)
        stop.obey(device, f"step {run.step:,} is done and saved in {out}" if out else "")
    return run


def train_step(run: Run, images: Tensor, index: Tensor, epoch: int) -> tuple[float, Contrast]:
    """Algorithm 1 of the paper: all that its loop does with a batch.

    Args:
        images: uint8 (N, 3, H, W), those that `part` names of the batch, or crops of them, as `fed` gives them.
        index: int64 (B,), the numbers of the whole batch's images.

    Returns:
        The loss, the mean over the batch, and what it was made of.

    Raises:
        UsageError: the loss or its gradient is not finite; all that the run holds is as it was before the step. (A gradient
            that is so once in float16 is left out.)
    """
    mechanism = run.mechanism
    if run.undo:
        run.undo.keep()
    run.optimizer.zero_grad()
    *first, last = zip(images.chunk(run.recipe.accumulate, dim=-4), parts_of(run, index), strict=True)
    with unsent(run.replica):
        found = [find_gradient(run, *part, epoch) for part in first]
    value, contrast, index = joined([*found, find_gradient(run, *last, epoch)])
    if not images.is_cuda and not run.scaler.is_enabled():  # on a GPU a second wait in a step; the next loss will show it
        norm = get_total_norm([p.grad for p in mechanism.parameters() if p.grad is not None]).item()
        if not math.isfinite(norm):
            _refuse(run, f"the gradient's length is {norm} at step {run.step + 1}, where the loss is {value:.3g}")
    if not take_step(run.scaler, run.optimizer):
        _refuse(run, f"the gradient is not finite at step {run.step + 1}, however little the loss is scaled", *UNSCALED)
    if is_logged(run.step + 1):  # before the queue is written: it is what contrast.negatives looks at
        (run.pretext_accuracy,) = mean(pretext_accuracy(*contrast), device=images.device)
    mechanism.update_key_encoder()
    mechanism.update_dictionary(contrast, index)
    if run.undo:
        average_(run.undo.means)
    run.step += 1
    at_step(run.step)
    return value, contrast


def find_gradient(run: Run, images: Tensor, index: Tensor, epoch: int) -> tuple[float, Contrast, Tensor]:
    """Views, a look into the dictionary, the loss and its gradient; of a batch, or of one of its parts.

    Returns:
        Its share of the loss, what that was made of, and the numbers of this process's images.
    """
    with products_in(run.dtype):
        batch = views_of(run, images, index, epoch)
        index = mine(index)
        with autocast(images.device, run.dtype):
            contrast = (run.replica or run.mechanism.contrast)(*batch)
        loss = loss_of(run, contrast) / run.recipe.accumulate
        (value,) = mean(loss, device=images.device)
        if not math.isfinite(value):
            _refuse(run, f"the loss is {value} at step {run.step + 1}, {_not_finite(contrast, index)}")
        run.scaler.scale(loss).backward()
    if run.recipe.accumulate > 1:  # a compiled encoder writes the next part's over these
        contrast = contrast._replace(q=contrast.q.detach().clone(), k=contrast.k.clone())
    return value, contrast, index


def joined(parts: list[tuple[float, Contrast, Tensor]]) -> tuple[float, Contrast, Tensor]:
    """What `find_gradient` gave of the parts of a batch, as if it had been one. The negatives were the same for all."""
    if len(parts) == 1:
        return parts[0]
    values, contrasts, index = zip(*parts, strict=True)
    q, k, negatives, exclude = zip(*contrasts, strict=True)
    excluded = None if exclude[0] is None else torch.cat(exclude)
    return sum(values), Contrast(torch.cat(q), torch.cat(k), negatives[0], excluded), torch.cat(index)


class Undo:
    """BatchNorm's running statistics, the only thing that reading a dictionary changes, and what they were before a step."""

    def __init__(self, mechanism: Mechanism):
        buffers = dict(mechanism.named_buffers())
        self.means = [tensor for name, tensor in buffers.items() if ".running_" in name]
        self.counts = [tensor for name, tensor in buffers.items() if name.endswith("num_batches_tracked")]
        self.before = [[tensor.clone() for tensor in kind] for kind in (self.means, self.counts)]

    def keep(self) -> None:
        self._copy((self.means, self.counts), self.before)

    def restore(self) -> None:
        self._copy(self.before, (self.means, self.counts))

    def _copy(self, source, target) -> None:
        for now, then in zip(source, target, strict=True):
            if now:
                torch._foreach_copy_(then, now)  # a call for all: on a GPU each costs more than its work


def take_step(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """The optimizer's step. In float16 one whose gradient overflows is left out, and the loss is scaled by half as much then.

    Returns:
        False if it was left out though the loss is hardly scaled any more; the scale stays as it was.
    """
    scaler.step(optimizer)
    scaler.update()
    if not scaler.is_enabled() or (scale := scaler.get_scale()) >= 1:
        return True
    scaler.update(2 * scale)
    return False


def _refuse(run: Run, what: str, *mends: str) -> NoReturn:
    """End a step of which nothing has been written but the statistics."""
    if run.undo:
        run.undo.restore()
    run.optimizer.zero_grad()
    raise UsageError(f"{what}: try {' or '.join(mends or ('a lower --lr', 'a higher --temperature'))}")


def fed(run: Run, images: Tensor | EncodedImages) -> Iterator[tuple[int, Tensor, Tensor]]:
    """From the run's step on, without end: epoch, index (B,) of the whole batch, and the images that `train_step` takes of it.

    Encoded images are made by threads while the steps before are at work.
    """
    n, recipe = run.n, run.recipe
    if not isinstance(images, EncodedImages):
        images = images.to(run.device)
        for epoch, index in batches(n, recipe, run.step, run.device):
            yield epoch, index, images.index_select(0, part(run, index))

    def begun() -> Iterator[tuple[tuple[int, Tensor], Making]]:
        for step, (epoch, index) in enumerate(batches(n, recipe, run.step, "cpu"), run.step):
            own = part(run, index, step)
            both = own.expand(2, -1)  # queries' images and keys'
            if shuffled(run):
                both = own.view(recipe.accumulate, 2, -1).transpose(0, 1).flatten(1)
            yield (epoch, index), images.crops(both, recipe.augmentation, seed=recipe.seed, epoch=epoch)

    for (epoch, index), crops in in_turn(begun(), AHEAD):
        yield epoch, index.to(run.device), crops.to(run.device, non_blocking=True)


def shuffled(run: Run) -> bool:
    """Whether keys are of other images than this process's queries: then the loader shuffles, and keys travel."""
    return run.recipe.shuffle and world() > 1


def parts_of(run: Run, index: Tensor) -> Sequence[Tensor]:
    """The parts of a batch (B,) that are taken one after another: each has the next rows of every process."""
    return index.view(world(), run.recipe.accumulate, -1).transpose(0, 1).flatten(1).unbind()


def part(run: Run, index: Tensor, step: int | None = None) -> Tensor:
    """Numbers of the images that this process needs of a batch (B,) at this step, or another: its queries', and its keys' if
    those are `shuffled`; of a batch in parts, of one part after another.
    """
    rows = []
    for few in parts_of(run, index):
        rows.append(mine(few))
        if shuffled(run):
            rows.append(mine(few[run.mechanism.order(len(few), step, few.device)]))
    return torch.cat(rows)


def views_of(run: Run, images: Tensor, index: Tensor, epoch: int) -> tuple[Tensor, ...]:
    """What `contrast` takes: views of the images of `part`, numbers of the queries' images, and the order of shuffled keys."""
    own, how = mine(index), {"seed": run.recipe.seed, "epoch": epoch}
    if not shuffled(run):
        return *run.views(images, own, run.recipe.augmentation, **how), own
    order, cropped = run.mechanism.order(len(index)), images.dim() == 5
    queries, keys = images if cropped else images.split(len(own))
    view_q = one_view(queries, own, run.recipe.augmentation, 0, cropped=cropped, **how)
    view_k = one_view(keys, mine(index[order]), run.recipe.augmentation, 1, cropped=cropped, **how)
    return view_q, view_k, own, order


def _not_finite(contrast: Contrast, index: Tensor) -> str:
    """Which images of the batch have a query or a key that is not finite; both views' rows if the loss is symmetric."""
    finite = contrast.q.isfinite().all(dim=1) & contrast.k.isfinite().all(dim=1)
    finite, index = gather(finite.view(-1, len(index)).all(dim=0)), gather(index)
    numbers = index[~finite].tolist()
    if not numbers:
        return "though each query and key is finite"
    if len(numbers) == len(index):
        return "in each image of the batch"
    return f"in the training images {', '.join(map(str, numbers[:5]))}" + " …" * (len(numbers) > 5)


def loss_of(run: Run, contrast: Contrast) -> Tensor:
    """The recipe's loss of one step, a scalar."""
    q, k, negatives, exclude = contrast
    temperature = run.recipe.temperature
    if run.recipe.loss == "info_nce":
        return info_nce(q, k, negatives, temperature, exclude)
    log_z = estimate_log_z(gather(q.detach()), negatives, temperature, run.n)
    return nce(q, k, negatives, temperature, run.n, log_z, exclude)


def descend(
    net: nn.Module,
    recipe: Recipe,
    n: int,
    loss_of: Callable[[int, Tensor], Tensor],
    *,
    dtype: torch.dtype,
    title: str,
    progress: bool,
) -> tuple[list[dict[str, float]], float]:
    """The loop without a dictionary, for labels and for painting: the recipe's batches, optimizer and schedule.

    Args:
        net: on the device where it is to be trained. n: images.
        loss_of: of an epoch and the numbers (B,) of a batch's images, a scalar; its layers are computed in ``dtype``.

    Returns:
        A point of the loss curve for each step, and seconds of training.

    Raises:
        UsageError: the loss is not finite; the weights are those before that step.
    """
    keep_freed_memory()
    device, optimizer = next(net.parameters()).device, build_optimizer(recipe, net)
    scaler = grad_scaler(device, dtype)
    total, curve, began = recipe.epochs * (n // recipe.batch_size), [], time.perf_counter()
    steps = islice(batches(n, recipe, 0, device), total)
    for step, (epoch, index) in enumerate(tqdm(steps, title, total, disable=not progress, file=sys.stderr), 1):
        set_learning_rate(optimizer, recipe, (step - 1) / total)
        loss = loss_of(epoch, index)
        value = loss.item()
        if not math.isfinite(value):
            raise UsageError(f"the loss is {value} at step {step}: try a lower --lr")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if not take_step(scaler, optimizer):
            raise UsageError(f"the gradient is not finite at step {step}: try {' or '.join(UNSCALED)}")
        curve.append({"step": step, "images_seen": step * recipe.batch_size, "loss": value})
    return curve, time.perf_counter() - began


def batches(n: int, recipe: Recipe, step: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(epoch, index (B,)) from the given step on, without end; each epoch in its own order, an odd rest left out."""
    steps = n // recipe.batch_size
    while True:
        epoch = step // steps
        order = permutation(n, recipe.seed, epoch, device=device)
        for first in range(step % steps, steps):
            yield epoch, order[first * recipe.batch_size : (first + 1) * recipe.batch_size]
            step += 1


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, done: float) -> None:
    """Linear warm-up, then the recipe's schedule; ``done`` is the share of the training behind us, in [0, 1]."""
    if done < recipe.warmup:
        share = done / recipe.warmup
    elif recipe.schedule == "steps":
        share = 0.1 ** sum(done >= step for step in STEPS)
    else:
        share = cosine((done - recipe.warmup) / (1 - recipe.warmup))
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * share


def cosine(done: float) -> float:
    """Half a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


# Building, saving and going on ---------------------------------------------------------------------------------------


def check(recipe: Recipe, n: int, minutes: float | None) -> None:
    """What a recipe must satisfy for n images, and for the processes that share its batches."""
    check_share(recipe.batch_size, recipe.accumulate)
    if world() > 1 and recipe.shuffle and recipe.symmetric:
        raise UsageError(f"--shuffle with --symmetric is for one process, not {world()}: leave one of the two out")
    if recipe.batch_size > n:
        raise UsageError(f"--batch-size must be at most the number of training images, {n}, not {recipe.batch_size}")
    if recipe.mechanism == "memory_bank" and n - 1 < recipe.K:
        raise UsageError(f"--K must be at most {n - 1} for a memory bank of {n} images, not {recipe.K}")
    keys = {"moco": recipe.K, "memory_bank": n}.get(recipe.mechanism, 0)
    if (needed := keys * recipe.dim * 4) > machine_memory() // 2:
        which = f"--K {recipe.K}" if recipe.mechanism == "moco" else f"A bank of {n} images"
        raise UsageError(f"{which} with --dim {recipe.dim} takes {needed / 2**30:,.1f} GiB, over half of this machine's memory")
    if minutes is not None and not (0 < minutes < math.inf):
        raise UsageError(f"--minutes must be above 0, not {minutes}")


def start(
    recipe: Recipe, train: ImageSet, device: torch.device, dtype: torch.dtype | None = None, *, compile: bool = False
) -> Run:
    """A run at step 0: encoder, mechanism, its first keys, and optimizer, all decided by the recipe's seed.

    Arguments as in `pretrain`.
    """
    torch.manual_seed(recipe.seed)
    size = train.images.size if isinstance(train.images, EncodedImages) else None
    if recipe.view_size != size:
        raise UsageError(f"--view-size {recipe.view_size} needs images that were loaded with it, not with {size}")
    few = 5000 if size is None else 128  # none of the encoders for large images looks at more
    sample = plain_view(train.images[permutation(len(train), recipe.seed)[:few]].to("cpu"))
    encoder = build_encoder(recipe.encoder, head=recipe.head, dim=recipe.dim, norm=recipe.norm, images=sample).to(device)
    check_parts(encoder, recipe)
    dtype = dtype or every(choose_precision(encoder, sample[:128].to(device)))[0]
    mechanism = build_mechanism(recipe, encoder, len(train)).to(device)
    copy_first_(mechanism)
    run = Run(recipe, mechanism, build_optimizer(recipe, mechanism), dtype, len(train), train.hash, device=device)
    if isinstance(mechanism, MemoryBank):
        fill_bank(run, train.images)
    if compile:  # at the end, since a bank is filled in batches of other lengths, and each would be compiled
        compile_run(run)
    run.replica, run.undo = replica_of(mechanism), Undo(mechanism)
    return run


def check_parts(encoder: Encoder, recipe: Recipe) -> None:
    """Of one image BatchNorm has no statistics where its map is a single pixel."""
    splits = max((module.splits for module in encoder.modules() if isinstance(module, SplitBatchNorm2d)), default=1)
    parts = splits * world() * recipe.accumulate
    if recipe.batch_size < 2 * parts:
        least = f"--batch-size must be at least {2 * parts}, two images for each part that BatchNorm sees"
        raise UsageError(f"{least}, not {recipe.batch_size}")


def compile_run(run: Run) -> None:
    """Let torch.compile write the encoders' kernels; on a GPU also launch each pass, and the views, as one recorded whole.

    A small network keeps a GPU waiting for the processor: of ResNet-18 on CIFAR-10 the launches take twice as long as the work.
    """
    torch.compiler.reset()  # of the runs before in this process: only eight versions of a call are kept
    on_gpu = run.device.type == "cuda"
    for encoder in run.mechanism.children():
        encoder.compile(dynamic=False, mode="reduce-overhead" if on_gpu else None)
    if on_gpu and not any(view.blur for view in AUGMENTATIONS[run.recipe.augmentation]):  # how many to blur is asked each time
        run.views = RecordedViews()


def fill_bank(run: Run, images: Tensor) -> None:
    """One pass of the untrained encoder gives each image a key to begin with; its time counts as training."""
    began = time.perf_counter()
    order = filled_up(permutation(run.n, run.recipe.seed, 0)).view(-1, world())
    for index in order.tensor_split(max(1, run.n // run.recipe.batch_size)):  # alike, none below a batch: for BatchNorm
        own = mine(index.flatten())
        with autocast(run.device, run.dtype):
            run.mechanism.fill(plain_view(images[own].to(run.device)), own.to(run.device))
    synchronize(run.device)
    (spent,) = highest(time.perf_counter() - began, device=run.device)
    run.seconds += spent


def build_mechanism(recipe: Recipe, encoder, n: int) -> Mechanism:
    """The recipe's mechanism around an encoder, for n images."""
    if recipe.mechanism == "moco":
        return MoCo(encoder, recipe.K, recipe.m, shuffle=recipe.shuffle, symmetric=recipe.symmetric, seed=recipe.seed)
    if recipe.mechanism == "memory_bank":
        return MemoryBank(encoder, n, recipe.K, recipe.bank_momentum, seed=recipe.seed)
    if recipe.mechanism == "moco_v3":
        return MoCoV3(encoder, recipe.m)
    return {"end_to_end": EndToEnd, "simclr": SimCLR}[recipe.mechanism](encoder)


def build_optimizer(recipe: Recipe, net: nn.Module) -> torch.optim.Optimizer:
    """SGD or LARS with momentum 0.9, or AdamW, over the parameters that have a gradient, many tensors to a call."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, foreach=True)
    if recipe.optimizer == "lars":
        return LARS(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(parameters, lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, foreach=True)


def save_run(run: Run, out: Path) -> None:
    """Everything that going on needs, into ``out/checkpoint.safetensors``; the one before stays beside it.

    All processes hold the same; the first one writes it.
    """
    if rank():
        return
    state = {
        "recipe": run.recipe.to_json(), "dtype": str(run.dtype).removeprefix("torch."), "step": run.step,
        "seconds": run.seconds, "window": run.window, "losses": run.losses, "monitor": run.monitor,
        "data_hash": run.data_hash, "stalled": run.stalled, "scaler": run.scaler.state_dict(),
        "peak_memory_bytes": max(run.peak_memory_bytes, peak_memory_bytes(run.device)),
    }  # fmt: skip
    tensors = pack(mechanism=run.mechanism, optimizer=run.optimizer)
    save_checkpoint(out / "checkpoint.safetensors", tensors, state, keep_previous=True)


def load_encoder(path: Path) -> tuple[Encoder, Recipe, dict[str, object]]:
    """The query encoder of a checkpoint, float32 on the CPU, the recipe it was trained by, and what else is told of it.

    ``mean`` and ``std`` are those of the images as it takes them; ``published`` is of the authors' files alone.

    Args:
        path: a checkpoint of this package, or one of the published MoCo (``.pth.tar``), of which ``step`` is the epoch.

    Raises:
        DataError: the file is missing, damaged or no checkpoint of a pre-training.
    """
    if path.name.endswith((".pth.tar", ".pth", ".pt")):
        mechanism, recipe, epochs = official.load_official(path)
        facts = {"mean": official.MEAN, "std": official.STD, "published": True}
        return mechanism.encoder, recipe, {"step": epochs, "dtype": "float32", **facts}
    tensors, state = load_checkpoint(path)
    if not any(name.startswith("mechanism.encoder.") for name in tensors):
        raise DataError(f"{path} holds no pre-trained encoder: give the checkpoint.safetensors of a run")
    recipe = Recipe.from_json(state["recipe"])
    encoder = build_encoder(recipe.encoder, head=recipe.head, dim=recipe.dim, norm=recipe.norm)
    unpack({name.removeprefix("mechanism."): tensor for name, tensor in tensors.items()}, encoder=encoder)
    return encoder, recipe, {"mean": MEAN, "std": STD, **state}


def resume(run: Run, out: Path, dtype: torch.dtype | None = None) -> None:
    """Bring a fresh run to where ``out`` left off: encoders, queue, pointer, optimizer, step and records.

    From the last checkpoint, or if that is damaged from the one before; with none there the run stays at its start.
    The number format is that of before: ``dtype``, where it was asked for, has to be the same.
    """
    found = last_checkpoint(out / "checkpoint.safetensors")
    if found is None:
        return
    tensors, state = found
    before = Recipe.from_json(state["recipe"])
    if before != run.recipe:
        changed = [f"{n} {v} there" for n, v in vars(before).items() if v != getattr(run.recipe, n)]
        raise UsageError(f"--out {out} holds a run of other settings ({', '.join(changed)}): choose another --out")
    if state["data_hash"] != run.data_hash:
        raise UsageError(f"--out {out} holds a run on other images: choose another --out")
    if dtype and str(dtype) != f"torch.{state['dtype']}":
        raise UsageError(f"--out {out} holds a run in {state['dtype']}: leave --precision out, or choose another --out")
    unpack(tensors, mechanism=run.mechanism, optimizer=run.optimizer)
    run.dtype = getattr(torch, state["dtype"])
    run.scaler = grad_scaler(run.device, run.dtype)
    if state.get("scaler"):
        run.scaler.load_state_dict(state["scaler"])
    run.stalled = state.get("stalled", 0.0)
    for name in ("step", "seconds", "window", "losses", "monitor", "peak_memory_bytes"):
        setattr(run, name, state[name])
    if not rank():
        print(f"going on from step {run.step:,} in {out}", file=sys.stderr)


def check_all_agree(*things: tuple[str, str, object]) -> None:
    """Several processes train as one only from the same images and the same step.

    Args:
        things: of each what it is, how to mend it if others have others, and what this process has.

    Raises:
        DataError: on all of them, if any has others.
    """
    for what, mend, own in things:
        found = every(own)
        other = next((r for r, one in enumerate(found) if one != found[0]), None)
        if other is not None:
            raise DataError(f"process {other} has other {what} than the first ({found[other]}, not {found[0]}): {mend}")


def last_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, object]] | None:
    """What a checkpoint holds, or if it is damaged the one before it, with a warning; None if there is neither.

    The damaged one gets another name: the next save would else keep it in the place of the one that is whole.

    Raises:
        DataError: all that are there are damaged.
    """
    there = [file for file in (path, previous_of(path)) if file.exists()]
    for file in there:
        try:
            found = load_checkpoint(file)
        except DataError as error:
            if file == there[-1]:
                raise
            print(f"warning: {error}; the one before it is taken", file=sys.stderr)
        else:
            if file != path and path.exists() and not rank():
                os.replace(path, path.with_stem(f"{path.stem}-damaged"))
            return found
    return None


# Watching ------------------------------------------------------------------------------------------------------------


def is_logged(step: int) -> bool:
    """Whether the curve gets a point after this many steps."""
    return step % LOG_EVERY == 0 or step == 1


def log(run: Run, contrast: Contrast, steps_of_epoch: int) -> None:
    """Add a point to the loss curve: the mean loss since the last one, and the pretext accuracy of this batch."""
    loss = sum(run.window) / len(run.window)
    run.window.clear()
    filled = int(run.mechanism.filled) if isinstance(run.mechanism, MoCo) else 0
    run.losses.append({
        "step": run.step, "epoch": run.step / steps_of_epoch, "images_seen": run.images_seen, "seconds": run.seconds,
        "loss": loss, "filled": filled, "pretext_accuracy": run.pretext_accuracy, "K": _negatives_of_a_query(contrast),
    })  # fmt: skip


def _negatives_of_a_query(contrast: Contrast) -> int:
    """K as the loss sees it: the negatives less those that are the query's own key, on average over queries."""
    excluded = 0 if contrast.exclude is None else contrast.exclude.sum(dim=1).float().mean().item()
    return len(contrast.negatives) - round(excluded)


def watch(run: Run, train: ImageSet, test: ImageSet) -> None:
    """Add a point to the kNN curve, from some thousands of images so that it costs little.

    On a GPU from all that lie in memory, and also as the official notebook reads it, whose curve it can then be laid beside.
    """
    encoder, data = run.mechanism.encoder, []
    all_of_them = run.device.type == "cuda" and not isinstance(train.images, EncodedImages)
    for images, most in (train, MONITOR_TRAIN), (test, MONITOR_TEST):
        few = images if all_of_them else images.few(most)
        features = extract_features(encoder.backbone, few.images, dtype=run.dtype)
        data += [features.to(run.device), few.labels.to(run.device)]
    notebooks = {"knn_top1_notebook": notebooks_knn_top1(encoder.head, *data)} if all_of_them else {}
    at = {"step": run.step, "seconds": run.seconds, "images_seen": run.images_seen}
    run.monitor.append(at | {"knn_top1": knn_top1(*data)} | notebooks)


def progress_bar(run: Run, total: float, by_time: bool, progress: bool) -> tqdm:
    """A bar over seconds or steps."""
    unit = "{n:.0f}/{total:.0f} s" if by_time else "{n}/{total} steps"
    hidden = not progress or rank() > 0
    return tqdm(
        total=total, initial=run.seconds if by_time else run.step, desc=f"{run.recipe.mechanism:11}", disable=hidden,
        bar_format="{desc} {percentage:3.0f}% |{bar:24}| " + unit + "{postfix}", mininterval=0.5,
    )  # fmt: skip


def show(bar: tqdm, run: Run, advance: float) -> None:
    """Move the bar and write loss, pretext accuracy, the last kNN and the speed beside it."""
    if run.losses and run.step % LOG_EVERY == 0:
        last = run.losses[-1]
        shown = f"loss {last['loss']:.2f}, pretext {last['pretext_accuracy']:.0f} %"
        if run.monitor:
            shown += f", kNN {run.monitor[-1]['knn_top1']:.1f} %"
        if run.recipe.view_size:
            shown += f", waiting for images {run.stall_percent:.0f} %"
        bar.set_postfix_str(f"{shown}, {run.images_seen / run.seconds:,.0f} images/s", refresh=False)
    bar.update(min(advance, bar.total - bar.n))
