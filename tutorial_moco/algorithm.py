"""Algorithm 1 of the paper as a ladder: its lines to put in order, then gaps to fill; and classes to read side by side.

The lines are real code. Orders are judged by what each line needs, so that the answer names what is broken; a test runs the
orders and sees that the judgement is right. A program with filled gaps is run, beside the package's own step.
"""

import inspect
import textwrap
from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_moco import pretrain
from tutorial_moco.augment import two_views
from tutorial_moco.checks import CheckFailed
from tutorial_moco.encoders import Encoder
from tutorial_moco.images import ImageSet
from tutorial_moco.losses import contrastive_logits
from tutorial_moco.mechanisms import MoCo
from tutorial_moco.pretrain import Run, batches, build_optimizer
from tutorial_moco.recipes import Recipe

CPU = torch.device("cpu")

# Rung one: the order ------------------------------------------------------------------------------------------------

LINES = {
    "A": "enqueue(k)",
    "B": "loss = F.cross_entropy(logits / tau, labels)",
    "C": "q = f_q(view_q)",
    "D": "optimizer.step()",
    "E": "view_q, view_k = two_views(images, index, augmentation, epoch=epoch)",
    "F": "update_key_encoder()",
    "G": "logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1)",
    "H": "optimizer.zero_grad(); loss.backward()",
    "I": "k = f_k(view_k)",
    "J": "labels = torch.zeros(len(q), dtype=torch.long)",
}

# (first, then, why): the line `first` has to stand somewhere before the line `then`.
RULES = (
    ("E", "C", "q is made of view_q, and nobody has drawn the views yet."),
    ("E", "I", "k is made of view_k, and nobody has drawn the views yet."),
    ("C", "J", "there is one label for each query, and there are no queries yet."),
    ("C", "G", "the logits compare queries with keys, and there are no queries yet."),
    ("I", "G", "column 0 of the logits is q with its own key k, and there is no k yet."),
    ("G", "B", "the loss is made of the logits, which do not exist yet."),
    ("J", "B", "the loss needs to know that the right answer is column 0: the labels."),
    ("B", "H", "the backward pass starts at the loss, which does not exist yet."),
    ("H", "D", "the optimizer steps along the gradient, and there is no gradient of this step yet."),
    ("G", "A", "the keys are in the queue before the logits are made. Each query then meets its own key twice, in column 0 and "
               "among the negatives; the two share the softmax, so p is at most 1/2 and the loss stops at log 2 = 0.69."),
    ("H", "A", "the queue is written to between the logits and the backward pass. The gradient of q @ queue.T is made of the "
               "queue as it was, so PyTorch stops with a RuntimeError. (The official code copies the queue at each step "
               "instead. After the backward pass there is nothing to copy.)"),
)  # fmt: skip
LAGS = (
    "the key encoder has made its keys, and is updated before the encoder has moved: it follows the encoder of one step ago. "
    "Training would survive it, but it is not Algorithm 1."
)


def shuffled_lines() -> str:
    """The ten lines under their letters, in no useful order."""
    return "\n".join(f"{letter}   {line}" for letter, line in LINES.items())


def check_order(order: str) -> None:
    """Judge an order of the letters in ``LINES``, such as ``"ABC..."``; spaces do not count. Many orders are right.

    Raises:
        CheckFailed: names a line that stands too early, and what is broken by it.
    """
    letters = "".join(order.split()).upper()
    if not letters:
        print(f"[  ] no order yet. Write the letters {', '.join(LINES)}, each once, and run this cell again.")
        return
    wrong = sorted(set(LINES) ^ set(letters)) or [letter for letter in LINES if letters.count(letter) > 1]
    if wrong:
        raise CheckFailed(f"order: each of {', '.join(LINES)} has to occur once. Look at {', '.join(wrong)}.")
    for first, then, why in RULES:
        if letters.index(first) > letters.index(then):
            raise CheckFailed(f"order: {then} stands before {first}: {why}")
    early = letters.index("F") < letters.index("I")
    if letters.index("F") < letters.index("D") and not early:
        raise CheckFailed(f"order: F stands between I and D: {LAGS}")
    print("[OK] every line has what it needs, and nothing is written too early")
    if early:
        print("     (F before the keys, as in the official code: in a loop the same as at the end of the step before.)")


