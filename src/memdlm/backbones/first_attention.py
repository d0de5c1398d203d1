"""The first layer's attention in a decode, where most tokens stay as they are.

The first layer sees embeddings. Queries, keys and values of a token that stays are therefore those
of the forward before, and so is what the tokens that stay give to each other: the standing part of
the attention. A forward adds the part of the tokens that change. With o = softmax(s) v and
l = logsumexp(s) of each part,

    o of both = p o_standing + (1 - p) o_changing,    p = sigmoid(l_standing - l_changing)

which is how flash attention joins blocks of keys (arXiv 2205.14135, algorithm 1). Exact: only
sums are rounded in another order. Later layers see what the changed tokens made of all others, so
that nothing of theirs stands.

Shapes: B batch, L length, S columns that change in the row with most, H width, N query heads, G
key-value heads, D head width.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from memdlm.backbones.attention import Attention
from memdlm.backbones.layer_inputs import LayerInputs, gather_positions, narrow_inputs
from memdlm.backbones.rotary import rotate
from memdlm.backbones.row_columns import RowColumns

# Tokens that stay below which keeping their part costs what it saves, on one core of a Zen 4.
FEWEST_STANDING = 384


@dataclass
class _Standing:
    """What is kept between forwards; queries and results have a spare column at the end.

    Attributes:
        query: [B, L + 1, N, D].
        key: [B, G, L, D]; of columns that change nobody looks at it.
        value: Likewise.
        hidden_keys: [B, 1, 1, L], -inf on columns that change or hold no token.
        output: What the standing keys give to every query [B, L + 1, N, D].
        log_weight: The logarithm of their summed weights [B, L + 1, N, 1] float32.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    hidden_keys: torch.Tensor
    output: torch.Tensor
    log_weight: torch.Tensor


