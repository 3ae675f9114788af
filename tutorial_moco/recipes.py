"""All settings of a training in one frozen record, checked when it is made; and the recipes known by name."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from tutorial_moco.augment import AUGMENTATIONS
from tutorial_moco.errors import DataError, UsageError

MechanismName = Literal["moco", "memory_bank", "end_to_end", "simclr", "moco_v3"]


@dataclass(frozen=True)
class Recipe:
    """How to pre-train. Every field is a flag of the command line with the same name.

    Raises:
        UsageError: a value outside its range; the message names the flag, the value and the range.
    """

    mechanism: MechanismName = "moco"
    """How the dictionary is kept (Figure 2 of the paper); simclr and moco_v3 are its later kin."""
    encoder: Literal["tiny", "small", "wide", "resnet18", "resnet50", "vit", "vit-learned", "vit-small"] = "small"
    """tiny, small and wide are made for two cores, resnet18 has the stem for small images, resnet50 is the paper's; vit is a
    transformer for 32 pixels, its patch projection fixed (as in v3) or learned, vit-small v3's for 224 pixels."""
    head: str = "linear"
    """What projects features to keys: linear (v1), mlp (v2), mlp2 or mlp3 (v3's, of a ResNet and of a transformer), these also
    with a width: mlp3:4096."""
    dim: int = 128
    """C, the length of keys and queries."""
    norm: str = "batch"
    """batch, split:S (statistics over S parts of the batch, as on S GPUs) or group."""
    K: int = 1024
    """Negatives: the length of MoCo's queue, the sample from the memory bank. end_to_end, simclr and moco_v3 use the batch."""
    m: float = 0.99
    """Momentum of the key encoder of moco and moco_v3, in [0, 1]."""
    m_rises: bool = False
    """m rises along a cosine to 1 in the course of the training (v3)."""
    temperature: float = 0.1
    """tau of the loss, above 0."""
    loss: Literal["info_nce", "nce"] = "info_nce"
    """InfoNCE, or noise-contrastive estimation with its Z."""
    symmetric: bool = False
    """MoCo: each view is query once and key once."""
    shuffle: bool = False
    """MoCo: shuffling BN; on one device it needs --norm split:S to matter."""
    bank_momentum: float = 0.5
    """Memory bank: share of the old key that stays when its image is seen again."""
    augmentation: str = "small"
    """The two random views: v1, v2, v3, cifar (the official notebook's), small (weaker colours), shapes (every hue), none."""
    view_size: int | None = None
    """Crop views of so many pixels a side from the whole pictures of a folder or a .tar, which stay encoded on the disk: for
    ImageNet. If left out, images are decoded once, into memory, and views are as large as they are."""
    batch_size: int = 128
    """Images of a step, of all processes together."""
    accumulate: int = 1
    """moco and memory_bank: take a step's batch in so many parts, one after another, where memory is short. The queue and the
    gradient are the whole batch's; BatchNorm's statistics are each part's."""
    epochs: int = 20
    """Passes over the images, unless --minutes is given."""
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
    """SGD and LARS have momentum 0.9; LARS is for batches of thousands."""
    lr: float = 0.12
    """Learning rate after the warm-up. Never scaled behind your back."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """How it falls: along a cosine to 0 (v2), or to a tenth at 60 % and again at 80 % of the training (v1)."""
    warmup: float = 0.0
    """Share of the training in which the learning rate rises from 0, in [0, 1)."""
    weight_decay: float = 5e-4
    """Weight decay, on all parameters; of LARS, on matrices."""
    seed: int = 0
    """Decides the weights, the order, the views and the first queue."""

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise UsageError(f"{flag(name)} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)}")
        for name, allowed, holds in (
            ("K", "at least 1", self.K >= 1),
            ("m", "in [0, 1]", 0 <= self.m <= 1),
            ("temperature", "above 0", self.temperature > 0 and math.isfinite(self.temperature)),
            ("bank_momentum", "in [0, 1)", 0 <= self.bank_momentum < 1),
            ("dim", "in 2 .. 4096", 2 <= self.dim <= 4096),
            ("view_size", "at least 8", self.view_size is None or self.view_size >= 8),
            ("batch_size", "at least 2", self.batch_size >= 2),
            ("accumulate", f"a divisor of {flag('batch_size')} {self.batch_size}", divides(self.accumulate, self.batch_size)),
            ("epochs", "at least 1", self.epochs >= 1),
            ("lr", "above 0", self.lr > 0 and math.isfinite(self.lr)),
            ("warmup", "in [0, 1)", 0 <= self.warmup < 1),
            ("weight_decay", "at least 0", self.weight_decay >= 0 and math.isfinite(self.weight_decay)),
            ("seed", "in 0 .. 2**31 - 1", 0 <= self.seed < 2**31),
            ("augmentation", f"one of {', '.join(AUGMENTATIONS)}", self.augmentation in AUGMENTATIONS),
        ):
            if not holds:
                raise UsageError(f"{flag(name)} must be {allowed}, not {getattr(self, name)}")
        if self.accumulate > 1 and self.mechanism not in ("moco", "memory_bank"):
            raise UsageError(f"--accumulate is for moco and memory_bank: the negatives of {self.mechanism} are one batch's")
        if self.accumulate > 1 and self.loss == "nce":
            raise UsageError("--accumulate is for --loss info_nce: the normaliser of nce is estimated from a whole batch")
        if self.m_rises and self.mechanism not in ("moco", "moco_v3"):
            raise UsageError(f"--m-rises is for moco and moco_v3: {self.mechanism} has no slow encoder")
        if self.mechanism != "moco" and (self.symmetric or self.shuffle):
            raise UsageError(f"--symmetric and --shuffle are MoCo's: leave them out with --mechanism {self.mechanism}")
        if self.loss == "nce" and self.mechanism not in ("moco", "memory_bank"):
            raise UsageError(f"--loss nce needs noise from a dictionary: use moco or memory_bank, not {self.mechanism}")

    def replace(self, **changes) -> "Recipe":
        """The same recipe with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """One line of JSON, for checkpoints."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The recipe that `to_json` wrote.

        Raises:
            DataError: it has settings that this version does not know.
        """
        settings = json.loads(text)
        if unknown := sorted(set(settings) - set(vars(cls()))):
            raise DataError(f"a recipe has {', '.join(unknown)}, which this version of tutorial_moco does not know: update it")
        return cls(**settings)


