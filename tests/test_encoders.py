"""Encoders: what every one of them must do, and the three layers that are ours."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tutorial_moco.encoders import ENCODERS, SmallBackbone, SplitBatchNorm2d, Whitening, build_encoder, sines
from tutorial_moco.errors import UsageError

FEATURES = {
    "tiny": 64,
    "small": 128,
    "wide": 192,
    "resnet18": 512,
    "resnet50": 2048,
    "vit": 96,
    "vit-learned": 96,
    "vit-small": 384,
}
SIDES = {"resnet50": 64, "vit": 32, "vit-learned": 32, "vit-small": 224}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def natural_images(n=400, size=8, seed=0):
    """Neighbouring pixels and colours alike, brightness differing most: what whitening is made for."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 1, 2, 2, generator=random) * 1.5 + 0.5 * torch.randn(n, 3, 2, 2, generator=random)
    return F.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * torch.randn(n, 3, size, size, generator=random)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("head", ["linear", "mlp", "mlp3"])
def test_queries_are_unit_vectors_and_features_have_the_named_length(name, head):
    torch.manual_seed(0)
    encoder = build_encoder(name, head=head, dim=24).train()
    x = normal(3, 3, SIDES.get(name, 16), SIDES.get(name, 16))
    z = encoder(x)
    assert z.shape == (len(x), 24)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(len(x)))
    assert encoder.feature_dim == FEATURES[name]
    assert encoder.dim == 24
    with torch.no_grad():
        assert encoder.backbone(x).shape == (len(x), FEATURES[name])
    assert isinstance(encoder.head, nn.Linear) == (head == "linear")


@pytest.mark.parametrize("size", [8, 9, 13, 32])
def test_small_backbones_take_any_size_from_8_pixels(size):
    assert build_encoder("tiny").eval()(normal(2, 3, size, size)).isfinite().all()


def test_a_fresh_encoder_is_decided_by_torchs_seed_and_lies_in_channels_last_memory():
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(build_encoder("tiny").state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not torch.equal(made[0]["head.weight"], made[2]["head.weight"])
    assert made[0]["backbone.stem.0.weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"name": "resnet34"}, "--encoder resnet34"),
        ({"head": "deep"}, "--head deep"),
        *(({"norm": norm}, f"--norm {norm}") for norm in ("layer", "split", "split:", "split:1", "split:x", "split:-2")),
        ({"norm": "group:4"}, "--norm group:4"),
        ({"norm": "batch:2"}, "--norm batch:2"),
    ],
    ids=str,
)
def test_an_unknown_name_is_refused_by_name(wrong, named):
    with pytest.raises(UsageError, match=named):
        build_encoder(**wrong)


# ---- the transformer


def test_the_patch_projection_stays_as_it_was_drawn_unless_it_is_learned():
    for name, learned in (("vit", False), ("vit-learned", True)):
        backbone = build_encoder(name).backbone
        backbone(normal(2, 3, 32, 32)).sum().backward()
        assert (backbone.conv_proj.weight.grad is not None) == learned
        assert backbone.encoder.pos_embedding.grad is None


def test_positions_tell_every_patch_apart_and_neighbours_are_alike():
    table = sines(8, 96)[0, 1:]
    assert torch.equal(sines(8, 96)[0, 0], torch.zeros(96))
    similarity = F.cosine_similarity(table[:, None], table[None], dim=2).view(8, 8, 8, 8)
    assert similarity.view(64, 64).fill_diagonal_(0).max() < 0.999
    here = similarity[3, 3]
    assert here[3, 4] == pytest.approx(here[4, 3].item(), abs=1e-5)  # x and y alike
    assert here[3, 4] > here[3, 6] > 0
    # By hand: patch (row 2, column 5), the first wave of x and of y has frequency 1.
    assert table[2 * 8 + 5][[0, 24, 48, 72]].tolist() == pytest.approx([math.sin(5), math.cos(5), math.sin(2), math.cos(2)])


