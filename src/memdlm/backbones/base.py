"""One bidirectional transformer for every family: split forward, head only where asked.

A family supplies a config and builds its layers; everything that the method needs lives here:

    embed -> layers[0:s] -> (interlude) -> layers[s:] at positions -> final norm -> head

The *interlude* is where the inner loop runs: between the last layer that no memory adapts and the
first that one does, inside the one ordinary forward that wrappers such as DDP, FSDP2 and PEFT see
(docs/decisions/0003-interlude.md). Knows nothing of masks, losses or memories.

Shapes: B batch, L length, P positions per row, H width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from memdlm.backbones.buffers import keep_float32_buffers
from memdlm.backbones.decoder_layer import DecoderLayer
from memdlm.backbones.experts import Experts
from memdlm.backbones.first_attention import FirstAttention
from memdlm.backbones.kv_cache import KeyRecorder, KVCache
from memdlm.backbones.layer_inputs import LayerInputs
from memdlm.backbones.sharded import forward_goes_on
from memdlm.backbones.token_losses import Scored, weighted_nll


@dataclass(frozen=True)
class Interlude:
    """Something to run between two layers of a forward.

    Attributes:
        before_layer: Index of the layer that comes next.
        run: Called with the hidden states [B, L, H] and the layers' inputs.
        recorder: Keeps the keys and values of the layers before; excludes a cache.
    """

    before_layer: int
    run: Callable[[torch.Tensor, LayerInputs], None]
    recorder: KeyRecorder | None = None


class DiffusionPreTrainedModel(PreTrainedModel):
    """Flags and weight initialisation common to all families."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 - transformers reads a class-level list
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """Load as transformers does; with 4-bit weights, quantise experts and spare routers.

        Raises:
            ConfigError: `quantization_config` asks for other than 4-bit weights.
        """
        if quantization_config is not None:
            from memdlm.backbones.quantization.loading import own_config

            kwargs["quantization_config"] = own_config(quantization_config)
        return super().from_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts) and module.gate_up_proj.is_floating_point():
            std = self.config.initializer_range
            nn.init.normal_(module.gate_up_proj, mean=0.0, std=std)
            nn.init.normal_(module.down_proj, mean=0.0, std=std)


class DiffusionModel(DiffusionPreTrainedModel):
    """Embeddings, layers and final norm, each callable on its own."""

    def __init__(
        self,
        config: Any,
        build_layer: Callable[[Any, int], DecoderLayer],
        norm: nn.Module,
        rotary: nn.Module,
        padding_idx: int | None,
    ) -> None:
        """Build `config.num_hidden_layers` layers with `build_layer(config, index)`."""
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx)
        self.layers = nn.ModuleList(
            [build_layer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = norm
        self.rotary_emb = rotary
        self.gradient_checkpointing = False
        self.post_init()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast, as `nn.Module` does, but keep fp32 buffers out of half precision."""
        keep_float32_buffers(self, lambda: super(DiffusionModel, self)._apply(fn, recurse))
        return self

    def embed(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LayerInputs]:
        """Return the embeddings [B, L, H] and what the layers share.

        Args:
            input_ids: [B, L] int64, unless `inputs_embeds` [B, L, H] is given.
            attention_mask: [B, L] with 0 on keys to hide (padded queries still attend to the real
                keys), or a prepared mask [B, 1, L, L]: bool (True = attend) or additive.
            position_ids: [B, L] int64; 0, 1, 2, ... when None.
            inputs_embeds: [B, L, H] in place of `input_ids`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = self._layer_mask(attention_mask, hidden)
        return hidden, LayerInputs(mask, self.rotary_emb(hidden, position_ids))

    def _layer_mask(
        self, attention_mask: torch.Tensor | None, hidden: torch.Tensor
    ) -> torch.Tensor | None:
        if attention_mask is None:
            return None
        mask = attention_mask
        if mask.dim() == 2:
            mask = mask.bool()[:, None, None, :]  # [B, 1, 1, L]
        if mask.dtype == torch.bool and self.config._attn_implementation == "eager":
            lowest = torch.finfo(hidden.dtype).min
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, lowest)
        elif mask.dtype != torch.bool:
            mask = mask.to(hidden.dtype)
        # Rows that all see the same keys stay one row: kernels that want numbers in the place of
        # truth values convert the mask in every layer, and would convert L times as much.
        return mask

    def prefix(self, input_ids: torch.Tensor, inputs: LayerInputs, stop: int) -> torch.Tensor:
        """Return the hidden states [B, L, H] of `input_ids` [B, L] before layer `stop`."""
        return self.run_layers(self.embed_tokens(input_ids), inputs, 0, stop)

    def run_layers(
        self,
        hidden: torch.Tensor,
        inputs: LayerInputs,
        start: int,
        stop: int,
        positions: torch.Tensor | None = None,
        first: FirstAttention | None = None,
    ) -> torch.Tensor:
        """Run `layers[start:stop]` on [B, L, H].

        `positions` [B, P] narrow the last layer; `first` serves layer 0, if that is not the last
        one and the mask allows it.
        """
        if first is not None and not first.allows(inputs.attention_mask):
            first = None
        for index in range(start, stop):
            is_last = index == len(self.layers) - 1
            own = first if index == 0 and not is_last else None
            hidden = self.layers[index](hidden, inputs, positions if is_last else None, own)
        return hidden

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        interlude: Interlude | None = None,
        collect: list[torch.Tensor] | None = None,
        cache: KVCache | None = None,
        first: FirstAttention | None = None,
    ) -> torch.Tensor:
        """Return the final-norm hidden states [B, L, H], or [B, P, H] at `positions`.

        `collect` receives the embeddings and each layer's output, the last one after the final
        norm; it needs `positions=None`.
        """
        hidden, inputs = self.embed(input_ids, attention_mask, position_ids, inputs_embeds)
        if cache is not None:
            inputs = replace(inputs, cache=cache)
        stops = [len(self.layers)] if interlude is None else [interlude.before_layer]
        if collect is not None:
            stops = sorted({*stops, *range(len(self.layers) + 1)})
        elif interlude is not None:
            stops.append(len(self.layers))
        early, early_end = inputs, 0
        if interlude is not None and interlude.recorder is not None:
            if cache is not None:
                raise ValueError("an interlude that records keys and values excludes a cache")
            early, early_end = replace(inputs, cache=interlude.recorder), interlude.before_layer
        start = 0
        for stop in stops:
            shared = early if stop <= early_end else inputs
            hidden = self.run_layers(hidden, shared, start, stop, positions, first)
            start = stop
            if interlude is not None and stop == interlude.before_layer:
                interlude.run(hidden, inputs)
            if collect is not None and stop < len(self.layers):
                collect.append(hidden)
        hidden = self.norm(hidden)
        if collect is not None:
            collect.append(hidden)
        return hidden