# How a transformer of any start is trained, for 32 pixels and batches of some hundred.
TRANSFORMER = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1}


def divides(part: int, whole: int) -> bool:
    """Whether a whole number of such parts makes the whole."""
    return part >= 1 and whole % part == 0


def flag(field: str) -> str:
    """The command line's name of a field: ``batch_size`` is ``--batch-size``."""
    return "--" + field.replace("_", "-")


# The paper's section 4, on 8 GPUs of 32 images. Learning rates of v3 and SimCLR are theirs for 256 images times B / 256.
IMAGENET = Recipe(
    encoder="resnet50", K=65536, m=0.999, temperature=0.07, shuffle=True, augmentation="v1", view_size=224, batch_size=256,
    epochs=200, lr=0.03, schedule="steps", weight_decay=1e-4,
)  # fmt: skip
IMAGENET_V2 = IMAGENET.replace(head="mlp", temperature=0.2, augmentation="v2", schedule="cosine")
IMAGENET_V3 = IMAGENET.replace(
    mechanism="moco_v3", head="mlp2:4096", dim=256, m=0.99, m_rises=True, temperature=1.0, shuffle=False,
    augmentation="v3-resnet", batch_size=4096, epochs=100, optimizer="lars", lr=9.6, schedule="cosine", warmup=0.1,
    weight_decay=1e-6,
)  # fmt: skip

