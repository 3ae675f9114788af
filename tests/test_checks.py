"""Every check passes what is right, and names each mistake it knows when it meets it."""

import pytest
import torch
import torch.nn.functional as F

from notebooks import NAMES, cells
from tutorial_moco import losses
from tutorial_moco.checks import READ, CheckFailed, check_enqueue, check_info_nce, check_momentum_update, compare


def right_info_nce(q, k, negatives, temperature):
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def wrong_info_nce(labels=None, scale=lambda logits, tau: logits / tau, order=lambda p, o: [p, o], finish=lambda loss, n: loss):
    def info_nce(q, k, negatives, temperature):
        parts = order((q * k).sum(dim=1, keepdim=True), q @ negatives.T)
        target = torch.zeros(len(q), dtype=torch.long) if labels is None else labels(len(q))
        return finish(F.cross_entropy(scale(torch.cat(parts, dim=1), temperature), target), len(q))

    return info_nce


def own_key_left_out(q, k, negatives, temperature):
    return (torch.logsumexp(q @ negatives.T / temperature, dim=1) - (q * k).sum(dim=1) / temperature).mean()


def every_key_as_positive(q, k, negatives, temperature):
    return F.cross_entropy(torch.cat([q @ k.T, q @ negatives.T], dim=1) / temperature, torch.zeros(len(q), dtype=torch.long))


def overflowing(q, k, negatives, temperature):
    positive = torch.exp((q * k).sum(dim=1) / temperature)
    return -torch.log(positive / (positive + torch.exp(q @ negatives.T / temperature).sum(dim=1))).mean()


def unwritten(*_):
    raise NotImplementedError


INFO_NCE = {
    "multiplies": wrong_info_nce(scale=lambda logits, tau: logits * tau),
    "not divided": wrong_info_nce(scale=lambda logits, tau: logits),
    "labels are wrong": wrong_info_nce(labels=torch.arange),
    "last column": wrong_info_nce(order=lambda p, o: [o, p]),
    "sign": wrong_info_nce(finish=lambda loss, n: -loss),
    "added up": wrong_info_nce(finish=lambda loss, n: loss * n),
    "own key is missing": own_key_left_out,
    "each query has one key": every_key_as_positive,
    "overflows": overflowing,
    "not written yet": unwritten,
    "none of the usual": lambda q, k, negatives, temperature: right_info_nce(q, k, negatives, temperature) + 0.3,
    "not a tensor": lambda *_: None,
    "shape": lambda q, k, negatives, temperature: right_info_nce(q, k, negatives, temperature).expand(len(q)),
    "RuntimeError": lambda q, k, negatives, temperature: q @ negatives,
}


def test_a_right_info_nce_passes(capsys):
    check_info_nce(right_info_nce)
    check_info_nce(losses.info_nce)
    assert capsys.readouterr().out.count("[OK]") == 2


@pytest.mark.parametrize("words", INFO_NCE)
def test_a_wrong_info_nce_is_told_its_mistake(words):
    with pytest.raises(CheckFailed, match=words):
        check_info_nce(INFO_NCE[words])


def right_enqueue(queue, pointer, keys):
    places = (pointer + torch.arange(len(keys))) % len(queue)
    queue[places[-len(queue) :]] = keys[-len(queue) :]
    return (pointer + len(keys)) % len(queue)


def shifting(queue, pointer, keys):
    queue.copy_(torch.cat([keys, queue])[: len(queue)])
    return (pointer + len(keys)) % len(queue)


def at_place_0(queue, pointer, keys):
    queue[: len(keys)] = keys
    return (pointer + len(keys)) % len(queue)


def dropping_the_rest(queue, pointer, keys):
    room = min(len(keys), len(queue) - pointer)
    queue[pointer : pointer + room] = keys[:room]
    return (pointer + len(keys)) % len(queue)


def old_pointer(queue, pointer, keys):
    right_enqueue(queue, pointer, keys)
    return pointer


def pointer_not_wrapped(queue, pointer, keys):
    right_enqueue(queue, pointer, keys)
    return pointer + len(keys)