class FirstAttention:
    """The standing part of one decode; must not be shared between decodes or threads.

    Only for forwards without gradients, of one canvas, in which no token changes outside of the
    columns that were named.
    """

    def __init__(self, changing: torch.Tensor) -> None:
        """Prepare for forwards in which the columns `changing` [B, L] bool may change."""
        self._columns = RowColumns.pack(changing.cpu()).to(changing.device)
        self._changing = changing
        self._standing: _Standing | None = None

    @staticmethod
    def pays(
        model: PreTrainedModel, changing: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> bool:
        """Return whether forwards of `model` are cheaper with it.

        That is on a CPU, whose attention kernel gives the summed weights along, in float32, where
        the join is not rounded to half precision; in a network of more than one layer, where some
        hundred tokens stay, at least as many as change, and some of them in every row.

        Args:
            model: A `DiffusionMaskedLM`.
            changing: [B, L] bool.
            attention_mask: [B, L] with 0 on columns without a token; None if all have one.
        """
        config = cast(Any, model.config)
        stays = ~changing if attention_mask is None else ~changing & attention_mask.bool()
        return (
            changing.device.type == "cpu"
            and model.dtype in (torch.float32, torch.float64)
            and config._attn_implementation == "sdpa"
            and config.num_hidden_layers > 1
            and int(stays.sum()) >= max(FEWEST_STANDING, int(changing.sum()))
            and bool(stays.any(dim=1).all())
        )

    @staticmethod
    def allows(mask: torch.Tensor | None) -> bool:
        """Return whether it serves under a layer's mask: where all queries see the same keys."""
        return mask is None or (mask.dtype == torch.bool and mask.shape[2] == 1)

    def keep(self, rows: torch.Tensor) -> None:
        """Forget all rows but `rows` [b] int64, which the coming forwards have in this order."""
        columns = self._columns
        self._columns = RowColumns(columns.positions[rows], columns.slots[rows])
        self._changing = self._changing[rows]
        if self._standing is not None:
            kept = {name: part[rows] for name, part in vars(self._standing).items()}
            self._standing = _Standing(**kept)

    def __call__(
        self, attention: Attention, norm: nn.Module, hidden: torch.Tensor, inputs: LayerInputs
    ) -> torch.Tensor:
        """Return what `attention` gives for the normed `hidden`: [B, L, H].

        Args:
            attention: The first layer's.
            norm: The layer's input norm.
            hidden: Embeddings [B, L, H].
            inputs: Of this forward; their mask is one that `allows` accepts.

        Raises:
            ValueError: With gradients, for which nothing is kept.
        """
        if torch.is_grad_enabled():
            raise ValueError("what the first layer keeps has no gradients; use torch.no_grad()")
        positions = self._columns.positions
        if self._standing is None:
            query, key, value = _heads(attention, norm(hidden), inputs)
            self._standing = self._begin(attention, query, key, value, inputs)
            index = positions[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
            key, value = key.gather(2, index), value.gather(2, index)
        else:
            changed = norm(gather_positions(hidden, positions))
            query, key, value = _heads(attention, changed, narrow_inputs(inputs, positions))
            self._renew(attention, query)
        return self._join(attention, key, value)

    def _begin(
        self,
        attention: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        inputs: LayerInputs,
    ) -> _Standing:
        hides = self._changing[:, None, None, :]
        if inputs.attention_mask is not None:
            hides = hides | ~inputs.attention_mask
        hidden_keys = torch.zeros_like(hides, dtype=query.dtype).masked_fill(hides, -torch.inf)
        output, log_weight = _attend(attention, query, key, value, hidden_keys)
        return _Standing(
            _with_spare_column(query),
            key.contiguous(),
            value.contiguous(),
            hidden_keys,
            _with_spare_column(output),
            _with_spare_column(log_weight),
        )

    def _renew(self, attention: Attention, query: torch.Tensor) -> None:
        """Let the columns that change ask the standing keys anew, with `query` [B, N, S, D]."""
        kept = self._standing
        assert kept is not None
        output, log_weight = _attend(attention, query, kept.key, kept.value, kept.hidden_keys)
        for store, part in (
            (kept.query, query),
            (kept.output, output),
            (kept.log_weight, log_weight),
        ):
            index = self._columns.slots[:, :, None, None].expand(-1, -1, *store.shape[2:])
            store.scatter_(1, index, part.transpose(1, 2))

    def _join(self, attention: Attention, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Add what the keys and values [B, G, S, D] of the columns that change give to all."""
        kept = self._standing
        assert kept is not None
        length = kept.key.shape[2]
        query = kept.query[:, :length].transpose(1, 2)
        output, log_weight = _attend(attention, query, key, value, self._hidden_fillers(key.dtype))
        share = torch.sigmoid(kept.log_weight[:, :length] - log_weight.transpose(1, 2))
        joined = torch.lerp(output.transpose(1, 2), kept.output[:, :length], share.to(output.dtype))
        return attention.project(joined)

    def _hidden_fillers(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return -inf [B, 1, 1, S] where a row has fewer columns that change; None if none has."""
        is_filler = (self._columns.slots == self._changing.shape[1])[:, None, None, :]
        if not bool(is_filler.any()):  # on a CPU; the kernel is faster without a mask
            return None
        return torch.zeros_like(is_filler, dtype=dtype).masked_fill(is_filler, -torch.inf)


def _heads(
    attention: Attention, normed: torch.Tensor, inputs: LayerInputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rotated queries [B, N, L, D], rotated keys and values [B, G, L, D]."""
    query, key, value = (part.transpose(1, 2) for part in attention.heads(normed))
    embeddings = inputs.position_embeddings
    return rotate(query, embeddings), rotate(key, embeddings), value


def _attend(
    attention: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attended heads [B, N, Q, D] and logsumexp of the scores [B, N, Q, 1] float32.

    `mask` [B, 1, 1, K], if given, is added to the scores. The operator is what
    `scaled_dot_product_attention` runs on a CPU; that function does not hand out the second result.
    """
    output, log_weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=mask, scale=attention.scaling
    )
    return output, log_weight[..., None]


def _with_spare_column(part: torch.Tensor) -> torch.Tensor:
    """Return [B, L + 1, N, D] for `part` [B, N, L, D]."""
    batch, heads, length, width = part.shape
    store = part.new_zeros((batch, length + 1, heads, width))
    store[:, :length] = part.transpose(1, 2)
    return store
