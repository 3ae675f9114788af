"""What the features are worth: kNN, a linear probe, nearest neighbours, t-SNE, alignment and uniformity.

None of them trains the encoder. Features are the backbone's, after pooling, before the head. Shapes: n images, D features.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from tutorial_moco.augment import plain_view
from tutorial_moco.distributed import filled_up, gather, mine, rank, world
from tutorial_moco.encoded import EncodedImages, in_batches
from tutorial_moco.images import ImageSet
from tutorial_moco.speed import autocast

KNN_K, KNN_TEMPERATURE = 20, 0.07  # as DINO reads the kNN (arXiv 2104.14294)


def extract_features(
    backbone: nn.Module, images: Tensor | EncodedImages, *, batch_size: int = 500, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Features of images as they are, without augmentation: uint8 (n, 3, H, W) to float32 (n, D) on the CPU.

    Of several processes each makes its share, and has all in the end; all of them must call this.

    The backbone is left in the mode it was found in; its running statistics are used and not changed.
    """
    return gather(features_of_share(backbone, images, batch_size=batch_size, dtype=dtype))[: len(images)]


@torch.no_grad()
def features_of_share(
    backbone: nn.Module, images: Tensor | EncodedImages, *, batch_size: int = 500, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`extract_features` of this process's share: as many for each, so that the last one's may end with some of the first."""
    device = next(backbone.parameters()).device
    was_training = backbone.training
    backbone.eval()
    share = images[mine(filled_up(torch.arange(len(images))))]
    with autocast(device, dtype):
        features = [backbone(plain_view(few.to(device))).float().cpu() for few in in_batches(share, batch_size)]
    backbone.train(was_training)
    return torch.cat(features)


def pixel_features(images: Tensor) -> Tensor:
    """The baseline that learned nothing: the pixels themselves, float32 (n, 3 * H * W)."""
    return images.flatten(1).float().div_(255)


def knn_top1(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = KNN_K,
    temperature: float = KNN_TEMPERATURE,
) -> float:
    """Accuracy, in percent, of a vote of the k most similar training images (Wu et al. 2018, section 3.4).

    Similarity is the cosine; each neighbour votes for its class with weight exp(similarity / temperature).

    Args:
        train (n, D), test (n', D): features; labels int64; all on one device.
        k: neighbours; fewer are used if there are fewer training images.
    """
    train = F.normalize(train, dim=1)
    k, classes = min(k, len(train)), int(train_labels.max()) + 1
    right = 0
    for batch, labels in zip(F.normalize(test, dim=1).split(500), test_labels.split(500), strict=True):
        similarity, neighbours = (batch @ train.T).topk(k, dim=1)
        right += votes_right(similarity, train_labels[neighbours], labels, classes, temperature)
    return 100 * right / len(test)


def votes_right(similarity: Tensor, voted: Tensor, labels: Tensor, classes: int, temperature: float) -> int:
    """How many votes of neighbours (n, k), the most similar first, for these classes (n, k) agree with the labels (n,)."""
    votes = torch.zeros(len(labels), classes, device=labels.device)
    votes.scatter_add_(1, voted, torch.exp((similarity - similarity[:, :1]) / temperature))
    return int((votes.argmax(dim=1) == labels).sum())


def knn_top1_at_size(
    backbone: nn.Module,
    train: ImageSet,
    test: ImageSet,
    *,
    dtype: torch.dtype = torch.float32,
    k: int = KNN_K,
    temperature: float = KNN_TEMPERATURE,
) -> float:
    """`knn_top1` where the features of all training images are too many for one process: each looks among its own.

    Of the k nearest of each process the k nearest of all are taken, which is the same. All processes must call this.
    """
    device = next(backbone.parameters()).device
    own = F.normalize(features_of_share(backbone, train.images, dtype=dtype), dim=1).to(device)
    share = mine(filled_up(torch.arange(len(train))))
    own_labels = train.labels[share].to(device)
    again = torch.arange(len(share), device=device) + rank() * len(share) >= len(train)  # what the last one was filled up with
    asked = F.normalize(extract_features(backbone, test.images, dtype=dtype), dim=1).to(device)
    k, classes, right = min(k, len(train)), int(train.labels.max()) + 1, 0
    for batch, labels in zip(asked.split(500), test.labels.to(device).split(500), strict=True):
        similarity, neighbours = (batch @ own.T).masked_fill(again, -torch.inf).topk(min(k, len(own)), dim=1)
        both = [
            gather(rows).unflatten(0, (world(), -1)).transpose(0, 1).flatten(1) for rows in (similarity, own_labels[neighbours])
        ]
        similarity, which = both[0].topk(k, dim=1)
        right += votes_right(similarity, both[1].gather(1, which), labels, classes, temperature)
    return 100 * right / len(test)


@torch.no_grad()
def notebooks_knn_top1(head: nn.Module, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """The kNN of the official CIFAR-10 notebook (moco_cifar10_demo): of keys, not features, with k = 200 and temperature 0.1.

    It is no small difference: of a ResNet-18 with a linear head it read 74.0 percent where features gave 68.1 (docs/LOG.md).
    Arguments as for `knn_top1`, with the encoder's head, which makes keys of features; it is left in the mode it was found in.
    """
    was_training = head.training
    head.eval()
    keys, asked = head(train), head(test)
    head.train(was_training)
    return knn_top1(keys, train_labels, asked, test_labels, k=200, temperature=0.1)


def linear_probe(features: Tensor, labels: Tensor) -> Pipeline:
    """A linear classifier on frozen features (n, D): scikit-learn's LogisticRegression, standardised."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 rounds are the probe's budget, not a fault
        return probe.fit(features.numpy(), labels.numpy())


def linear_top1(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy, in percent, of a `linear_probe`."""
    return 100 * float(linear_probe(train, train_labels).score(test.numpy(), test_labels.numpy()))


def nearest(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar keys of each query by cosine: (similarities (n, k), positions (n, k)), best first."""
    return (F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T).topk(k, dim=1)


def tsne(features: Tensor, *, seed: int = 0, perplexity: float = 30.0) -> np.ndarray:
    """t-SNE of the directions of features (n, D) in the plane: float32 (n, 2), scaled to unit spread; one alone is at 0."""
    if len(features) < 2:
        return np.zeros((len(features), 2), np.float32)
    perplexity = min(perplexity, (len(features) - 1) / 3)  # scikit-learn wants it well below the number of images
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(F.normalize(features, dim=1).numpy())
    return (points - points.mean(axis=0)) / points.std()


def alignment(q: Tensor, k: Tensor) -> float:
    """Mean squared distance of an image's two views, unit vectors (n, C); 0 is best (arXiv 2005.10242, section 4.1)."""
    return (q - k).square().sum(dim=1).mean().item()


def uniformity(q: Tensor) -> float:
    """log of the mean of exp(-2 distance^2) over pairs of unit vectors (n, C); lower is more even (arXiv 2005.10242)."""
    return torch.pdist(q).square().mul(-2).exp().mean().log().item()


def evaluate_features(train: Tensor, test: Tensor, train_set: ImageSet, test_set: ImageSet) -> dict[str, float]:
    """kNN and linear probe of one pair of features, as ``knn_top1`` and ``linear_top1`` in percent."""
    labels = train_set.labels, test_set.labels
    return {
        "knn_top1": knn_top1(train, labels[0], test, labels[1]),
        "linear_top1": linear_top1(train, labels[0], test, labels[1]),
    }
