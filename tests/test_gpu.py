"""What only a GPU can show. Skipped where there is none."""

from itertools import islice

import pytest
import torch
from drawn import as_pictures, write_two_classes

from tutorial_moco import pretrain as training
from tutorial_moco.augment import AUGMENTATIONS, RecordedViews, two_views
from tutorial_moco.encoders import SplitBatchNorm2d
from tutorial_moco.evaluate import knn_top1_at_size
from tutorial_moco.images import load_images
from tutorial_moco.probe import SETTINGS, probe
from tutorial_moco.recipes import Recipe
from tutorial_moco.shapes import draw_shapes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
GPU = torch.device("cuda")
RECIPE = Recipe(encoder="tiny", K=256, batch_size=64, norm="split:8", shuffle=True)


@pytest.fixture(scope="module")
def images():
    return load_images("shapes", "train").take(slice(512))


def losses(images, recipe: Recipe, steps: int, dtype: torch.dtype = torch.float32, **how) -> list[float]:
    run, found = training.start(recipe, images, GPU, dtype, **how), []
    on_gpu = images.images.to(GPU)
    for epoch, index in islice(training.batches(len(images), recipe, 0, GPU), steps):
        found.append(training.train_step(run, on_gpu[index], index, epoch)[0])
    return found


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_are_those_of_the_processor(name, images):
    batch, index = images.images[:16], torch.arange(16)
    for ours, theirs in zip(two_views(batch.to(GPU), index.to(GPU), name), two_views(batch, index, name), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=2e-3, rtol=0)


def test_views_are_made_without_waiting_for_the_gpu(images):
    batch, index = images.images[:16].to(GPU), torch.arange(16, device=GPU)
    two_views(batch, index, "cifar")
    torch.cuda.set_sync_debug_mode("error")
    try:
        two_views(batch, index, "cifar", epoch=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_recorded_views_follow_images_and_epoch(images):
    recorded = RecordedViews()
    for epoch in range(3):
        index = torch.arange(16 * epoch, 16 * epoch + 16, device=GPU)
        batch = images.images.to(GPU)[index]
        both = zip(recorded(batch, index, "cifar", epoch=epoch), two_views(batch, index, "cifar", epoch=epoch), strict=True)
        for ours, theirs in both:
            torch.testing.assert_close(ours, theirs)


def test_all_parts_at_once_are_part_by_part():
    torch.manual_seed(0)
    norms = [SplitBatchNorm2d(6, 4).to(GPU) for _ in range(2)]
    x = torch.randn(16, 6, 5, 5, device=GPU).to(memory_format=torch.channels_last)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = norms[0].part_by_part(inputs[0]), norms[1](inputs[1])
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*(i.grad for i in inputs), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norms[0].running_var, norms[1].running_var)


@pytest.mark.parametrize("changes", [
    {}, {"symmetric": True}, {"accumulate": 2}, {"mechanism": "memory_bank", "norm": "batch", "shuffle": False},
    {"mechanism": "end_to_end", "norm": "batch", "shuffle": False}, {"mechanism": "simclr", "norm": "batch", "shuffle": False},
    {"mechanism": "moco_v3", "norm": "batch", "shuffle": False, "head": "mlp3", "temperature": 1.0},
], ids=["moco", "symmetric", "in_parts", "memory_bank", "end_to_end", "simclr", "moco_v3"])  # fmt: skip
def test_a_compiled_run_takes_the_same_steps(changes, images):
    """Kernels that add in another order differ in the last digits, and training multiplies that."""
    recipe = RECIPE.replace(**changes)
    plain, compiled = losses(images, recipe, 4), losses(images, recipe, 4, compile=True)
    assert compiled == pytest.approx(plain, rel=5e-3)


def test_a_gpu_trains_as_the_processor_does(images):
    run, expected = training.start(RECIPE, images, torch.device("cpu"), torch.float32), []
    for epoch, index in islice(training.batches(len(images), RECIPE, 0, run.device), 4):
        expected.append(training.train_step(run, images.images[index], index, epoch)[0])
    assert losses(images, RECIPE, 4) == pytest.approx(expected, rel=5e-3)


def test_float16_takes_the_steps_of_float32(images):
    assert losses(images, RECIPE, 4, torch.float16) == pytest.approx(
        losses(images, RECIPE, 4), rel=2e-3
    )  # 5e-3 if no step were taken


def test_encoded_pictures_train_as_on_the_processor(tmp_path):
    write_two_classes(tmp_path, as_pictures(draw_shapes(64, seed=0, size=64)[0]))
    pictures = load_images(tmp_path, "train", view_size=32, progress=False)
    recipe, found = RECIPE.replace(batch_size=16, norm="batch", shuffle=False, view_size=32, augmentation="v2"), []
    for device in ("cpu", GPU):
        run = training.start(recipe, pictures, torch.device(device), torch.float32)
        steps = islice(training.fed(run, pictures.images), 3)
        found.append([training.train_step(run, given, index, epoch)[0] for epoch, index, given in steps])
    assert found[1] == pytest.approx(found[0], rel=5e-3)
    assert knn_top1_at_size(run.mechanism.encoder.backbone, pictures, pictures) >= 0
    assert len(probe(run.mechanism.encoder.backbone, 64, pictures, pictures, SETTINGS.replace(batch_size=16, epochs=1))) == 1
