"""The three ways to keep a dictionary (Figure 2 of the paper), behind one interface.

Everything else (encoder, views, loss, loop, evaluation) is shared. The classes have the same methods in the same order, so
that reading two of them side by side *is* Figure 2:

=============  =========================  ==============================  =======================================
               keys come from             key encoder is updated by       dictionary is as large as
=============  =========================  ==============================  =======================================
EndToEnd       the other view, now        back-propagation                the batch
MemoryBank     when last seen, an epoch   (there is none)                 the data; K keys are sampled
               or so ago
MoCo           the last K / B steps       momentum: a slow copy of f_q    you like: a queue of K keys
SimCLR         both views, now            back-propagation (same encoder) two batches
MoCoV3         the other view, now        momentum                        the batch
=============  =========================  ==============================  =======================================

Shapes: N images of a batch, C dimensions, K negatives. Of several processes each has N images of its own (`distributed`), and
all have the same dictionary: queries meet the keys of all, and what is written is gathered first.
"""

from abc import ABC, abstractmethod
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_moco.distributed import gather, gather_views, mine, my_views
from tutorial_moco.encoders import Encoder, build_predictor
from tutorial_moco.randomness import permutation

SAMPLE = 1  # in the key of the bank's draw, else its first sample would begin with the first batch of the epoch's order


class Contrast(NamedTuple):
    """What the loss needs: queries, their keys, the negatives, and which negatives are no negatives."""

    q: Tensor  # (N, C), with gradient
    k: Tensor  # (N, C)
    negatives: Tensor  # (K, C)
    exclude: Tensor | None = None  # bool (N, K), True where a negative is the query's own key


class Mechanism(nn.Module, ABC):
    """One way to keep a dictionary of keys. ``contrast`` reads it; only ``update_dictionary`` writes it."""

    encoder: Encoder  # f_q, the one that is trained and kept

    @abstractmethod
    def contrast(self, view_q: Tensor, view_k: Tensor, index: Tensor) -> Contrast:
        """Encode two views (N, 3, H, W) of the images ``index`` (N,). Changes nothing but BatchNorm's running statistics."""

    def forward(self, *batch: Tensor) -> Contrast:
        """`contrast`, under the name by which DistributedDataParallel calls it."""
        return self.contrast(*batch)

    @abstractmethod
    def update_key_encoder(self) -> None:
        """Algorithm 1's momentum update, after the optimizer's step."""

    @abstractmethod
    def update_dictionary(self, contrast: Contrast, index: Tensor) -> None:
        """Algorithm 1's enqueue and dequeue, after the backward pass: so no key is its own negative, and nothing is copied."""

    @property
    @abstractmethod
    def dictionary_bytes(self) -> int:
        """Memory of the keys that stay from one step to the next."""