def run_order(order: str, train: ImageSet, steps: int = 4) -> list[dict[str, Tensor]]:
    """Run the lines in this order, some steps from the start of a training; returns what each step made, by its name.

    Raises:
        NameError, RuntimeError: as an order deserves.
    """
    run = pretrain.start(Recipe(encoder="tiny", K=40, batch_size=16), train, CPU, torch.float32)
    moco, recipe = run.mechanism, run.recipe
    names = {
        "torch": torch, "F": F, "two_views": two_views, "tau": recipe.temperature, "augmentation": recipe.augmentation,
        "f_q": moco.encoder, "f_k": moco.encode_keys, "queue": moco.queue, "optimizer": run.optimizer,
        "enqueue": moco.enqueue, "update_key_encoder": moco.update_key_encoder,
    }  # fmt: skip
    program, found = compile("\n".join(LINES[letter] for letter in order), "Algorithm 1", "exec"), []
    for epoch, index in islice(batches(len(train), recipe, 0, CPU), steps):
        names |= {"images": train.images[index], "index": index, "epoch": epoch}
        exec(program, names)
        made = {name: names[name].detach().clone() for name in ("q", "k", "logits", "loss", "queue")}
        found.append(made | {"p": made["logits"].div(recipe.temperature).softmax(dim=1)[:, 0]})
    return found


# Rung two: the gaps -------------------------------------------------------------------------------------------------

FADED = """\
q = f_q(view_q)                                             # (N, C)
with torch.no_grad():
    k = {1}(view_k)                                         # (N, C)
positive = (q * k).sum(dim=1, keepdim=True)                 # (N, 1)
logits = torch.cat([positive, q @ {2}.T], dim=1) {3} tau    # (N, 1 + K)
loss = F.cross_entropy(logits, {4})
optimizer.zero_grad()
loss.backward()
optimizer.step()
with torch.no_grad():
    for theta_k, theta_q in zip(f_k.parameters(), f_q.parameters()):
        theta_k.copy_({5})
    queue[(pointer + torch.arange(N)) % {6}] = {7}
pointer = (pointer + N) % K
"""
SOLUTION = {
    1: "f_k", 2: "queue", 3: "/", 4: "torch.zeros(N, dtype=torch.long)", 5: "m * theta_k + (1 - m) * theta_q", 6: "K", 7: "k"
}  # fmt: skip
# (gap, what somebody wrote there, what that does)
MISTAKES = (
    (
        1,
        "f_q",
        "the query encoder makes the keys. Then nothing is slow: that is MoCo with m = 0; chapter 03 shows its features.",
    ),
    (2, "k", "the keys of the batch are the negatives. That is the end-to-end way, and each query's own key is among them."),
    (3, "*", "the temperature multiplies; it has to divide."),
    (4, "torch.arange(N)", "the labels are the numbers of the rows. The own key stands in column 0 of every row."),
    (4, "torch.ones(N, dtype=torch.long)", "the labels say column 1, which is a negative. The own key is in column 0."),
    (5, "m * theta_q + (1 - m) * theta_k", "the momentum update is the wrong way round: m is the share that theta_k keeps."),
    (5, "theta_q", "the key encoder becomes a copy of the encoder: that is m = 0."),
    (5, "theta_k", "the key encoder never moves: that is m = 1."),
    (6, "N", "only the first N places are ever written. The ring has K places."),
    (7, "q", "queries are put into the queue, and a query is made by the fast encoder."),
)
WHERE = {
    "k": "gap 1", "logits": "gap 2 or gap 3", "loss": "gap 4", "key encoder": "gap 5", "queue": "gap 6 or gap 7"
}  # fmt: skip


def faded() -> str:
    """The step with its gaps, as text."""
    return FADED.format("", *[f"[{gap}]" for gap in SOLUTION])


