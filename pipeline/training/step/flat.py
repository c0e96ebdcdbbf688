"""The trained weights of a model as one vector, and their gradients as another.

The tensors of the model stay where they are used, but become views of the vectors. So clipping, the
optimizer and the moving average take a few operations instead of a few for each tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

ALIGNED = 16  # each tensor starts at a multiple of so many numbers; kernels want 16 bytes or more


class FlatWeights:
    """Moves the tensors `names` of `model` into `vector`; by default those that are trained.

    A view keeps shape and memory layout, so an optimizer must treat each number alone, as Adam does. Numbers
    between two tensors are 0 and stay 0.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        every = dict(model.named_parameters())
        chosen = [name for name, tensor in every.items() if tensor.requires_grad] if names is None else names
        self.tensors: dict[str, nn.Parameter] = {name: every[name] for name in chosen}
        self.offsets: dict[str, int] = {}
        length = 0
        for name, tensor in self.tensors.items():
            self.offsets[name] = length
            length += -(-tensor.numel() // ALIGNED) * ALIGNED
        example = next(iter(self.tensors.values()))
        self.vector = nn.Parameter(torch.zeros(length, dtype=example.dtype, device=example.device))
        for name, view in self.views(self.vector.detach()).items():
            view.copy_(self.tensors[name].detach())
            self.tensors[name].data = view

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the part of each tensor in a vector [n] that is laid out as `vector` is."""
        views = {}
        for name, tensor in self.tensors.items():
            views[name] = vector.as_strided(tensor.shape, tensor.stride(), self.offsets[name])
        return views

    def gather_gradients(self) -> None:
        """Let the gradients of all tensors be views of one vector from now on, `vector.grad`."""
        gradients = torch.zeros_like(self.vector)
        self.vector.grad = gradients
        for name, view in self.views(gradients).items():
            self.tensors[name].grad = view

    def parameters(self) -> list[nn.Parameter]:
        """Return what an optimizer gets."""
        return [self.vector]

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the optimizer's state as <tensor>.<moment>; what it has once is repeated for each tensor."""
        named: dict[str, Tensor] = {}
        for moment, state in optimizer.state[self.vector].items():
            if state.shape == self.vector.shape:
                parts = self.views(state)
            else:
                parts = dict.fromkeys(self.tensors, state)
            named |= {f"{name}.{moment}": part for name, part in parts.items()}
        return named

    def restore_moments(self, optimizer: torch.optim.Optimizer, named: dict[str, Tensor]) -> None:
        """Undo `moments`."""
        by_moment: dict[str, dict[str, Tensor]] = {}
        for key, tensor in named.items():
            name, _, moment = key.rpartition(".")
            by_moment.setdefault(moment, {})[name] = tensor
        state: dict[str, Tensor] = {}
        for moment, parts in by_moment.items():
            here = {name: self.tensors[name] for name in parts if name in self.tensors}
            if not all(parts[name].shape == tensor.shape for name, tensor in here.items()):
                state[moment] = next(iter(parts.values())).to(self.vector.device)
                continue
            state[moment] = torch.zeros_like(self.vector, requires_grad=False)
            views = self.views(state[moment])
            for name in here:
                views[name].copy_(parts[name])
        optimizer.state[self.vector] = state