class EndToEnd(Mechanism):
    """Figure 2(a): query and key encoder are both trained by back-propagation; the negatives are the batch's other keys."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder, self.key_encoder = encoder, deepcopy(encoder)

    def contrast(self, view_q: Tensor, view_k: Tensor, index: Tensor) -> Contrast:
        q, k = self.encoder(view_q), self.key_encoder(view_k)
        keys = gather(k)
        return Contrast(q, k, negatives=keys, exclude=mine(torch.eye(len(keys), dtype=torch.bool, device=q.device)))

    def update_key_encoder(self) -> None:
        pass  # the optimizer has done it

    def update_dictionary(self, contrast: Contrast, index: Tensor) -> None:
        pass  # it lives for one step

    @property
    def dictionary_bytes(self) -> int:
        return 0


class MemoryBank(Mechanism):
    """Figure 2(b): one key for each of n images, written when the image was last seen, by the encoder of that time.

    K of them are sampled as negatives, the same for the whole batch. There is no key encoder; a key is a running mean over
    visits, bank[i] = normalise(momentum * bank[i] + (1 - momentum) * q) (Wu et al. 2018, arXiv 1805.01978).
    The bank begins with random unit vectors, as published, until `fill` has given each image a key of its own.

    Args:
        n: number of images. K: negatives, 1 .. n - 1; n - 1 means all other images, nothing is sampled.
        momentum: of a key over visits, in [0, 1).
    """

    def __init__(self, encoder: Encoder, n: int, K: int, momentum: float = 0.5, seed: int = 0):
        super().__init__()
        self.encoder, self.K, self.momentum, self.seed = encoder, K, momentum, seed
        self.register_buffer("bank", _random_keys(n, encoder.dim, seed))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def fill(self, view: Tensor, index: Tensor) -> None:
        """First keys of the images ``index`` (N,): what the encoder makes of a view (N, 3, H, W) before any training.

        Published banks are not filled. But a random vector tells nothing of its image, and as a positive it only pulls the
        encoder astray: the whole first epoch, and half of the key for the whole second.
        """
        self.bank[gather(index)] = gather(self.encoder(view))

    def contrast(self, view_q: Tensor, view_k: Tensor, index: Tensor) -> Contrast:
        q = self.encoder(view_q)
        n = len(self.bank)
        if n - 1 <= self.K:
            return Contrast(q, self.bank[index], self.bank, exclude=index[:, None] == torch.arange(n, device=q.device))
        sample = permutation(n, self.seed, self.steps, SAMPLE, device=q.device)[: self.K]
        return Contrast(q, self.bank[index], self.bank[sample], exclude=index[:, None] == sample)

    def update_key_encoder(self) -> None:
        pass  # there is none

    @torch.no_grad()
    def update_dictionary(self, contrast: Contrast, index: Tensor) -> None:
        q, index = gather(contrast.q), gather(index)
        self.bank[index] = F.normalize(torch.lerp(q, self.bank[index], self.momentum), dim=1)
        self.steps += 1

    @property
    def dictionary_bytes(self) -> int:
        return self.bank.nbytes


class MoCo(Mechanism):
    """Figure 2(c): a queue of the last K keys, written by a key encoder that follows the query encoder slowly.

    The queue is a ring: ``queue[pointer]`` is the oldest key and the next to be overwritten. Any K goes with any batch
    size. It begins with random unit vectors; ``filled`` counts the real keys, ``born`` holds the step each was written at
    (-1: random).

    Args:
        K: keys in the queue, at least 1.
        m: momentum of the key encoder, theta_k <- m theta_k + (1 - m) theta_q (equation 2), in [0, 1]. Parameters only:
            BatchNorm's running statistics are each encoder's own, as in the published code.
        shuffle: shuffling BN (section 3.3): the key encoder sees the batch in another order. On one device it only
            matters together with `SplitBatchNorm2d`.
        symmetric: each view is query once and key once (as in MoCo v3): 2N queries, both views' keys are enqueued.
    """

    def __init__(
        self, encoder: Encoder, K: int, m: float = 0.99, *, shuffle: bool = False, symmetric: bool = False, seed: int = 0
    ):
        super().__init__()
        self.encoder, self.key_encoder = encoder, deepcopy(encoder).requires_grad_(False)
        self.K, self.m, self.shuffle, self.symmetric, self.seed = K, m, shuffle, symmetric, seed
        self.register_buffer("queue", _random_keys(K, encoder.dim, seed))  # (K, C); the paper writes it C x K
        for name in ("pointer", "filled", "steps"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("born", torch.full((K,), -1))

    def contrast(self, view_q: Tensor, view_k: Tensor, index: Tensor, *order: Tensor) -> Contrast:
        q, k = self.encoder(view_q), self.encode_keys(view_k, *order)
        if self.symmetric:
            q, k = torch.cat([q, self.encoder(view_k)]), torch.cat([k, self.encode_keys(view_q)])
        return Contrast(q, k, self.queue)

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        keys, queries = list(self.key_encoder.parameters()), list(self.encoder.parameters())
        torch._foreach_lerp_(keys, queries, 1 - self.m)  # all parameters in a few calls, not one call each

    def update_dictionary(self, contrast: Contrast, index: Tensor) -> None:
        self.enqueue(gather_views(contrast.k, len(index)))

    @property
    def dictionary_bytes(self) -> int:
        return self.queue.nbytes

    def order(self, B: int, step: int | None = None, device: torch.device | str | None = None) -> Tensor:
        """The order in which the key encoder sees a batch of B images at this step, or another one, int64 (B,)."""
        step = self.steps if step is None else step
        return permutation(B, self.seed, step, device=device or self.queue.device)

    @torch.no_grad()
    def encode_keys(self, view: Tensor, order: Tensor | None = None) -> Tensor:
        """Keys (N, C) of a view (N, 3, H, W), without gradient, in the batch's order.

        Args:
            order: int64 (B,), if the view already shows this process's part of the whole batch in that order: so the loader
                has shuffled, and between processes keys travel, not images. Else the view is in the batch's order.
        """
        if self.shuffle and order is None:
            order = self.order(len(view))
            view = view[order]
        keys = self.key_encoder(view)
        return keys if order is None else mine(gather(keys)[torch.argsort(order)])

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write keys (N, C) over the N oldest; the only place where the queue changes."""
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % self.K
        last = slice(-self.K, None)  # of more than K keys the first would be overwritten at once
        self.queue[places[last]] = keys[last].to(self.queue.dtype)
        self.born[places[last]] = self.steps
        self.pointer.copy_((self.pointer + len(keys)) % self.K)
        self.filled.copy_((self.filled + len(keys)).clamp(max=self.K))
        self.steps += 1

    def ages(self) -> Tensor:
        """Steps since each key was written, int64 (K,): 1 for the newest; -1 where no key has been written yet."""
        return torch.where(self.born < 0, -1, self.steps - self.born)