def test_an_image_of_another_size_is_refused_with_the_mend():
    with pytest.raises(UsageError, match="images of 32 pixels, not 16"):
        build_encoder("vit")(normal(2, 3, 16, 16))


# ---- split statistics


def check_split_equals_separate(batch, splits, seed=0):
    x = normal(batch, 5, 3, 3, seed=seed) * 2 + 1
    split = SplitBatchNorm2d(5, splits)
    with torch.no_grad():
        split.weight.copy_(normal(5, seed=1))
        split.bias.copy_(normal(5, seed=2))
    separate = []
    for _ in range(splits):
        one = nn.BatchNorm2d(5)
        one.load_state_dict(split.state_dict())
        separate.append(one)
    expected = torch.cat([one(part) for one, part in zip(separate, x.tensor_split(splits), strict=True)])
    torch.testing.assert_close(split(x), expected)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(split, name), torch.stack([getattr(one, name) for one in separate]).mean(dim=0))
    assert int(split.num_batches_tracked) == 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 20), st.integers(2, 6), st.integers(0, 100))
def test_split_statistics_are_those_of_separate_layers_on_the_parts(batch, splits, seed):
    check_split_equals_separate(max(batch, splits), splits, seed)


def test_a_batch_smaller_than_the_splits_leaves_sound_statistics_or_is_refused_by_name():
    layer = SplitBatchNorm2d(5, 4)
    try:
        y = layer(normal(3, 5, 3, 3))
    except UsageError:
        return
    assert y.isfinite().all()
    assert layer.running_mean.isfinite().all()
    assert layer.running_var.isfinite().all()


def test_split_statistics_have_the_gradient_of_separate_layers():
    x = normal(6, 5, 3, 3).requires_grad_()
    weights = normal(6, 5, 3, 3, seed=3)
    (found,) = torch.autograd.grad((SplitBatchNorm2d(5, 2)(x) * weights).sum(), x)
    parts = torch.cat([nn.BatchNorm2d(5)(part) for part in x.tensor_split(2)])
    (expected,) = torch.autograd.grad((parts * weights).sum(), x)
    torch.testing.assert_close(found, expected)


def test_all_parts_at_once_are_part_by_part_in_output_gradient_and_statistics():
    """What a GPU computes: one formula in place of many calls."""
    layers = [SplitBatchNorm2d(5, 4) for _ in range(2)]
    for layer in layers:
        layer.load_state_dict({"weight": normal(5, seed=1), "bias": normal(5, seed=2)}, strict=False)
    inputs = [normal(8, 5, 3, 3).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2)]
    outputs = layers[0].part_by_part(inputs[0]), layers[1].all_parts_at_once(inputs[1])
    torch.testing.assert_close(*outputs)
    assert outputs[1].is_contiguous(memory_format=torch.channels_last)
    for y in outputs:
        (y * normal(8, 5, 3, 3, seed=3)).sum().backward()
    torch.testing.assert_close(*(x.grad for x in inputs))
    for one, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict())


