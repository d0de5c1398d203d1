"""A model in which chosen rows of the attention cannot look at the tokens of a needle.

What is cut, in every layer, head and forward (K the needle's columns, all of them in the prompt):

    answer   no row that predicts the answer looks at K: the answer's slots, those behind the
             prompt that are decoded with them, and in families that predict a token from the
             position before it the prompt's last row. The other rows of the prompt still read the
             needle, and what they make of it reaches the answer through their own keys and values.
    all      no row outside of K looks at K. Nothing that depends on the needle's tokens then
             reaches any row outside of it but their number, which places the others.

The needle's own rows look at everything in both. Attention is the only way between positions:
norms, feed-forward layers, routers and heads work token by token. A memory is no position, so what
it has learnt from the needle stays. Shapes: B rows of a forward, Q tokens, K visible columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memdlm.backbones.batch_rows import present_rows
from memdlm.backbones.kv_cache import KVCache
from memdlm.backbones.wrapping import backbone_of
from memdlm.errors import ConfigError, DataError
from memdlm.sampling.block_causal import block_causal_mask

SCOPES = ("answer", "all")


class BlockedAttention(nn.Module):
    """Wraps a backbone for one batch; called by decoders as the backbone itself is.

    Takes part through the attention mask that every family accepts, so the wrapped model is left
    as it is: whole forwards, exact and approximate caches, and attached memories all work.
    """

    def __init__(self, model: nn.Module, needles: Sequence[Tensor], scope: str) -> None:
        """Block the attention of `model`.

        Args:
            model: A backbone, possibly wrapped; its weights are shared.
            needles: Per row of the batch, which tokens of its prompt are the needle [L_i] bool. The
                answer is what follows the prompt.
            scope: `answer` or `all`.

        Raises:
            ConfigError: `scope` is unknown, or the model is no backbone of ours.
            DataError: A needle ends its prompt, and the family predicts the answer's first token
                from there.
        """
        super().__init__()
        backbone = backbone_of(model)
        if backbone is None:
            raise ConfigError(f"{type(model).__name__} holds no memdlm backbone: load one")
        if scope not in SCOPES:
            raise ConfigError(f"scope: {scope!r} is not one of {', '.join(SCOPES)}")
        lead = int(backbone.right_shift_logits)
        for row, needle in enumerate(needles):
            if lead and bool(needle[-1]):
                raise DataError(
                    f"row {row}: the needle is the end of the prompt, from which "
                    f"{type(backbone).__name__} predicts the answer's first token: put something "
                    "behind it, such as the question"
                )
        self.model = model
        self.scope = scope
        device = next(model.parameters()).device
        self._needle = nn.utils.rnn.pad_sequence(list(needles), batch_first=True).to(device)
        starts = [len(needle) - lead for needle in needles]
        self._answer_start = torch.tensor(starts, device=device)
        # The model adds its blocks itself to masks that are not prepared, as ours will be.
        own: Any = backbone.config
        is_causal = getattr(own, "attention", "full") == "block_causal"
        self._block_length: int | None = own.block_length if is_causal else None

    @property
    def config(self) -> Any:
        """The wrapped model's config."""
        return self.model.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        **arguments: Any,
    ) -> Any:
        """Call the wrapped model with the attention cut; arguments as `DiffusionMaskedLM.forward`.

        Raises:
            ValueError: The forward has other rows than the needles, or than it was said to have.
        """
        present = present_rows()
        needle = self._needle if present is None else self._needle[present]
        if len(input_ids) != len(needle):
            raise ValueError(f"{len(input_ids)} rows for {len(needle)} needles")
        columns = position_ids
        if columns is None:
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        columns = columns.expand(len(input_ids), -1)
        mask = self._visible(attention_mask, columns, cache)
        answer_start = self._answer_start if present is None else self._answer_start[present]
        cut_rows, cut_keys = self._cut(columns, mask.shape[-1], needle, answer_start)
        mask = mask & ~(cut_rows[:, None, :, None] & cut_keys[:, None, None, :])
        return self.model(
            input_ids, attention_mask=mask, position_ids=position_ids, cache=cache, **arguments
        )

    def _visible(
        self, attention_mask: Tensor | None, columns: Tensor, cache: KVCache | None
    ) -> Tensor:
        """Return what the model would attend to, bool [B or 1, 1, Q or 1, K]."""
        num_keys = columns.shape[1] if cache is None else cache.num_visible
        if attention_mask is not None and attention_mask.dim() == 4:
            if attention_mask.dtype != torch.bool:
                raise ValueError("an additive mask cannot be cut; give a boolean one")
            return attention_mask
        visible = torch.ones((1, 1, 1, num_keys), dtype=torch.bool, device=columns.device)
        if self._block_length is not None and cache is None:
            visible = block_causal_mask(columns, num_keys, self._block_length)
        if attention_mask is not None:
            visible = visible & attention_mask.bool()[:, None, None, :]
        return visible

    def _cut(
        self, columns: Tensor, num_keys: int, needle: Tensor, answer_start: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the rows that must not look [B, Q], and the keys that they must not see [B, K]."""
        width = needle.shape[1]
        keys = F.pad(needle, (0, max(num_keys - width, 0)))[:, :num_keys]
        if self.scope == "answer":
            return columns >= answer_start[:, None], keys
        own = needle.gather(1, columns.clamp(max=width - 1)) & (columns < width)
        return ~own, keys
