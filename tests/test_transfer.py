"""Other tasks: metrics against hand-computed cases, trunks against their encoders, and short trainings that learn."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from benchmarks import transfer as benchmark
from tutorial_moco import transfer
from tutorial_moco.annotated import load_annotated
from tutorial_moco.augment import plain_view
from tutorial_moco.dense import CROWD, DIFFICULT, Batches, freeze, mirror_order, mirrored, trunk
from tutorial_moco.detection import average_precision, build_detector
from tutorial_moco.encoders import ENCODERS, build_encoder
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.evaluate import linear_probe
from tutorial_moco.images import ImageSet, load_images
from tutorial_moco.masked import load_painter, mask_order
from tutorial_moco.recipes import Recipe
from tutorial_moco.results import provenance_line
from tutorial_moco.segmentation import Segmenter, mean_iou
from tutorial_moco.shapes import SHAPE_CLASSES, draw_shapes
from tutorial_moco.supervised import begin_with_probe
from tutorial_moco.transfer import classify, few_labels, load_start

SHIPPED = Path(__file__).parent.parent / "data" / "moco-shapes.safetensors"
CONVOLUTIONAL = [name for name in ENCODERS if not name.startswith("vit")]


def encoder(name="tiny", seed=0):
    torch.manual_seed(seed)
    return build_encoder(name).eval()


# ---- average precision, by hand


def boxes(*rows, scores=None, crowd=None):
    """Objects of class 1 in corner coordinates."""
    there = {
        "boxes": torch.tensor(rows, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.ones(len(rows), dtype=torch.int64),
    }
    if scores is not None:
        return there | {"scores": torch.tensor(scores)}
    width, height = (there["boxes"][:, 2:] - there["boxes"][:, :2]).unbind(1)
    return there | {"area": width * height, "iscrowd": torch.tensor(crowd or [0] * len(rows))}


ONE, OTHER = (10, 10, 50, 50), (60, 60, 90, 90)


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        (boxes(ONE, OTHER), boxes(ONE, OTHER, scores=[0.9, 0.8]), (100, 100, 100)),
        # One of two: precision 1 up to recall .5, which is 51 of COCO's 101 points.
        (boxes(ONE, OTHER), boxes(ONE, scores=[0.9]), (100 * 51 / 101,) * 3),
        # IoU 25 / 40 = .625: right at .50, .55 and .60 of ten thresholds.
        (boxes(ONE), boxes((10, 10, 50, 35), scores=[0.9]), (30, 100, 0)),
        # A wrong one that is surer: precision 1/2 at every recall.
        (boxes(ONE), boxes((100, 100, 140, 140), ONE, scores=[0.9, 0.8]), (50, 50, 50)),
        # The same object twice: the second one is wrong, but comes after recall 1 was reached.
        (boxes(ONE), boxes(ONE, ONE, scores=[0.9, 0.8]), (100, 100, 100)),
        # What lies in a crowd is neither right nor wrong.
        (boxes(ONE, OTHER, crowd=[0, 1]), boxes(OTHER, ONE, scores=[0.9, 0.8]), (100, 100, 100)),
        (boxes(ONE), boxes(scores=[]), (0, 0, 0)),
    ],
    ids=["all", "one of two", "half off", "a surer wrong one", "twice", "crowd", "nothing"],
)
def test_average_precision_of_boxes(truth, answer, expected):
    found = average_precision([(truth, answer)], ["boxes"])
    assert [found[name] for name in ("ap_boxes", "ap50_boxes", "ap75_boxes")] == pytest.approx(expected, abs=1e-6)


def test_average_precision_is_the_mean_over_classes():
    truth, answer = boxes(ONE, OTHER), boxes(ONE, scores=[0.9])
    truth["labels"] = torch.tensor([1, 2])
    assert average_precision([(truth, answer)], ["boxes"])["ap_boxes"] == pytest.approx(50)


@pytest.mark.parametrize("answers", [(), (ONE,)], ids=["no answer", "an answer"])
def test_where_nothing_is_there_is_nothing_to_judge(answers):
    with pytest.raises(DataError, match="have no object to judge by"):
        average_precision([(boxes(), boxes(*answers) | {"scores": torch.ones(len(answers))})], ["boxes"])


def test_average_precision_of_masks_asks_for_their_pixels():
    mask = torch.zeros(1, 100, 100, dtype=torch.uint8)
    mask[0, 10:50, 10:50] = 1
    truth = boxes(ONE) | {"masks": mask}
    sure = mask.float() * 0.9
    sure[0, 35:] = 0.4  # under a half: not said to be of it
    found = average_precision([(truth, boxes(ONE, scores=[0.9]) | {"masks": sure[None]})], ["boxes", "masks"])
    assert found["ap_boxes"] == pytest.approx(100)
    assert [found["ap_masks"], found["ap50_masks"], found["ap75_masks"]] == pytest.approx([30, 100, 0])


def test_a_difficult_object_forgives_a_box_that_fits_it_and_a_crowd_any_box_inside_it():
    found = boxes((0, 0, 20, 20), (60, 60, 70, 70), scores=[0.9, 0.8])
    expected = {CROWD: 100.0, DIFFICULT: 50.0}  # the small box lies in the object that is not judged, but does not fit it
    for kind, ap in expected.items():
        truth = boxes((0, 0, 50, 50), (60, 60, 70, 70), crowd=[kind, 0])
        assert average_precision([(truth, found)], ["boxes"])["ap50_boxes"] == pytest.approx(ap, abs=0.6)
    truth = boxes((0, 0, 20, 20), (60, 60, 70, 70), crowd=[DIFFICULT, 0])
    assert average_precision([(truth, found)], ["boxes"])["ap50_boxes"] == pytest.approx(100)


def test_average_precision_of_keypoints_follows_the_similarity_of_coco():
    """OKS = mean of exp(-d^2 / (2 area (2 sigma)^2)): here all points off by d, in an object of 1,600 pixels."""
    points = torch.tensor([[[12.0, 12, 2], [48, 12, 2], [30, 48, 1]]])
    truth = boxes(ONE) | {"keypoints": points}
    for similarity, expected in ((0.999, 100), (0.72, 50), (0.4, 0)):  # .72 is enough at .50, .55, .60, .65 and .70
        d = (-2 * 1600 * 0.1**2 * torch.tensor(similarity).log()).sqrt()
        off = points.clone()
        off[:, :, 0] += d
        found = average_precision([(truth, boxes(ONE, scores=[0.9]) | {"keypoints": off})], ["keypoints"])
        assert found["ap_keypoints"] == pytest.approx(expected)


def test_mean_iou_by_hand():
    truth = {"semantic": torch.tensor([[0, 0, 1, 1], [0, 0, 2, 255]])}
    answer = {"semantic": torch.tensor([[0, 1, 1, 1], [0, 0, 0, 2]])}
    # ground 3 of 5; class 1: 2 of 3; class 2: 0 of 1, since 255 is not judged; class 3 is nowhere.
    assert mean_iou([(truth, answer)], classes=3) == pytest.approx(100 * (3 / 5 + 2 / 3 + 0) / 3)
    twice = mean_iou([(truth, answer), (truth, truth)], classes=3)
    assert twice == pytest.approx(100 * (7 / 9 + 4 / 5 + 1 / 2) / 3)


# ---- trunks


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_trunk_is_the_encoder_before_pooling(name):
    backbone, x = encoder(name).backbone, torch.randn(2, 3, 64, 64)
    net, stages = trunk(backbone)
    maps = net(x)
    torch.testing.assert_close(maps.mean(dim=(2, 3)), backbone(x), rtol=1e-4, atol=1e-5)
    channels, stride = list(stages.values())[-1]
    assert maps.shape == (2, channels, 64 // stride, 64 // stride)
    assert [stride for _, stride in stages.values()] == sorted(stride for _, stride in stages.values())


def test_a_transformer_is_refused_with_a_mend():
    with pytest.raises(UsageError, match="use tiny, small, wide or a ResNet"):
        trunk(encoder("vit").backbone)


def test_a_segmenters_resnet_looks_further_apart_as_torchvisions_does():
    backbone = encoder("resnet50").backbone
    dilated = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    dilated.load_state_dict(backbone.state_dict() | {k: v for k, v in dilated.state_dict().items() if k.startswith("fc")})
    x, dilated = torch.randn(1, 3, 64, 64), nn.Sequential(*list(dilated.eval().children())[:-2])
    with torch.no_grad():
        expected, found = dilated(x), Segmenter(backbone, 3).eval().net(x)
    assert found.shape == (1, 2048, 8, 8)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_frozen_trunk_stays_what_it_is_in_a_model_that_trains():
    model = Segmenter(encoder().backbone, 3, frozen=True).train()
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    images = [torch.rand(3, 32, 32) for _ in range(2)]
    targets = [{"semantic": torch.randint(0, 4, (32, 32))} for _ in range(2)]
    model(images, targets)["loss"].backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.net.state_dict().items())
    assert all(p.grad is None for p in model.net.parameters())
    assert all(p.grad is not None for p in model.head.parameters())
    assert model.head[1].training  # the head's BatchNorm
    trained = Segmenter(encoder().backbone, 3).train()
    trained(images, targets)["loss"].backward()
    assert any(p.grad is not None for p in trained.net.parameters())


def test_freezing_reaches_every_layer_and_nothing_turns_it_back():
    net, _ = trunk(encoder().backbone)
    freeze(net)
    nn.ModuleList([net]).train()
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize(
    ("name", "kind", "neck"),
    [
        ("resnet18", "boxes", "fpn"),
        *(("tiny", kind, neck) for kind in ("boxes", "masks", "keypoints") for neck in ("fpn", "c4")),
    ],
)
def test_detectors_give_losses_and_answers_and_every_encoder_weight_learns(name, kind, neck):
    model = build_detector(encoder(name).backbone, kind, 3, keypoints=2, neck=neck, image_size=64)
    image, target = torch.rand(3, 64, 64), boxes((8, 8, 30, 30), (34, 34, 60, 58))
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 8:30, 8:30], masks[1, 34:58, 34:60] = 1, 1
    points = torch.tensor([[[10.0, 10, 2], [28, 28, 2]], [[36, 36, 2], [58, 56, 1]]])
    target |= {"masks": masks, "keypoints": points}
    losses = model.train()([image, image.flip(0)], [target, target])
    assert ("loss_mask" in losses) == (kind == "masks")
    assert ("loss_keypoint" in losses) == (kind == "keypoints")
    sum(losses.values()).backward()
    body = model.backbone.body if neck == "fpn" else model.backbone
    assert all(p.grad is not None for p in body.parameters())
    (answer,) = model.eval()([image])
    assert {"boxes", "labels", "scores"} <= set(answer)


def test_boxes_of_layers_in_bfloat16_are_not_rounded_to_it():
    model = build_detector(encoder().backbone, "masks", 3).eval()
    model.roi_heads.score_thresh = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = model([torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))])
    assert found["boxes"].dtype == found["masks"].dtype == torch.float32
    inside = found["boxes"][(found["boxes"] > 0) & (found["boxes"] < 96)]
    assert len(inside) > 10
    assert (inside != inside.bfloat16().float()).float().mean() > 0.9


def test_an_encoder_for_small_images_gets_small_images_and_a_resnet50_large_ones():
    for name, side in (("tiny", 96), ("resnet18", 96), ("resnet50", 800)):
        assert build_detector(encoder(name).backbone, "boxes", 3).transform.min_size == (side,)
    for name in ("tiny", "resnet18"):
        assert Segmenter(encoder(name).backbone, 3).net(torch.zeros(1, 3, 64, 64)).shape[-1] == 16


def test_a_segmenter_answers_at_the_size_of_the_image_whatever_size_it_works_at():
    model, images = Segmenter(encoder().backbone, 3, image_size=32), [torch.rand(3, 64, 80), torch.rand(3, 48, 40)]
    seen = []
    model.net.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape[-2:])))
    assert [tuple(answer["semantic"].shape) for answer in model.eval()(images)] == [(64, 80), (48, 40)]
    assert seen == [(38, 40)]
    targets = [{"semantic": torch.randint(0, 4, image.shape[-2:])} for image in images]
    model.train()(images, targets)["loss"].backward()


# ---- views


def test_a_mirror_turns_left_to_right_and_back():
    names = ("tip", "left barb", "right barb")
    image = torch.arange(3 * 4 * 6, dtype=torch.uint8).view(3, 4, 6)
    target = {
        "boxes": torch.tensor([[1.0, 0, 3, 2]]), "masks": torch.zeros(1, 4, 6, dtype=torch.uint8),
        "semantic": torch.zeros(4, 6, dtype=torch.int64), "labels": torch.tensor([2]),
        "keypoints": torch.tensor([[[1.5, 0.5, 2], [2.5, 1.5, 1], [0, 0, 0]]]),
    }  # fmt: skip
    target["masks"][0, :2, 1:3] = 1
    target["semantic"][:2, 1:3] = 2
    flipped_image, flipped = mirrored(image, target, mirror_order(names))
    assert torch.equal(flipped_image[:, :, 0], image[:, :, 5])
    assert flipped["boxes"].tolist() == [[3, 0, 5, 2]]
    assert flipped["masks"][0, 0].tolist() == [0, 0, 0, 1, 1, 0]
    assert flipped["semantic"][0].tolist() == [0, 0, 0, 2, 2, 0]
    # What was the left barb is the right one now; the one that is not there stays nowhere.
    assert flipped["keypoints"].tolist() == [[[4.5, 0.5, 2], [0, 0, 0], [3.5, 1.5, 1]]]
    again_image, again = mirrored(flipped_image, flipped, mirror_order(names))
    assert torch.equal(again_image, image)
    assert all(torch.equal(again[name], target[name]) for name in target)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("nose", "left_eye", "right_eye"), [0, 2, 1]),
        (("Right_Knee", "Left_Knee"), [1, 0]),
        (("R_hip", "neck", "L_hip"), [2, 1, 0]),
        (("leftEye", "rightEye"), [1, 0]),
        (("upright", "bright spot"), [0, 1]),  # words, not letters
        (("left ear", "nose"), None),
        ((), []),
    ],
)
def test_what_a_keypoint_becomes_in_a_mirror(names, order):
    assert mirror_order(names) == order


def test_where_left_and_right_are_unknown_nothing_is_mirrored(capsys):
    class Data(list):
        name, keypoints, in_memory = "mine", ("left ear", "nose"), True

    images = [(torch.full((3, 8, 8), i, dtype=torch.uint8) + torch.arange(8, dtype=torch.uint8), {}) for i in range(32)]
    seen = [image for images, _ in Batches(Data(images), 8, seed=0).epoch(0) for image in images]
    assert all(image[0, 0, 0] < image[0, 0, 7] for image in seen)
    assert "don't tell left from right" in capsys.readouterr().err


# ---- classification


def shapes(n, seed, split):
    images, labels, _ = draw_shapes(n, seed)
    return ImageSet("shapes", split, images, labels, SHAPE_CLASSES, str(seed))


def test_a_share_of_the_labels_is_the_same_share_of_each_class_and_grows_by_seed():
    labels = torch.arange(1000) % 10
    few = few_labels(labels, 0.05, seed=0)
    assert labels[few].bincount().tolist() == [5] * 10
    assert len(few.unique()) == 50
    assert torch.equal(few, few_labels(labels, 0.05, seed=0))
    assert not torch.equal(few, few_labels(labels, 0.05, seed=1))
    assert len(few_labels(labels, 0.0001, seed=0)) == 10
    assert torch.equal(few_labels(labels, 1.0, seed=3), torch.arange(1000))


def test_a_pretrained_start_is_worth_more_than_a_fresh_one_and_stays_as_it_was():
    train, test = shapes(1000, 0, "train"), shapes(300, 1, "test")
    found = {}
    for name in (SHIPPED, "none"):
        start = load_start(name, plain_view(train.images), encoder="tiny")
        before = {name: tensor.clone() for name, tensor in start.backbone.state_dict().items()}
        for how in ("linear", "fine_tuned"):
            result = classify(start, train, test, share=0.2, how=how, epochs=4, batch_size=32, progress=False)
            assert result["labels"] == 200
            found[name, how] = result[f"{how}_top1"]
        assert all(torch.equal(before[name], tensor) for name, tensor in start.backbone.state_dict().items())
    assert found[SHIPPED, "linear"] > found["none", "linear"] + 30
    assert found[SHIPPED, "fine_tuned"] > found["none", "fine_tuned"] + 20


@pytest.mark.parametrize("classes", [2, 5])
def test_a_layer_can_begin_with_a_probe_and_then_answers_as_it_does(classes):
    features = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13) + 3
    labels = (features[:, :classes] / torch.arange(1, classes + 1)).argmax(dim=1)
    probe, layer = linear_probe(features, labels), nn.Linear(12, classes)
    begin_with_probe(layer, probe)
    expected = torch.from_numpy(probe.predict_proba(features.numpy())).float()
    torch.testing.assert_close(layer(features).softmax(dim=1), expected, rtol=1e-3, atol=1e-4)


def test_fine_tuning_on_other_images_does_not_forget_what_frozen_features_know():
    """Photographs' BatchNorm statistics are far from the digits': with them fine-tuning fell from 86 % to 30 % and below."""
    train, test = (load_images("digits", split) for split in ("train", "test"))
    start = load_start(SHIPPED.parent / "moco.safetensors", torch.empty(0))
    frozen, tuned = (classify(start, train, test, share=0.1, how=how, progress=False) for how in ("linear", "fine_tuned"))
    assert tuned["fine_tuned_top1"] > frozen["linear_top1"] - 1
    again = classify(start, train, test, share=0.1, progress=False)  # the start itself stays as it was
    assert again == frozen


def test_fine_tuning_has_one_recipe_however_the_start_was_trained(monkeypatch):
    asked = []
    monkeypatch.setattr(transfer, "train_classifier", lambda net, recipe, *_, **__: asked.append(recipe) or ([], 0.0))
    train = shapes(200, 0, "train")
    first = load_start("none", plain_view(train.images), encoder="tiny")
    odd = first.recipe.replace(
        mechanism="memory_bank", K=7, optimizer="adamw", lr=9.0, weight_decay=1.0, schedule="steps", dim=3
    )
    for start in (first, replace(first, recipe=odd, steps=5)):
        classify(start, train, train, how="fine_tuned", progress=False)
    assert asked[0] == asked[1]
    classify(replace(first, recipe=odd), train, train, how="fine_tuned", lr=0.5, progress=False)
    assert asked[2] == asked[0].replace(lr=0.5)


def test_fresh_weights_are_drawn_by_the_seed_and_their_batchnorm_has_seen_the_images():
    images = plain_view(shapes(300, 0, "train").images)
    starts = [load_start("none", images, encoder="tiny", seed=seed).backbone.eval() for seed in (0, 0, 1)]
    features = [backbone(images) for backbone in starts]
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])
    norm = next(module for module in starts[0].modules() if isinstance(module, nn.BatchNorm2d))
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    starts[0](images)
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=0.1, atol=0.02)


# ---- the rows


def test_the_plan_has_every_start_and_a_row_that_is_there_is_not_measured_again(tmp_path, monkeypatch):
    flags = benchmark.Flags(out=tmp_path, seeds=2, source="shapes")
    jobs = list(benchmark.plan(flags))
    assert len(jobs) == 2 * 5 * (2 * 2 * 3 + 3)  # seeds, starts; two tasks of two ways and three shares, and three dense ones
    assert len(set(jobs)) == len(jobs)
    assert {job.start for job in jobs} == set(benchmark.STARTS)
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    measured = []
    sets = shapes(20, 0, "train"), shapes(20, 1, "test")
    monkeypatch.setattr(benchmark, "images_of", lambda *_: sets)
    row = lambda flags, job: asdict(job) | benchmark.pretraining(flags, job)  # noqa: E731
    monkeypatch.setattr(benchmark, "measure", lambda flags, job: measured.append(job) or row(flags, job))
    assert benchmark.run(flags) == f"150 rows in {tmp_path / 'study-transfer.jsonl'}, 150 of them new"
    assert benchmark.run(flags).endswith("150 rows in " + str(tmp_path / "study-transfer.jsonl") + ", 0 of them new")
    assert measured == jobs
    assert benchmark.run(replace(flags, epochs=9)).endswith("0 of them new")  # which is for photographs
    for path in tmp_path.glob("study*"):
        path.write_text(path.read_text().replace('"pretrain_epochs": 20', '"pretrain_epochs": 5'))
    assert benchmark.run(flags).endswith("150 of them new")
    with pytest.raises(UsageError, match="--source must be shapes or photographs, not photos"):
        benchmark.run(replace(flags, source="photos"))
    with pytest.raises(UsageError, match="--only nix is not known"):
        benchmark.run(benchmark.Flags(out=tmp_path, only="nix"))


def test_a_row_says_what_was_reached_and_where_it_comes_from(tmp_path, monkeypatch):
    few = {"shapes": (shapes(256, 0, "train"), shapes(100, 1, "test"))}
    monkeypatch.setattr(benchmark, "images_of", lambda flags, source: few[source])
    flags = benchmark.Flags(out=tmp_path, encoders=tmp_path / "encoders")
    job = benchmark.Job("shapes", "supervised", 0, "classify", "tiny", "linear", 0.5)
    row = benchmark.measure(flags, job)
    assert {**row, **asdict(job)} == row
    assert 120 <= row["labels"] <= 136  # of 256, half of each class
    assert 0 <= row["linear_top1"] <= 100
    assert row["pretrain_steps"] == 20 * 4
    assert row["data_hash"] == "0"
    kept = list((tmp_path / "encoders").iterdir())
    again = benchmark.measure(flags, job)
    assert again["linear_top1"] == row["linear_top1"]
    assert list((tmp_path / "encoders").iterdir()) == kept


def test_photographs_have_transformers_too_and_the_painter_is_kept(tmp_path, monkeypatch):
    flags = benchmark.Flags(
        out=tmp_path, encoders=tmp_path / "encoders", seeds=1, source="photographs", only="classify", epochs=1
    )
    jobs = [job for job in benchmark.plan(flags) if job.encoder == "vit-learned"]
    assert [job.start for job in jobs[::6]] == ["masked", "untrained", "moco_v3"]
    monkeypatch.setattr(benchmark, "images_of", lambda *_: (shapes(256, 0, "train"), shapes(100, 1, "test")))
    rows = [benchmark.measure(flags, replace(job, share=0.5)) for job in jobs[::6]]
    assert [row["pretrain_steps"] for row in rows] == [2, 0, 2]
    assert all(0 <= row["linear_top1"] <= 100 for row in rows)
    net, facts = load_painter(tmp_path / "painter.safetensors")
    order = mask_order(torch.arange(2), net.patches, seed=0, epoch=0)
    assert provenance_line([facts])
    loss = net.loss(plain_view(shapes(2, 0, "test").images), order)
    assert loss.item() == pytest.approx(facts["final_loss"], abs=0.3)


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_a_model_survives_its_file(task, tmp_path):
    data = [load_annotated("scenes", split, task, n=8) for split in ("train", "test")]
    recipe, kept = Recipe(encoder="tiny", norm="group"), []
    made = build_encoder("tiny", norm="group")
    start = transfer.Start("mine", made.backbone, made.feature_dim, recipe)
    trained = transfer.dense(start, task, *data, epochs=1, batch_size=4, dtype=torch.float32, keep=kept.append, progress=False)
    assert kept[0].model is trained.model
    assert kept[0].result == {}
    transfer.save_trained(tmp_path / "model", trained, {"seed": 3})
    again, facts = transfer.load_trained(tmp_path / "model")
    images = [torch.rand(3, 96, 96)]
    for mine, theirs in zip(again(images)[0].values(), trained.model.eval()(images)[0].values(), strict=True):
        assert torch.equal(mine, theirs)
    assert facts["seed"] == 3
    assert facts["result"] == trained.result
    with pytest.raises(DataError, match="holds no model of a dense task"):
        transfer.load_trained(SHIPPED)


def test_fine_tuning_is_the_same_from_every_start(monkeypatch):
    """Only the weights differ: views, batches, rates and schedule are the task's."""
    seen, train = [], shapes(128, 0, "train")
    monkeypatch.setattr(transfer, "train_classifier", lambda net, recipe, *_, **__: seen.append(recipe) or ([], 1.0))
    for name in (SHIPPED, SHIPPED.parent / "memory_bank.safetensors", "none"):
        start = load_start(name, plain_view(train.images), encoder="tiny")
        classify(start, train, train, how="fine_tuned", progress=False)
    same = ("augmentation", "batch_size", "epochs", "lr", "warmup", "schedule", "optimizer", "weight_decay", "seed")
    assert len({tuple(getattr(recipe, name) for name in same) for recipe in seen}) == 1


def test_a_file_that_holds_no_pretrained_encoder_is_refused():
    with pytest.raises(DataError, match="holds no pre-trained encoder"):
        load_start(SHIPPED.parent / "detect-moco.safetensors", torch.empty(0))