class SimCLR(Mechanism):
    """The modern end-to-end (arXiv 2002.05709): one encoder, every view of the batch is query, key and negative."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def contrast(self, view_q: Tensor, view_k: Tensor, index: Tensor) -> Contrast:
        z = self.encoder(torch.cat([view_q, view_k]))
        every = gather_views(z, len(index))
        itself = torch.eye(len(every), dtype=torch.bool, device=z.device)
        partner = itself.roll(len(every) // 2, dims=0)
        return Contrast(z, z.roll(len(index), dims=0), negatives=every, exclude=my_views(itself | partner, 2))

    def update_key_encoder(self) -> None:
        pass  # the optimizer has done it

    def update_dictionary(self, contrast: Contrast, index: Tensor) -> None:
        pass  # it lives for one step

    @property
    def dictionary_bytes(self) -> int:
        return 0


class MoCoV3(Mechanism):
    """MoCo v3 (arXiv 2104.02057, algorithm 1): no queue. The negatives are the batch's other keys, made by the slow encoder;
    the queries go through one network more, the predictor, which has no slow copy; each view is query once and key once.

    The published loss adds both directions and multiplies by 2 * temperature: this one times 4 * temperature, which with SGD
    only scales the learning rate, with AdamW hardly that, with LARS that of biases and BatchNorm alone.
    """

    def __init__(self, encoder: Encoder, m: float = 0.99):
        super().__init__()
        self.encoder, self.key_encoder = encoder, deepcopy(encoder).requires_grad_(False)
        self.predictor, self.m = build_predictor(encoder.dim, encoder.hidden), m

    def contrast(self, view_q: Tensor, view_k: Tensor, index: Tensor) -> Contrast:
        q = torch.cat([self.predictor(self.encoder(view, unit=False)) for view in (view_q, view_k)])
        with torch.no_grad():
            k = torch.cat([self.key_encoder(view) for view in (view_k, view_q)])
        keys = gather_views(k, len(index))
        of_other_view = torch.eye(2, dtype=torch.bool, device=q.device).logical_not()
        of_other_view = of_other_view.repeat_interleave(len(keys) // 2, 0).repeat_interleave(len(keys) // 2, 1)
        itself = torch.eye(len(keys), dtype=torch.bool, device=q.device)
        return Contrast(F.normalize(q.float(), dim=1), k, negatives=keys, exclude=my_views(itself | of_other_view, 2))

    update_key_encoder = MoCo.update_key_encoder  # the predictor has no slow copy

    def update_dictionary(self, contrast: Contrast, index: Tensor) -> None:
        pass  # it lives for one step

    @property
    def dictionary_bytes(self) -> int:
        return 0


def _random_keys(n: int, dim: int, seed: int) -> Tensor:
    """Unit vectors (n, dim) in random directions. Without the normalising the loss is stuck at log(K + 1)."""
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)