def check_gaps(fills: dict[int, str]) -> None:
    """Run the step of ``FADED`` with these pieces of code in its gaps beside the package's, and compare what they make.

    Raises:
        CheckFailed: names the first tensor that differs and the gap, or the mistake that gives the same tensors.
    """
    open_gaps = [gap for gap in SOLUTION if not fills.get(gap, "").strip()]
    if open_gaps:
        print(f"[  ] still open: {', '.join(f'[{gap}]' for gap in open_gaps)}. Fill them and run this cell again.")
        return
    expected = list(_package_steps())
    found = []
    try:
        found.extend(_filled_steps(fills))
    except Exception as error:
        raise CheckFailed(f"gaps: the program stopped with {type(error).__name__}: {error}") from error
    different = _first_difference(found, expected)
    if different is None:
        print("[OK] k, logits, loss, key encoder and queue equal the package's in each of 4 steps")
        return
    for gap, wrong, does in MISTAKES:
        if _first_difference(found, list(_filled_steps(SOLUTION | {gap: wrong}))) is None:
            raise CheckFailed(f"gap {gap}: {does}")
    step, name = different
    raise CheckFailed(f"gaps: {name} is the first that differs, in step {step}: look at {WHERE[name]}.")


def _filled_steps(fills: dict[int, str]) -> Iterator[dict[str, Tensor]]:
    """What four steps of the filled program make."""
    run, views = _beginning()
    moco, recipe = run.mechanism, run.recipe
    names = {
        "torch": torch, "F": F, "f_q": moco.encoder, "f_k": moco.key_encoder, "optimizer": run.optimizer, "pointer": 0,
        "queue": moco.queue, "tau": recipe.temperature, "m": recipe.m, "K": recipe.K, "N": recipe.batch_size,
    }  # fmt: skip
    program = compile(FADED.format("", *[fills[gap] for gap in SOLUTION]), "the step", "exec")
    for view_q, view_k, _ in views:
        names |= {"view_q": view_q, "view_k": view_k}
        exec(program, names)
        yield _seen(names["k"], names["logits"], names["loss"], names["f_k"], names["queue"])


def _package_steps() -> Iterator[dict[str, Tensor]]:
    """What four steps of the package make, by its own functions, from the same beginning and the same views."""
    run, views = _beginning()
    for view_q, view_k, index in views:
        contrast = run.mechanism.contrast(view_q, view_k, index)
        logits, loss = contrastive_logits(*contrast[:3], run.recipe.temperature), pretrain.loss_of(run, contrast)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.mechanism.update_key_encoder()
        run.mechanism.update_dictionary(contrast, index)
        yield _seen(contrast.k, logits, loss, run.mechanism.key_encoder, run.mechanism.queue)


def _beginning() -> tuple[Run, list[tuple[Tensor, Tensor, Tensor]]]:
    """A run of a linear encoder on 2x2 pixels, whose queue of 10 wraps around; and views for four steps of 4."""
    recipe = Recipe(dim=8, K=10, m=0.7, batch_size=4, lr=0.5, weight_decay=0.0)
    torch.manual_seed(0)
    moco = MoCo(Encoder(nn.Flatten(), 12, "linear", recipe.dim), recipe.K, recipe.m)
    views = [(torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.arange(4)) for _ in range(4)]
    return Run(recipe, moco, build_optimizer(recipe, moco), torch.float32, n=16), views


def _seen(k: Tensor, logits: Tensor, loss: Tensor, f_k: nn.Module, queue: Tensor) -> dict[str, Tensor]:
    key_encoder = torch.cat([theta.flatten() for theta in f_k.parameters()])
    made = {"k": k, "logits": logits, "loss": loss, "key encoder": key_encoder, "queue": queue}
    return {name: tensor.detach().clone() for name, tensor in made.items()}


def _first_difference(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> tuple[int, str] | None:
    """(step, name) of the first tensor that is not the same, or None."""
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True), 1):
        for name in WHERE:
            if mine[name].shape != theirs[name].shape or not torch.allclose(mine[name], theirs[name], atol=1e-4, rtol=1e-4):
                return step, name
    return None


# Reading classes side by side ---------------------------------------------------------------------------------------


def side_by_side(method: str, *classes: type) -> str:
    """The bodies of one method in several classes, as text, one below the other."""
    return "\n\n".join(
        "\n".join([f"{kind.__name__}.{method}", *(f"    {line}" for line in _body(getattr(kind, method)))]) for kind in classes
    )


def _body(function) -> list[str]:
    """The lines below a method's or a property's signature, without their common indentation."""
    lines = inspect.getsource(getattr(function, "fget", None) or function).splitlines()
    start = next(number for number, line in enumerate(lines) if line.split("  #")[0].endswith(":"))
    return [line for line in textwrap.dedent("\n".join(lines[start + 1 :])).splitlines() if line.strip()]