@dataclass
class ScoredOutput(MaskedLMOutput):
    """What a forward with `scored` returns: `loss`, the weighted sum, and logits only if kept.

    Attributes:
        nll: Negative log-likelihood of every scored token [N] float32, unweighted, detached.
    """

    nll: torch.Tensor | None = None


class DiffusionMaskedLM(DiffusionPreTrainedModel):
    """A `DiffusionModel` with its vocabulary head; what `AutoModelForMaskedLM` returns.

    Set `right_shift_logits` for families whose checkpoint predicts the *next* token: callers then
    still see logits aligned with the tokens they stand for. `attentions` are the values of
    `config.attention`, for families with a choice.
    """

    right_shift_logits = False
    attentions: tuple[str, ...] = ("full",)

    def __init__(self, config: Any, model: DiffusionModel) -> None:
        """Put a head of `config.vocab_size` rows on `model`."""
        super().__init__(config)
        self.model = model
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the vocabulary head."""
        return self.lm_head

    def source_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Return where the hidden states that predict `positions` [B, P] sit."""
        return (positions - 1).clamp(min=0) if self.right_shift_logits else positions

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
        scored: Scored | None = None,
        interlude: Interlude | None = None,
        cache: KVCache | None = None,
        first: FirstAttention | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> MaskedLMOutput | tuple[torch.Tensor, ...]:
        """Predict the clean token at every position, seeing the whole sequence.

        Args:
            input_ids: Noisy token ids [B, L] int64.
            attention_mask: [B, L] (0 hides a key) or a prepared [B, 1, L, L]; None hides nothing.
            position_ids: [B, L] int64; 0, 1, 2, ... when None.
            inputs_embeds: [B, L, H] in place of `input_ids`.
            labels: Clean ids [B, L], -100 where not scored: adds a mean cross-entropy `loss`.
            positions: [B, P] int64: compute logits only there (exact, and much cheaper).
            valid: [N] int64, indices into the flattened [B * P]: logits [N, V] only there.
            scored: Labels and weights of those N: the loss in place of logits, which exist for a
                few tokens at a time. Needs `valid`.
            interlude: See `Interlude`.
            cache: Keys and values of earlier forwards, opened for this one. The tokens given are
                then a part of the sequence: `position_ids` says which, `positions` counts along
                the tokens given, and the mask is [B, K] or [B, 1, L, K] over the visible slots.
            first: What the first layer keeps between the forwards of one decode; excludes a cache.
            output_hidden_states: Also return embeddings and every layer's output.
            return_dict: False for a plain tuple.
            **unknown: Arguments of other models; only None and False are tolerated.

        Returns:
            `MaskedLMOutput` with `logits` [B, L, V], [B, P, V] or [N, V]; with `scored` a
            `ScoredOutput`.

        Raises:
            TypeError: For an argument that no family knows.
            ValueError: For arguments that exclude each other.
        """
        _refuse_unknown(unknown)
        if positions is not None and (labels is not None or output_hidden_states):
            raise ValueError("positions excludes labels and output_hidden_states")
        if scored is not None and valid is None:
            raise ValueError("scored needs valid")
        if cache is not None and (position_ids is None or positions is None):
            # Neither where a part of a sequence lies nor what precedes it can be guessed.
            raise ValueError("a cache needs position_ids and positions")
        if cache is not None and first is not None:
            raise ValueError("a cache has all layers' keys and values: leave out first")
        collect: list[torch.Tensor] | None = [] if output_hidden_states else None
        sources = None if positions is None else self.source_positions(positions)
        hidden = self.model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            positions=sources,
            interlude=interlude,
            collect=collect,
            cache=cache,
            first=first,
        )
        if positions is None and self.right_shift_logits:
            hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        if valid is not None:
            hidden = hidden.flatten(0, 1).index_select(0, valid)
        if scored is not None:
            head, vocabulary = self.lm_head, self.config.vocab_size
            with forward_goes_on(self):
                total, nll, logits = weighted_nll(hidden, head, vocabulary, scored)
            result = ScoredOutput(loss=total, logits=logits, nll=nll)
            return result if return_dict is not False else result.to_tuple()
        logits = self.lm_head(hidden)
        loss = None if labels is None else _mean_loss(logits, labels)
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=tuple(collect) if collect else None
        )
        return output if return_dict is not False else output.to_tuple()


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    given = [name for name, value in arguments.items() if value is not None and value is not False]
    if given:
        raise TypeError(f"unknown arguments {sorted(given)}")


def _mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
