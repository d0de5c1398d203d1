"""LoRA on a stack of routed experts, as a PEFT layer: y = W_e x + scale * B_e A_e x for expert e.

Every expert and projection has factors A and B of its own, as if each were a linear layer, stacked
over the experts: A is [E, r, in], B [E, out, r]. Two grouped products apply them to the pairs that
`Experts` has sorted, so W_e + B_e A_e is never formed. Importing this file imports PEFT, which
takes seconds: import it inside functions.
"""

import math
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from memdlm.backbones.experts import Experts, grouped_linear
from memdlm.errors import ConfigError, UsageError

INITIALISATIONS = (True, False, "gaussian")


class ExpertLora(nn.Module, LoraLayer):
    """Wraps `Experts`; PEFT puts it in place (`memdlm.backbones.adapters.model`).

    Parameters are named `lora_A.<adapter>.<projection>` and `lora_B.<adapter>.<projection>`. Which
    projections have factors comes from the config's `expert_projections`, by the stack's path.
    """

    def __init__(
        self,
        base_layer: Experts,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: float,
        target_name: str,
        **kwargs: Any,
    ) -> None:
        """Put the first adapter on `base_layer`; arguments as PEFT gives them."""
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config, target_name=target_name)

    @property
    def experts(self) -> Experts:
        """The wrapped stack."""
        return cast(Experts, self.get_base_layer())

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
        return None, None  # they differ between projections

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        weight = cast(Experts, base_layer).down_proj
        return weight.device, weight.dtype if weight.is_floating_point() else None

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: LoraConfig,
        **kwargs: Any,
    ) -> None:
        """Add factors for one more adapter; called by PEFT, with the stack's `target_name`."""
        projections = cast(Any, config).expert_projections[kwargs["target_name"]]
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, False
        self.lora_bias[adapter_name] = False
        dropout = config.lora_dropout
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        # As PEFT does, drawn on the CPU whatever the device; a model without data needs no draw.
        device, _ = self._get_base_layer_device_and_dtype(self.experts)
        place = device if device.type == "meta" else None
        shapes = {name: self.experts.projection_shape(name) for name in projections}
        count = self.experts.num_experts
        first = {n: torch.empty(count, r, shape[1], device=place) for n, shape in shapes.items()}
        second = {n: torch.empty(count, shape[0], r, device=place) for n, shape in shapes.items()}
        self.lora_A[adapter_name] = nn.ParameterDict(first)
        self.lora_B[adapter_name] = nn.ParameterDict(second)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """Draw every matrix as PEFT draws that of a linear layer: B is zero unless told False."""
        for tensor in self.lora_A[adapter_name].parameters():
            if init_lora_weights == "gaussian":
                tensor.normal_(std=1 / self.r[adapter_name])
            else:
                _uniform(tensor)
        for tensor in self.lora_B[adapter_name].parameters():
            if init_lora_weights is False:
                _uniform(tensor)
            else:
                tensor.zero_()

    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, **unknown: Any
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts [T, H]; arguments as for `Experts`.

        Raises:
            UsageError: For PEFT's per-row arguments, such as `adapter_names`.
        """
        if unknown:
            raise UsageError(
                f"{', '.join(unknown)}: routed experts cannot mix adapters in a batch; set one "
                "with set_adapter"
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.experts(hidden, chosen, weights)
        active = [name for name in self.active_adapters if name in self.lora_A]
        deltas = {
            projection: _LoraDelta(
                self,
                projection,
                [name for name in active if projection in self._factors("A", name)],
            )
            for projection in Experts.projections
            if any(projection in self._factors("A", name) for name in active)
        }
        return self.experts(hidden, chosen, weights, adapter=deltas)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters to the base weights.

        Args:
            safe_merge: Check for inf and nan before anything is changed.
            adapter_names: Other adapters than the active ones.

        Raises:
            ConfigError: The base weights are quantised.
            ValueError: A merged weight would not be finite, and `safe_merge` is set.
        """
        for name in check_adapters_to_merge(cast(Any, self), adapter_names):
            if name in self.lora_A:
                if safe_merge:
                    self._add_deltas(name, 1.0, only_check=True)
                self._add_deltas(name, 1.0)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged adapters out of the base weights again."""
        while self.merged_adapters:
            self._add_deltas(self.merged_adapters.pop(), -1.0)

    @torch.no_grad()
    def _add_deltas(self, adapter_name: str, sign: float, only_check: bool = False) -> None:
        scale = sign * self.scaling[adapter_name]
        for projection, first in self._factors("A", adapter_name).items():
            base = self._base_weights(projection)
            second = self._factors("B", adapter_name)[projection]
            dtype = torch.promote_types(first.dtype, torch.float32)
            for expert in range(len(base)):  # one at a time: a whole stack can be gibibytes
                delta = scale * (second[expert].to(dtype) @ first[expert].to(dtype))
                if not only_check:
                    base[expert] += delta.to(base.device)
                elif not torch.isfinite(base[expert] + delta.to(base.device)).all():
                    raise ValueError(
                        f"the weights merged with the adapter {adapter_name} are not finite"
                    )

    def _base_weights(self, projection: str) -> torch.Tensor:
        """Return a view of the stacked base weights of one projection [E, out, in]."""
        experts = self.experts
        stack = experts.down_proj if projection == "down_proj" else experts.gate_up_proj
        if not stack.is_floating_point():
            raise ConfigError(
                "the experts are quantised, and merging would round the adapter away; load the "
                "model without quantization and merge into that"
            )
        if projection == "down_proj":
            return stack
        half = experts.intermediate_size
        return stack[:, :half] if projection == "gate_proj" else stack[:, half:]

    def _factors(self, factor: str, adapter_name: str) -> nn.ParameterDict:
        factors = self.lora_A if factor == "A" else self.lora_B
        return cast(nn.ParameterDict, factors[adapter_name])

    def __repr__(self) -> str:
        """Show it the way PEFT shows its own layers."""
        return f"lora.{super().__repr__()}"


class _LoraDelta:
    """The active adapters of one projection; see `memdlm.backbones.experts.ExpertDelta`."""

    num_rows = 1

    def __init__(self, layer: ExpertLora, projection: str, adapters: list[str]) -> None:
        self.layer, self.projection, self.adapters = layer, projection, adapters

    def __call__(self, inputs: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor | None = None
        for name in self.adapters:
            # float32 factors meet half-precision states in the states' type, where the grouped
            # kernel is fast; PEFT's linear layers cast the states up instead.
            first = self.layer._factors("A", name)[self.projection].to(inputs.dtype)
            second = self.layer._factors("B", name)[self.projection].to(inputs.dtype)
            low = grouped_linear(self.layer.lora_dropout[name](inputs), first, offsets)  # [S, r]
            delta = self.layer.scaling[name] * grouped_linear(low, second, offsets)
            total = delta if total is None else total + delta
        assert total is not None
        return total


def _uniform(tensor: torch.Tensor) -> None:
    """Draw as `nn.Linear` does: kaiming_uniform_(a=sqrt(5)), which is U(+-1/sqrt(in))."""
    bound = 1 / math.sqrt(tensor.shape[-1])
    tensor.uniform_(-bound, bound)
