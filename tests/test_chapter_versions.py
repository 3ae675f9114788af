"""Chapter 09: what it builds by hand agrees with the package; its checks name the mistake."""

import math

import pytest
import torch
import torch.nn.functional as F

from notebooks import checks_as_tests, functions_of
from tutorial_moco.encoders import build_encoder
from tutorial_moco.losses import info_nce
from tutorial_moco.masked import MaskedAutoencoder, mask_order
from tutorial_moco.mechanisms import MoCoV3
from tutorial_moco.pretrain import set_learning_rate
from tutorial_moco.recipes import Recipe
from tutorial_moco.version_checks import check_masked_loss, check_rate, check_v3_loss


@pytest.fixture(scope="module")
def book():
    return functions_of("09_versions.ipynb")


@pytest.mark.parametrize("schedule", ["steps", "cosine"])
def test_the_rate_by_hand_is_the_packages(book, schedule):
    optimizer, recipe = torch.optim.SGD([torch.zeros(1)], lr=1.0), Recipe(schedule=schedule, lr=0.3)
    for done in torch.linspace(0, 1, 57).tolist():
        set_learning_rate(optimizer, recipe, done)
        assert book["rate"](done, schedule, 0.3) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_v3s_loss_by_hand_is_the_packages(book):
    torch.manual_seed(0)
    mechanism = MoCoV3(build_encoder("tiny", head="mlp3"))
    contrast = mechanism.contrast(*torch.randn(2, 24, 3, 32, 32), torch.arange(24))
    (q1, q2), (k2, k1) = contrast.q.chunk(2), contrast.k.chunk(2)  # a query's key is the other view's
    theirs = info_nce(contrast.q, contrast.k, contrast.negatives, 0.2, contrast.exclude)
    torch.testing.assert_close(book["v3_loss"](q1, q2, k1, k2, 0.2), theirs)


def test_the_masked_loss_by_hand_is_the_packages(book):
    torch.manual_seed(0)
    net, images = MaskedAutoencoder(build_encoder("vit-learned").backbone), torch.randn(4, 3, 32, 32)
    order = mask_order(torch.arange(4), net.patches, seed=0, epoch=0)
    hidden = torch.ones(4, net.patches, dtype=torch.bool).scatter(1, order[:, : net.seen], False)
    torch.testing.assert_close(book["masked_loss"](net(images, order), images, hidden), net.loss(images, order))


# Checks --------------------------------------------------------------------------------------------------------------


def steps(*drops, by=0.1):
    return lambda done: by ** sum(done >= drop for drop in drops)


def half_wave(done):
    return 0.5 * (1 + math.cos(math.pi * done))


TWO_DROPS = steps(0.6, 0.8)


def scheduled(by_steps=TWO_DROPS, by_cosine=half_wave):
    return lambda done, schedule: (by_steps if schedule == "steps" else by_cosine)(done)


WRONG_RATES = {
    "drops once only": scheduled(steps(0.6)),
    "first drop, at 0.6": scheduled(steps(0.8)),
    "it grows": scheduled(steps(0.6, 0.8, by=10)),
    "subtracted": scheduled(lambda done: 1 - 0.1 * ((done >= 0.6) + (done >= 0.8))),
    "begins at 2": scheduled(by_cosine=lambda done: 1 + math.cos(math.pi * done)),
    "goes below 0": scheduled(by_cosine=lambda done: math.cos(math.pi * done)),
    "cosine rises": scheduled(by_cosine=lambda done: 0.5 * (1 - math.cos(math.pi * done))),
    "pi in the cosine": scheduled(by_cosine=lambda done: 0.5 * (1 + math.cos(done))),
    "comes back up": scheduled(by_cosine=lambda done: 0.5 * (1 + math.cos(2 * math.pi * done))),
    "quarter of a wave": scheduled(by_cosine=lambda done: math.cos(math.pi / 2 * done)),
    "none of the usual": scheduled(by_cosine=lambda done: 1 - done),
    "for steps: it returns NoneType": lambda done, schedule: None,
}


def v3(pairs=((0, 3), (1, 2)), scale=lambda t: 1 / t, labels=torch.arange, over=2.0, turned=False, more=False):
    """Of (q1, q2, k1, k2) the pairs of queries and keys, and what a reader might do to them."""

    def wrong(*given):
        *vectors, t = given
        total = 0.0
        for query, key in pairs:
            q, k = vectors[query], vectors[key]
            k = torch.cat([k, vectors[5 - key]]) if more else k
            logits = (k @ q.T if turned else q @ k.T) * scale(t)
            total = total + F.cross_entropy(logits, labels(len(q)))
        return total / over

    return wrong


WRONG_V3 = {
    "own view; its key": v3(((0, 2), (1, 3))),
    "labels are zeros": v3(labels=lambda n: torch.zeros(n, dtype=torch.long)),
    "added up": v3(over=1.0),
    "only the first view": v3(((0, 3),), over=1.0),
    "only the second view": v3(((1, 2),), over=1.0),
    "not divided by the temperature": v3(scale=lambda t: 1.0),
    "temperature multiplies": v3(scale=lambda t: t),
    "rows and columns": v3(turned=True),
    "own view are among the negatives": v3(more=True),
    "temperature is in it; it only": lambda *given: 2 * given[-1] * v3()(*given),
    "published code": lambda *given: 2 * given[-1] * v3(over=1.0)(*given),
    "not a tensor": lambda *given: None,
    "Take the mean": lambda q1, q2, k1, k2, t: F.cross_entropy(q1 @ k2.T / t, torch.arange(6), reduction="none"),
}


def painted_error(judge, mean=True, spread=True, cut=lambda images: F.unfold(images, 4, stride=4).transpose(1, 2)):
    def wrong(painted, images, hidden):
        target = cut(images)
        target = target - target.mean(dim=2, keepdim=True) if mean else target
        width = target.std(dim=2, keepdim=True) + 1e-3
        return judge((painted - (target / width if spread else target)).square(), hidden)

    return wrong


def of_hidden(error, hidden):
    return error[hidden].mean()


def colours_last(images):
    return F.unfold(images, 4, stride=4).transpose(1, 2).unflatten(2, (3, 16)).transpose(2, 3).flatten(2)


WRONG_MASKED = {
    "all patches are judged": painted_error(lambda error, hidden: error.mean()),
    "that were seen are judged": painted_error(lambda error, hidden: error[~hidden].mean()),
    "divided by all": painted_error(lambda error, hidden: (error.mean(dim=2) * hidden).mean()),
    "errors are added up": painted_error(lambda error, hidden: error.mean(dim=2)[hidden].sum()),
    "as they are": painted_error(of_hidden, mean=False, spread=False),
    "not divided by its spread": painted_error(of_hidden, spread=False),
    "another order": painted_error(of_hidden, cut=colours_last),
    "column by column": painted_error(of_hidden, cut=lambda images: F.unfold(images.mT, 4, stride=4).transpose(1, 2)),
    "not a tensor": lambda painted, images, hidden: None,
}
CHECKS = {
    "rate": (check_rate, WRONG_RATES, scheduled()),
    "v3_loss": (check_v3_loss, WRONG_V3, v3()),
    "masked_loss": (check_masked_loss, WRONG_MASKED, painted_error(of_hidden)),
}

test_a_check_passes_what_is_right, test_a_check_names_the_mistake = checks_as_tests(CHECKS, "09")