RECIPES: dict[str, Recipe] = {
    # Two cores and ten minutes. How it was chosen: docs/LOG.md.
    "small": Recipe(),
    # The drawn images, in a minute: many small steps of a tiny encoder, and colour blocked as a shortcut.
    "shapes": Recipe(encoder="tiny", K=256, batch_size=64, augmentation="shapes"),
    # The official CIFAR-10 notebook (moco_cifar10_demo), asymmetric: 82.6 % kNN after 200 epochs on a GPU.
    "cifar10-resnet18": Recipe(
        encoder="resnet18", K=4096, norm="split:8", shuffle=True, augmentation="cifar", batch_size=512, epochs=200, lr=0.06
    ),
    "imagenet-moco-v1": IMAGENET,
    "imagenet-moco-v2": IMAGENET_V2,
    "imagenet-moco-v2-800": IMAGENET_V2.replace(epochs=800),
    "imagenet-moco-v3": IMAGENET_V3,
    "imagenet-moco-v3-300": IMAGENET_V3.replace(epochs=300, lr=4.8, warmup=10 / 300),
    "imagenet-moco-v3-1000": IMAGENET_V3.replace(epochs=1000, lr=4.8, warmup=10 / 1000, weight_decay=1.5e-6, m=0.996),
    "imagenet-moco-v3-vit-small": IMAGENET_V3.replace(
        encoder="vit-small", head="mlp3:4096", temperature=0.2, augmentation="v3", epochs=300, optimizer="adamw", lr=2.4e-3,
        warmup=40 / 300, weight_decay=0.1,
    ),
    "imagenet-simclr": IMAGENET.replace(
        mechanism="simclr", head="mlp", temperature=0.1, shuffle=False, augmentation="simclr", batch_size=4096, epochs=1000,
        optimizer="lars", lr=4.8, schedule="cosine", warmup=10 / 1000, weight_decay=1e-6,
    ),
    # A hundred of the classes: 65,536 keys would be half of the images.
    "imagenet100-moco-v2": IMAGENET_V2.replace(K=16384, epochs=500),
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """What a paper, or its code, says that a recipe reaches and costs."""

    source: str
    linear_top1: float | None = None
    knn_top1: float | None = None
    cost: str = ""
    otherwise: str = ""  # what is not as it is here


SYNCHRONISED = "BatchNorm's statistics are those of all GPUs together, not each one's"
V3_RESNET = SYNCHRONISED + "; residual branches begin at zero; the loss is 4 times as large, which LARS feels in biases alone"
PUBLISHED: dict[str, Published] = {
    "cifar10-resnet18": Published("moco_cifar10_demo", knn_top1=82.6, cost="20 s an epoch on one V100"),
    "imagenet-moco-v1": Published("arXiv 1911.05722, table 1", linear_top1=60.6, cost="53 h on 8 V100"),
    "imagenet-moco-v2": Published("arXiv 2003.04297, tables 1 and 3", linear_top1=67.5, cost="53 h on 8 V100"),
    "imagenet-moco-v2-800": Published("arXiv 2003.04297, table 2", linear_top1=71.1, cost="4 times that of 200 epochs"),
    "imagenet-moco-v3": Published(
        "moco-v3, CONFIG.md", linear_top1=68.9, cost="memory of 16 V100 of 32 GB", otherwise=V3_RESNET
    ),
    "imagenet-moco-v3-300": Published(
        "moco-v3, CONFIG.md", linear_top1=72.8, cost="memory of 16 V100 of 32 GB", otherwise=V3_RESNET
    ),
    "imagenet-moco-v3-1000": Published(
        "moco-v3, CONFIG.md", linear_top1=74.6, cost="memory of 16 V100 of 32 GB", otherwise=V3_RESNET
    ),
    "imagenet-moco-v3-vit-small": Published(
        "moco-v3, CONFIG.md", linear_top1=73.2, cost="memory of 32 GPUs", otherwise=SYNCHRONISED
    ),
    "imagenet-simclr": Published("arXiv 2002.05709, table 6", linear_top1=69.3, otherwise=SYNCHRONISED),
}
