"""Several processes of one training, as torchrun starts them, but quickly: each is a fork of one that has torch already."""

import hashlib
import multiprocessing
import os
import socket
from itertools import islice

import torch

from tutorial_moco import distributed
from tutorial_moco import pretrain as training
from tutorial_moco.images import ImageSet
from tutorial_moco.mechanisms import Mechanism
from tutorial_moco.recipes import Recipe

CPU = torch.device("cpu")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tutorial_moco.pretrain"])


def random_images(n: int = 64) -> ImageSet:
    pixels = torch.randint(0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet("random", "train", pixels, torch.arange(n) % 2, ("even", "odd"), "hash of these")


def together(W: int, work, *args) -> list:
    """What ``work(*args)`` returns in each of W processes; in this one if W is 1."""
    if W == 1:
        return [work(*args)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    answers = PROCESSES.SimpleQueue()
    ranks = [PROCESSES.Process(target=_one, args=(answers, r, W, port, work, args)) for r in range(W)]
    for process in ranks:
        process.start()
    found = dict(answers.get() for _ in ranks)
    for process in ranks:
        process.join(30)
    for answer in found.values():
        if isinstance(answer, BaseException):
            raise answer
    return [found[r] for r in range(W)]


def _one(answers, r: int, W: int, port: int, work, args) -> None:
    where = {"RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": W, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    try:
        with distributed.processes():
            answers.put((r, work(*args)))
    except BaseException as error:
        answers.put((r, error))


def hash_of(mechanism: Mechanism) -> str:
    """Over all that a mechanism holds: encoders, running statistics, queue or bank, pointer, ages."""
    digest = hashlib.sha256()
    for name, tensor in mechanism.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def some_steps(recipe: Recipe, steps: int, held: bool = False) -> dict[str, list]:
    """The first steps of a training: of each the loss, a hash of the mechanism, and which images this process saw.

    Args:
        held: BatchNorm with its running statistics, so that a loss does not depend on who shares a batch.
    """
    images = random_images()
    run = training.start(recipe, images, CPU, torch.float32)
    if held:
        run.mechanism.eval()
    found = {"loss": [], "hash": [], "seen": [], "queries": []}
    for epoch, index in islice(training.batches(len(images), recipe, 0, CPU), steps):
        training.set_learning_rate(run.optimizer, recipe, 0.0)
        wanted = training.part(run, index)
        loss, _ = training.train_step(run, images.images[wanted], index, epoch)
        found["loss"].append(loss)
        found["hash"].append(hash_of(run.mechanism))
        found["queries"].append(distributed.mine(index).tolist())
        found["seen"].append(wanted.tolist())
    return found
