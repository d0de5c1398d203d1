"""Fused mixture-of-experts layer with grouped matrix products and room for deltas.

Computes y = down(act(gate x) * up x) for every (token, expert) pair at once: pairs are sorted by
expert, so each projection is one grouped product and no loop, count or mask ever visits the host.
Fast weights and outer adapters add their low-rank or full deltas to the same sorted pairs without
touching, or ever adding to, the base weights. Shapes: T tokens, K experts per token, S = T*K pairs,
E experts, H width, I expert width, G groups of consecutive pairs.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from memdlm.backbones.batch_rows import present_rows
from memdlm.backbones.gated_mlp import gated

# The grouped kernel wants rows that start on 16-byte boundaries.
_ALIGNMENT_BYTES = 16
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExpertDelta(Protocol):
    """What fast weights or an adapter look like to one projection of the experts."""

    num_rows: int
    """Sequences with a memory of their own; 1 when all share one."""

    def __call__(self, inputs: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Return the addition to the projection of `inputs` [S, in], sorted by (expert, row).

        `offsets` [E * num_rows] int32 holds the end of every (expert, row) group.
        """
        ...


class Experts(nn.Module):
    """Routed experts with weights stacked along the first dimension.

    `gate_up_proj` [E, 2I, H] holds gate above up; `down_proj` is [E, H, I].
    """

    projections = ("gate_proj", "up_proj", "down_proj")

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, act: str
    ) -> None:
        """Allocate the weights of `num_experts` experts; initialisation is the model's."""
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.act_fn = ACT2FN[act]
        self._deltas: Mapping[str, ExpertDelta] = {}

    def attach(self, deltas: Mapping[str, ExpertDelta]) -> None:
        """Add `deltas` (by projection name) to every forward until called again with none."""
        self._deltas = deltas

    def projection_shape(self, name: str) -> tuple[int, int]:
        """Return (out, in) features of one projection of one expert."""
        if name == "down_proj":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    def project(self, name: str, inputs: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Multiply by the stacked base weight `name`; what a quantised stack does otherwise.

        Args:
            name: `gate_up_proj` or `down_proj`.
            inputs: [S, in], sorted by expert.
            ends: Where each expert's pairs end [E] int32.
        """
        return grouped_linear(inputs, getattr(self, name), ends)

    def forward(
        self,
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        adapter: Mapping[str, ExpertDelta] | None = None,
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts [T, H].

        Args:
            hidden: Token states [T, H].
            chosen: Experts of every token [T, K] int64.
            weights: Their weights [T, K], same dtype as `hidden`.
            adapter: Deltas of an outer adapter by projection name, beside those attached.
        """
        deltas = [source for source in (adapter, self._deltas) if source]
        num_tokens, top_k = chosen.shape
        num_rows = max([1, *(d.num_rows for source in deltas for d in source.values())])
        tokens = torch.arange(num_tokens, device=hidden.device).repeat_interleave(
            top_k, output_size=num_tokens * top_k
        )
        # Sorting by (expert, row) serves base weights (one group per expert) and fast weights (one
        # per expert and row; none of a row that the forward does not have).
        group = chosen.flatten() * num_rows + _rows_of(tokens, num_tokens, num_rows)
        group, order = group.sort(stable=True)
        token = tokens[order]
        row_ends = group_ends(group, self.num_experts * num_rows)
        ends = row_ends[num_rows - 1 :: num_rows].contiguous()

        inputs = hidden[token]  # [S, H]
        gate_up = self.project("gate_up_proj", inputs, ends)  # [S, 2I]
        for source in deltas:
            if "gate_proj" in source or "up_proj" in source:
                # Added before the split: elementwise kernels round differently on half of a tensor
                # and on a whole one, and a delta of zero must not change a bit.
                halves = [
                    gate_up.new_zeros(gate_up.shape[0], self.intermediate_size)
                    if name not in source
                    else self._delta(source[name], inputs, ends, row_ends, gate_up.dtype)
                    for name in ("gate_proj", "up_proj")
                ]
                gate_up = gate_up + torch.cat(halves, dim=-1)
        gate, up = gate_up.chunk(2, dim=-1)
        inner = gated(self.act_fn, gate, up)  # [S, I]
        outputs = self.project("down_proj", inner, ends)
        for source in deltas:
            if "down_proj" in source:
                outputs = outputs + self._delta(
                    source["down_proj"], inner, ends, row_ends, outputs.dtype
                )

        outputs = outputs * weights.flatten()[order, None]
        # Back to token order and sum: unlike index_add_, this is deterministic on every device.
        inverse = torch.empty_like(order).scatter_(
            0, order, torch.arange(order.numel(), device=order.device)
        )
        return outputs[inverse].view(num_tokens, top_k, -1).sum(dim=1).to(hidden.dtype)

    def _delta(
        self,
        delta: ExpertDelta,
        inputs: torch.Tensor,
        ends: torch.Tensor,
        row_ends: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return one delta's addition: shared by all rows (one group an expert), or one a row.

        It comes in the projection's `dtype`, which under autocast is not always the inputs'.
        """
        groups = ends if delta.num_rows == 1 else row_ends
        if delta.num_rows * self.num_experts != groups.numel():
            raise ValueError("all fast weights of one layer must have the same number of rows")
        return delta(inputs, groups).to(dtype)

    def extra_repr(self) -> str:
        """Show the sizes that the stacked weights hide."""
        return f"{self.num_experts} x ({self.hidden_size}, {self.intermediate_size})"


def _rows_of(tokens: torch.Tensor, num_tokens: int, num_rows: int) -> torch.Tensor:
    """Return the row of the batch that each of `tokens` [S] is of; they come row by row."""
    present = None if num_rows == 1 else present_rows()
    if present is None:
        return tokens // (num_tokens // num_rows)
    return present[tokens // (num_tokens // len(present))]


def group_ends(sorted_groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return where each group ends [G] int32 in ids [S] sorted ascending, without a host sync."""
    ids = torch.arange(num_groups, device=sorted_groups.device)
    return torch.searchsorted(sorted_groups, ids, right=True).to(torch.int32)


def grouped_linear(inputs: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply consecutive groups of rows by their own matrices.

    Args:
        inputs: [S, in], group g being the rows `ends[g-1]:ends[g]`.
        weight: One matrix per group [G, out, in].
        ends: Group ends [G] int32.

    Returns:
        [S, out].
    """
    device = inputs.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        # Autocast does not know the grouped product, nor the meta device.
        dtype = torch.get_autocast_dtype(device)
        inputs, weight = inputs.to(dtype), weight.to(dtype)
    if inputs.dtype not in _GROUPED_DTYPES:
        return _looped_linear(inputs, weight, ends)
    multiple = _ALIGNMENT_BYTES // inputs.element_size()
    num_out = weight.shape[1]
    pad_in, pad_out = -weight.shape[2] % multiple, -num_out % multiple
    if pad_in or pad_out:
        inputs, weight = F.pad(inputs, (0, pad_in)), F.pad(weight, (0, pad_in, 0, pad_out))
    outputs = F.grouped_mm(inputs, weight.transpose(1, 2), offs=ends)
    return outputs[:, :num_out] if pad_out else outputs


def _looped_linear(inputs: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Do the same in a plain loop, for float64 checks that no grouped kernel supports."""
    starts = [0, *ends.tolist()]
    parts = [
        inputs[start:end] @ matrix.t()
        for start, end, matrix in zip(starts, starts[1:], weight, strict=False)
    ]
    return torch.cat(parts)
