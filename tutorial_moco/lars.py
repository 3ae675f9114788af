"""LARS, for batches of thousands: steps in proportion to the weights that they change."""

import torch
from torch import Tensor
from torch.optim import Optimizer

TRUST = 0.001  # of a weight's length, what a step of learning rate 1 is


class LARS(Optimizer):
    """SGD with momentum, where each layer's gradient is first brought to the length of its weights (arXiv 1708.03888).

    As SimCLR and MoCo v3 use it: biases and BatchNorm's weights, which are no matrices, have neither that nor weight decay.

    Args:
        lr: learning rate. weight_decay: added to the gradient, of matrices. momentum: in [0, 1).
    """

    def __init__(self, params, lr: float, *, weight_decay: float = 0.0, momentum: float = 0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step, many tensors to a call."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            gradients = [adapted(p, group["weight_decay"]) if p.ndim > 1 else p.grad for p in weights]
            for p in weights:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            speeds = [self.state[p]["momentum_buffer"] for p in weights]
            torch._foreach_mul_(speeds, group["momentum"])
            torch._foreach_add_(speeds, gradients)
            torch._foreach_add_(weights, speeds, alpha=-group["lr"])


def adapted(weight: Tensor, weight_decay: float) -> Tensor:
    """A weight's gradient, with decay, as long as ``TRUST`` of the weight; as it is where either is zero."""
    gradient = weight.grad.add(weight, alpha=weight_decay)
    own, asked = weight.norm(), gradient.norm()
    return gradient * torch.where((own > 0) & (asked > 0), TRUST * own / asked, 1.0)