@pytest.mark.parametrize("norm", ["batch", "split:4", "group"])
@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_an_encoder_is_compiled_as_one_piece(name, norm, monkeypatch):
    monkeypatch.setattr(SplitBatchNorm2d, "part_by_part", SplitBatchNorm2d.all_parts_at_once)
    encoder = build_encoder(name, norm=norm)
    plain, x = build_encoder(name, norm=norm), normal(8, 3, 32, 32)
    plain.load_state_dict(encoder.state_dict())
    compiled = torch.compile(encoder, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(encoder.state_dict(), plain.state_dict())


def test_in_evaluation_split_batch_norm_is_batch_norm():
    split, plain = SplitBatchNorm2d(5, 4), nn.BatchNorm2d(5)
    split(normal(8, 5, 3, 3))
    plain.load_state_dict(split.state_dict())
    x = normal(3, 5, 3, 3, seed=1)
    before = split.running_mean.clone()
    torch.testing.assert_close(split.eval()(x), plain.eval()(x))
    assert torch.equal(split.running_mean, before)


def test_the_norm_option_decides_every_layer():
    kinds = {"batch": nn.BatchNorm2d, "split:3": SplitBatchNorm2d, "group": nn.GroupNorm}
    for norm, kind in kinds.items():
        for name in ("tiny", "resnet18"):
            found = [m for m in build_encoder(name, norm=norm).modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
            assert len(found) > 5
            assert all(type(m) is kind for m in found)
    split = [m for m in build_encoder("tiny", norm="split:3").modules() if isinstance(m, SplitBatchNorm2d)]
    assert all(m.splits == 3 for m in split)


def test_with_group_norm_an_image_does_not_see_the_rest_of_the_batch():
    encoder, x = build_encoder("tiny", norm="group").train(), normal(6, 3, 8, 8)
    torch.testing.assert_close(encoder(x)[:2], encoder(x[:2]), rtol=0, atol=1e-5)


# ---- whitening


def test_whitening_decorrelates_the_patches_it_was_fitted_to():
    images, layer = natural_images(), Whitening()
    patches = F.unfold(images, 2, stride=2).transpose(1, 2).reshape(-1, 12)
    spread = torch.linalg.eigvalsh(torch.cov(patches.T))
    assert spread[-1] > 10 * spread[0]  # far from white before
    layer.fit(images)
    responses = F.conv2d(images, layer.weight[:12], stride=2).permute(0, 2, 3, 1).reshape(-1, 12)
    torch.testing.assert_close(torch.cov(responses.T), torch.eye(12), rtol=0, atol=0.02)
    fresh = F.conv2d(natural_images(seed=1), layer.weight[:12], stride=2).permute(0, 2, 3, 1).reshape(-1, 12)
    torch.testing.assert_close(torch.cov(fresh.T), torch.eye(12), rtol=0, atol=0.25)


def test_whitening_has_each_filter_and_its_negative_so_that_relu_loses_nothing():
    images, layer = natural_images(20), Whitening()
    for _ in range(2):  # before and after the fit
        assert layer.weight.shape == (Whitening.filters, 3, 2, 2)
        assert torch.equal(layer.weight[12:], -layer.weight[:12])
        out = layer(images)
        assert out.shape == (20, 24, 7, 7)
        assert (out >= 0).all()
        torch.testing.assert_close(out[:, :12] - out[:, 12:], F.conv2d(images, layer.weight[:12]))
        layer.fit(images)


def test_whitening_of_constant_images_stays_finite():
    layer = Whitening()
    layer.fit(torch.zeros(10, 3, 8, 8))
    assert layer.weight.isfinite().all()


def test_whitening_is_not_learned_and_is_kept_in_the_checkpoint():
    encoder = build_encoder("tiny", images=natural_images(50))
    expected = Whitening()
    expected.fit(natural_images(50))
    assert isinstance(encoder.backbone, SmallBackbone)
    torch.testing.assert_close(encoder.state_dict()["backbone.whitening.weight"], expected.weight)
    assert not any("whitening" in name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize("head", ["mlp4", "linear:8", "mlp3:", "mlp3:wide", "mlp2:0"])
def test_a_head_that_is_not_known_is_told(head):
    with pytest.raises(UsageError, match=f"--head {head} is not known: choose linear, mlp, mlp2 or mlp3, or a width"):
        build_encoder("tiny", head=head)


def test_v3s_heads_are_as_wide_as_they_are_told():
    widths = {
        head: [
            tuple(layer.weight.shape)
            for layer in build_encoder("tiny", head=head, dim=16).head.modules()
            if hasattr(layer, "in_features")
        ]
        for head in ("mlp2", "mlp3", "mlp2:100", "mlp3:100")
    }
    assert widths["mlp2"] == [(64, 64), (16, 64)]
    assert widths["mlp3"] == [(64, 64), (64, 64), (16, 64)]
    assert widths["mlp2:100"] == [(100, 64), (16, 100)]
    assert widths["mlp3:100"] == [(100, 64), (100, 100), (16, 100)]
    assert build_encoder("tiny", head="mlp3:100", dim=16).hidden == 100