def renamed(queue, pointer, keys):
    queue = torch.cat([queue[len(keys) :], keys])
    return (pointer + len(keys)) % len(queue)


ENQUEUE = {
    "moves nothing": shifting,
    "always writes at place 0": at_place_0,
    "wrap-around": dropping_the_rest,
    "the pointer is 0, not": old_pointer,
    "pointer is": pointer_not_wrapped,
    "unchanged": renamed,
    "returns a tuple, not a place": lambda queue, pointer, keys: (queue, right_enqueue(queue, pointer, keys)),
    "returns a Tensor, not a place": lambda queue, pointer, keys: (right_enqueue(queue, pointer, keys), queue)[1],
    "returns nothing": lambda queue, pointer, keys: right_enqueue(queue, pointer, keys) and None,
    "not written yet": unwritten,
}


def test_a_right_enqueue_passes(capsys):
    check_enqueue(right_enqueue)
    assert "[OK]" in capsys.readouterr().out


@pytest.mark.parametrize("words", ENQUEUE)
def test_a_wrong_enqueue_is_told_its_mistake(words):
    with pytest.raises(CheckFailed, match=words):
        check_enqueue(ENQUEUE[words])


def update(new):
    def momentum_update(encoder, key_encoder, m):
        with torch.no_grad():
            for theta_k, theta_q in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
                theta_k.copy_(new(theta_k, theta_q, m))

    return momentum_update


def moving_the_query_encoder(encoder, key_encoder, m):
    with torch.no_grad():
        for theta_k, theta_q in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
            theta_q.copy_(m * theta_q + (1 - m) * theta_k)


def renaming(encoder, key_encoder, m):
    for theta_k, theta_q in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
        theta_k = m * theta_k + (1 - m) * theta_q


def the_first_only(encoder, key_encoder, m):
    with torch.no_grad():
        for theta_k, theta_q in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
            theta_k.mul_(m).add_((1 - m) * theta_q)
            return


def spoiling_a_bias(encoder, key_encoder, m):
    update(lambda k, q, m: m * k + (1 - m) * q)(encoder, key_encoder, m)
    with torch.no_grad():
        key_encoder.bias.zero_()


UPDATE = {
    "only the first parameter": the_first_only,
    "none of the usual mistakes": spoiling_a_bias,
    "wrong way round": update(lambda k, q, m: m * q + (1 - m) * k),
    "that is m = 0": update(lambda k, q, m: q),
    "without being scaled": update(lambda k, q, m: k + (1 - m) * q),
    "the query encoder has moved": moving_the_query_encoder,
    "nothing has changed": renaming,
    "not written yet": unwritten,
}


def test_a_right_momentum_update_passes(capsys):
    check_momentum_update(update(lambda k, q, m: m * k + (1 - m) * q))
    assert "[OK]" in capsys.readouterr().out


@pytest.mark.parametrize("words", UPDATE)
def test_a_wrong_momentum_update_is_told_its_mistake(words):
    with pytest.raises(CheckFailed, match=words):
        check_momentum_update(UPDATE[words])


def test_compare_names_the_first_tensor_that_differs(capsys):
    a = torch.arange(4.0)
    compare(a=(a, a), b=(a, a + 1e-6))
    assert "equal" in capsys.readouterr().out
    with pytest.raises(CheckFailed, match=r"^b is the first"):
        compare(a=(a, a), b=(a, a + 1), c=(a, a[:2]))
    with pytest.raises(CheckFailed, match=r"^a is the first"):
        compare(a=(a, a[:2]), b=(a, a + 1))


@pytest.mark.parametrize("place", sorted(set(READ.values())))
def test_where_to_read_is_a_section_of_a_chapter(place):
    chapter, section = place.split(", ", 1)
    [name] = [name for name in NAMES if name.startswith(chapter)]
    headings = [line.lstrip("# ") for cell in cells(name, "markdown") for line in cell.splitlines() if line.startswith("#")]
    assert section in headings
