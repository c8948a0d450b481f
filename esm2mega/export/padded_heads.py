"""Defines the heads of tasks on padded batches, in plain PyTorch, for the models that are exported.

They have the parameters of `esm2mega.model.heads`, and compute the same without dropout.

Legend: ``b`` proteins of a batch, ``s`` tokens of the longest, ``h`` hidden size, ``k`` outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esm2mega.checkpoint.tensor_filter import TASK_HEAD
from esm2mega.config.head_form import ATTENTION_MAPS, RESIDUE_LINEAR, head_form
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.convert.name_table import Shape

_OF_PROTEINS = ("linear", "mlp", "cls")
_RESIDUE_CNN = ("residue cnn",)


def why_not(head: HeadDescription) -> str | None:
    """Return why a head has no padded form, with what can be exported instead; None if it has one."""
    form = head_form(head.task)
    if not head.is_configured:
        return "its head, loss or model is your own code; give --include encoder"
    if form == ATTENTION_MAPS:
        return "its head is the contact head (task.head=attention_maps); give --include contacts"
    if form[0] not in _OF_PROTEINS and form not in (RESIDUE_LINEAR, _RESIDUE_CNN):
        return f"its head (task.head={head.task.head}) has no form on padded batches; give --include encoder"
    return None


class PaddedHead(nn.Module):
    """Predicts ``[b, k]`` for proteins, or ``[b, s, k]`` for residues with 0 at other tokens.

    Numbers are in the units of the labels; classes have logits.
    """

    # As far as the head has them.
    mean: Tensor
    std: Tensor
    query: Tensor
    dense: nn.Module
    first: nn.Module
    second: nn.Module
    output: nn.Module

    def __init__(self, head: HeadDescription) -> None:
        """Build the modules with unset weights.

        Args:
            head: A head for which `why_not` has no reason.
        """
        super().__init__()
        self.form = head_form(head.task)
        self.per_residue = head.info.per_residue
        self.has_scale = bool(head.info.std)
        for name in ("mean", "std") if self.has_scale else ():
            # They have their values from the start, also where the weights have no memory yet.
            value = torch.tensor(getattr(head.info, name), device="cpu")
            self.register_buffer(name, value, persistent=False)
        for name, shape in head.shapes.items():
            stem, _, parameter = name.removeprefix(TASK_HEAD).partition(".")
            if not parameter:
                self.register_parameter(stem, nn.Parameter(torch.empty(shape)))
            elif parameter == "weight":
                self.add_module(stem, _layer(shape))

    def forward(self, x: Tensor, residues: Tensor) -> Tensor:
        """Predict from hidden states ``[b, s, h]``; bool ``[b, s]`` tells which of them are of residues."""
        outputs = self._of_residues(x, residues) if self.per_residue else self._of_proteins(x, residues)
        if self.has_scale:
            outputs = outputs * self.std + self.mean
        return outputs.masked_fill(~residues[:, :, None], 0.0) if self.per_residue else outputs

    def _of_residues(self, x: Tensor, residues: Tensor) -> Tensor:
        if self.form == RESIDUE_LINEAR:
            return self.output(x)
        # A convolution sees zeros beyond the ends of a protein; channels come before positions.
        others = ~residues[:, None]
        hidden = F.relu(self.first(x.transpose(1, 2).masked_fill(others, 0.0)))
        return self.second(hidden.masked_fill(others, 0.0)).transpose(1, 2)

    def _of_proteins(self, x: Tensor, residues: Tensor) -> Tensor:
        kind, how = self.form
        if kind == "cls":
            hidden = self.dense(x[:, 0])
            return self.output(torch.tanh(hidden) if how == "tanh" else F.gelu(hidden))
        pooled = self._pooled(x, residues, how)
        return self.output(F.relu(self.dense(pooled)) if kind == "mlp" else pooled)

    def _pooled(self, x: Tensor, residues: Tensor, how: str) -> Tensor:
        """Return one vector of each protein, ``[b, h]``, see `esm2mega.model.pooling`."""
        if how == "cls":
            return x[:, 0]
        if how == "max":
            return x.masked_fill(~residues[:, :, None], -torch.inf).amax(dim=1)
        if how == "attention":
            scores = (x @ self.query).masked_fill(~residues, -torch.inf)
            weights = torch.softmax(scores, dim=1)
        else:
            weights = residues.float() / residues.sum(dim=1, keepdim=True).float()
        return (x.masked_fill(~residues[:, :, None], 0.0) * weights[:, :, None]).sum(dim=1)


def _layer(shape: Shape) -> nn.Module:
    """Return a linear layer or a convolution that keeps the length, by the shape of its weight."""
    out, width, *kernel = shape
    if kernel:
        return nn.Conv1d(width, out, kernel[0], padding=kernel[0] // 2)
    return nn.Linear(width, out)
