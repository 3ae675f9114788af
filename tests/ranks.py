"""Several processes of one training, as torchrun starts them, but quickly: each is a fork of one that has torch already."""

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import socket
from itertools import islice
from multiprocessing.connection import wait

import torch

from tutorial_moco import distributed
from tutorial_moco import pretrain as training
from tutorial_moco.checkpoint import pack
from tutorial_moco.images import ImageSet
from tutorial_moco.mechanisms import Mechanism
from tutorial_moco.recipes import Recipe

CPU = torch.device("cpu")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tutorial_moco.pretrain"])


def random_images(n: int = 64, side: int = 16) -> ImageSet:
    pixels = torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet("random", "train", pixels, torch.arange(n) % 2, ("even", "odd"), f"hash of these {n}")


def together(W: int, work, *args, joined: bool = True) -> list:
    """What ``work(*args)`` returns in each of W processes; in this one if W is 1. Else ``joined``: they are when it begins."""
    if W == 1:
        return [work(*args)]
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(W)]
    ranks = start(W, _answer, [(sender, joined, work, args) for _, sender in pipes])
    found = []
    for process, (answer, sender) in zip(ranks, pipes, strict=True):
        sender.close()
        wait([answer, process.sentinel], timeout=120)
        told = pickle.loads(answer.recv_bytes()) if answer.poll() else RuntimeError(f"a process ended: {process.exitcode}")
        found.append(told)
    for process in ranks:
        process.join(30)
        process.kill()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


def start(W: int, target, arguments: list[tuple]) -> list:
    """W processes that run ``target(*arguments[r])``, joined as those of torchrun are."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [PROCESSES.Process(target=_joined, args=(r, W, port, target, arguments[r])) for r in range(W)]
    for process in ranks:
        process.start()
    return ranks


def _joined(r: int, W: int, port: int, target, args: tuple) -> None:
    where = {
        "RANK": r,
        "LOCAL_RANK": r,
        "WORLD_SIZE": W,
        "LOCAL_WORLD_SIZE": W,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    target(*args)


def _answer(sender, joined: bool, work, args) -> None:
    try:
        with distributed.processes() if joined else contextlib.nullcontext():
            answer = work(*args)
    except BaseException as error:
        answer = error
    sender.send_bytes(pickle.dumps(answer))  # whole: by send, tensors would be lent, by a process that ends now


def hash_of(mechanism: Mechanism, **others) -> str:
    """Over all that a mechanism holds: encoders, running statistics, queue or bank, pointer, ages; and its optimizer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(pack(mechanism=mechanism, **others).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def some_steps(recipe: Recipe, steps: int, held: bool = False, images: ImageSet | None = None) -> dict[str, list]:
    """The first steps of a training: of each the loss, a hash of the mechanism, and which images this process saw.

    Args:
        held: BatchNorm with its running statistics, so that a loss does not depend on who shares a batch.
        images: random ones if left out.
    """
    images = images or random_images()
    run = training.start(recipe, images, CPU, torch.float32)
    if held:
        run.mechanism.eval()
    found = {"loss": [], "hash": [], "seen": [], "queries": []}
    for epoch, index, given in islice(training.fed(run, images.images), steps):
        training.set_learning_rate(run.optimizer, recipe, 0.0)
        wanted = training.part(run, index)
        loss, _ = training.train_step(run, given, index, epoch)
        found["loss"].append(loss)
        found["hash"].append(hash_of(run.mechanism))
        found["queries"].append(distributed.mine(index).tolist())
        found["seen"].append(wanted.tolist())
    return found
