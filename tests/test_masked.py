"""The masked auto-encoder: what it sees, what it is judged by, and that it learns."""

import pytest
import torch

from tutorial_moco.augment import plain_view
from tutorial_moco.checkpoint import save_checkpoint
from tutorial_moco.encoders import build_encoder
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.images import ImageSet
from tutorial_moco.masked import MaskedAutoencoder, load_painter, mask_order, pretrain_masked, save_painter
from tutorial_moco.recipes import Recipe
from tutorial_moco.shapes import SHAPE_CLASSES, draw_shapes

PATCH, GRID = 4, 8


def autoencoder(**options):
    torch.manual_seed(0)
    return MaskedAutoencoder(build_encoder("vit-learned").backbone, **options)


def views(n=3):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def patch_of(images, number):
    row, column = divmod(number, GRID)
    return images[..., PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]


def test_hidden_patches_are_not_seen_and_each_seen_one_is():
    net, images, order = autoencoder(), views(1), mask_order(torch.arange(1), GRID**2, seed=0, epoch=0)
    assert net.seen == 16
    painted = net(images, order)
    for place, number in enumerate(order[0].tolist()):
        changed = images.clone()
        patch_of(changed, number).add_(3)
        same = torch.equal(net(changed, order), painted)
        assert same == (place >= net.seen), (place, number)


def test_targets_are_the_patches_in_their_places():
    images = views()
    targets = autoencoder().targets(images)
    assert targets.shape == (3, GRID**2, 3 * PATCH**2)
    for number in (0, 7, 8, 63):
        own = patch_of(images, number).flatten(1)
        expected = (own - own.mean(dim=1, keepdim=True)) / (own.std(dim=1, keepdim=True) + 1e-3)
        torch.testing.assert_close(targets[:, number], expected)


def test_patches_put_back_are_the_image():
    net, images = autoencoder(), views()
    assert torch.equal(net.unpatchify(net.patchify(images)), images)


def test_the_loss_is_that_of_the_hidden_patches_alone():
    net, images, order = autoencoder(), views(), mask_order(torch.arange(3), GRID**2, seed=0, epoch=0)
    error = (net(images, order) - net.targets(images)).square()
    hidden = torch.stack([error[i, order[i, net.seen :]] for i in range(3)])
    torch.testing.assert_close(net.loss(images, order), hidden.mean())


def test_masks_are_functions_of_seed_epoch_and_image():
    order = mask_order(torch.tensor([5, 6]), 64, seed=0, epoch=0)
    assert order.sort(dim=1).values.tolist() == [list(range(64))] * 2
    assert torch.equal(mask_order(torch.tensor([6]), 64, seed=0, epoch=0)[0], order[1])
    others = [mask_order(torch.tensor([5]), 64, seed=s, epoch=e)[0] for s, e in ((1, 0), (0, 1))]
    assert not any(torch.equal(other, order[0]) for other in others)


def test_it_learns_to_paint_and_the_same_recipe_gives_the_same_bits():
    images, labels, _ = draw_shapes(256, seed=0)
    train = ImageSet("shapes", "train", images, labels, SHAPE_CLASSES, "")
    recipe = Recipe(encoder="vit-learned", batch_size=64, epochs=8, optimizer="adamw", lr=1e-3, warmup=0.1)
    encoder, net, found = pretrain_masked(recipe, train, dtype=torch.float32, progress=False)
    assert found["steps"] == 32
    assert found["losses"][-1]["loss"] < 0.97 * found["losses"][0]["loss"]
    assert net.backbone is encoder.backbone
    again = pretrain_masked(recipe.replace(epochs=8), train, dtype=torch.float32, progress=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))
    assert encoder.eval().backbone(plain_view(images[:2])).shape == (2, 96)


def test_a_painter_survives_its_file(tmp_path):
    net, images, order = autoencoder().eval(), views(), mask_order(torch.arange(3), GRID**2, seed=0, epoch=0)
    save_painter(tmp_path / "painter", net, {"epochs": 3})
    again, facts = load_painter(tmp_path / "painter")
    assert facts["epochs"] == 3
    torch.testing.assert_close(again(images, order), net(images, order), atol=0.02, rtol=0.02)  # float16
    save_checkpoint(tmp_path / "other", {"a": torch.zeros(1)}, {})
    with pytest.raises(DataError, match="no masked auto-encoder"):
        load_painter(tmp_path / "other")


def test_an_encoder_without_patches_is_refused():
    with pytest.raises(UsageError, match="must be vit-learned"):
        pretrain_masked(
            Recipe(), ImageSet("", "train", torch.zeros(200, 3, 32, 32, dtype=torch.uint8), torch.zeros(200), (), "")
        )
