"""Replay of `inner/<backbone>/<case>`: one bi-level training step of the published code.

The golden states are handed to the library as a trajectory; everything else (supervision, weights,
losses, gradients, clipping, SGD, the outer loss and its gradients) is the library's.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from memdlm.backbones import llada, llada2
from memdlm.backbones.loading import load_model
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.diffusion.states import CleanBatch, State
from memdlm.memory.config import MemoryConfig
from memdlm.memory.trajectories import Trajectory, Transition
from memdlm.memory.trajectories.anchor_consistent import mask_counts
from memdlm.memory.trajectories.inconsistent import planned_ratios
from memdlm.memory.trajectories.trajectory import realised_ratio
from memdlm.training.outer_step import OuterStep, inner_view, lay_out_step

TRAJECTORIES = {
    "pmc": "anchor_consistent",
    "pre_only": "pre_anchor_only",
    "no_progressive": "anchor_to_target",
    "progressive_memory": "inconsistent",
}
LOSSES = {"ce": "cross_entropy", "distill": "kl", "distill_reverse": "reverse_kl"}
_SUPERVISION = {"student_masked": "masked", "newly_revealed": "newly_revealed"}
_PADDING = {"none": "supervised", "both": "excluded", "inner": "excluded_inner"}
_WEIGHTING = {"scheduler": "schedule", "uniform": "uniform"}
# Official module names that are not the native ones; the others need no renaming.
_NATIVE = {
    r"^model\.transformer\.blocks\.": "layers.",
    r"^model\.": "",
    r"^(layers\.\d+)\.ff_proj$": r"\1.mlp.gate_proj",
    r"^(layers\.\d+)\.up_proj$": r"\1.mlp.up_proj",
    r"^(layers\.\d+)\.ff_out$": r"\1.mlp.down_proj",
}


def replay(folder: Path) -> dict[str, float]:
    """Return the largest deviation of every kind in one case."""
    case = Case.read(folder)
    memory, objective = case.configs()
    model = load_model(str(folder.parent / "model"))
    model.right_shift_logits = case.settings["right_shift_logits"]
    model.config.mask_token_id = case.meta["mask_token_id"]
    trajectory, worst = case.trajectory(memory, objective)
    plan = lay_out_step(
        case.batch(), case.anchor(), case.t, trajectory, objective, memory, (0, 0, 0, 0)
    )
    # The published code never hides padding from attention.
    plan = replace(plan, attention_mask=None)

    step = OuterStep(model, memory)
    gradients: list[dict[str, torch.Tensor]] = []
    zero = step.initial_fast_weights(plan).tensors
    result = step.forward(
        model,
        plan,
        initial=case.fast_weights("init", {name: torch.zeros_like(x) for name, x in zero.items()}),
        observe=lambda index, grads: gradients.append(dict(grads)),
    )
    assert result.inner is not None and result.fast_weights is not None
    worst["loss.inner"] = relative(result.inner.losses.sum(dim=1), case.inner_losses())
    worst["count"] += sum(
        int(update.num_clipped.sum()) != expected
        for update, expected in zip(result.inner.updates, case.clipped(), strict=True)
    )
    worst["gradient.inner"] = case.compare_gradients(gradients)
    worst["fast_weights"] = case.compare("final", result.fast_weights.tensors)
    worst["loss.outer"] = relative(result.loss.detach(), case.tensors["outer.loss"])
    result.loss.backward()
    with torch.no_grad():
        logits = model(plan.noisy).logits  # still with the memory attached
    step.release()
    worst["logits"] = (logits - case.tensors["outer.logits"]).abs().max().item()
    worst["gradient.outer"] = case.compare_outer_gradients(model)
    return worst


@dataclass(frozen=True)
class Case:
    """One golden training step."""

    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Case":
        """Read the case stored in `folder`."""
        meta = json.loads((folder / "meta.json").read_text())
        return cls(meta, load_file(folder / "tensors.safetensors"))

    @property
    def settings(self) -> dict[str, Any]:
        """The published code's own settings."""
        return self.meta["config"]

    @property
    def t(self) -> torch.Tensor:
        """Sampled time of the outer loss [B]."""
        return self.tensors["batch.mem_t"]

    def configs(self) -> tuple[MemoryConfig, ObjectiveConfig]:
        """Translate the published settings into ours."""
        old = self.settings
        loss = LOSSES.get(old["mem_inner_loss_type"]) or f"hidden_{old['mem_distill_hidden_type']}"
        names = old["mem_inner_target_modules"].replace("ff_proj", "gate_proj")
        modules = tuple(names.replace("ff_out", "down_proj").split(","))
        if self.meta["backbone"] == "llada" and "ff_proj" not in old["mem_inner_target_modules"]:
            modules = ("up_proj",)  # the only default target name that dense LLaDA has
        normaliser = old["loss_norm_type"]
        memory = MemoryConfig(
            kind=old["mem_inner_adapter_type"],
            rank=old["mem_inner_rank"],
            alpha=old["mem_inner_alpha"],
            scope="modules",
            modules=modules,
            layer_fraction=old["mem_inner_layer_fraction"],
            sharing="batch",
            num_steps=old["mem_num_inner_steps"],
            num_epochs=old["mem_num_inner_epochs"],
            learning_rate=old["mem_inner_lr"],
            clip_norm=old["mem_inner_grad_clip"] or None,
            trajectory=TRAJECTORIES[old["mem_masking_strategy"]],
            pre_anchor_scale=old["mem_progressive_consistent_start_scale"],
            supervision=_SUPERVISION[old["mem_inner_loss_mask_mode"]],
            loss=loss,
            temperature=old["mem_distill_temperature"],
            # For dense LLaDA the published code compares both sides after the norm.
            hidden_comparison="corrected" if self.meta["backbone"] == "llada" else "reference",
            weighting=_WEIGHTING[old["loss_weight_type"]],
            normaliser="reference_sequence" if normaliser == "sequence" else normaliser,
            prompt_mask_ratio=old["mem_prompt_mask_ratio"],
        )
        objective = ObjectiveConfig(
            weighting=_WEIGHTING[old["loss_weight_type"]],
            normaliser=normaliser,
            padding=_PADDING[old["mem_pad_unmask_mode"]],
            time_epsilon=old["time_epsilon"],
        )
        return memory, objective

    def batch(self) -> CleanBatch:
        """Return the clean batch as the outer loop sees it."""
        ids, labels = self.tensors["batch.input_ids"], self.tensors["batch.labels"]
        batch = CleanBatch.from_labels(ids, labels, labels == self.meta["pad_token_id"])
        return batch.without_padding() if self.settings["mem_pad_unmask_mode"] == "both" else batch

    def anchor(self) -> State:
        """Return the outer state; one object per case, since identity matters."""
        if "_anchor" not in self.__dict__:
            state = State(
                self.tensors["batch.mem_noised_input_ids"], self.tensors["batch.mem_masked_mask"]
            )
            self.__dict__["_anchor"] = state
        return self.__dict__["_anchor"]

    def trajectory(
        self, memory: MemoryConfig, objective: ObjectiveConfig
    ) -> tuple[Trajectory, dict[str, float]]:
        """Build the trajectory of the golden states; compare counts, supervision and times."""
        batch, anchor = inner_view(
            self.batch(), self.anchor(), objective, self.meta["mask_token_id"]
        )
        steps = self.meta["num_steps_run"] // memory.num_epochs
        states = [
            State(self.tensors[f"step{i}.input_ids"], self.tensors[f"step{i}.masked"])
            for i in range(steps)
        ]
        if torch.equal(states[-1].masked, anchor.masked) and (
            memory.trajectory == "anchor_to_target" or steps > 1
        ):
            states[-1] = anchor
        final = anchor if memory.trajectory == "pre_anchor_only" else batch.clean_state()
        targets = [*states[1:], final]
        times = self._times(memory, states, batch)
        transitions = tuple(
            Transition(*parts) for parts in zip(states, targets, times, strict=True)
        )
        wrong, drift = 0, 0.0
        for i in range(self.meta["num_steps_run"]):
            transition = transitions[i % steps]
            supervised = transition.supervised(memory.supervision)
            wrong += int((supervised != self.tensors[f"step{i}.loss_mask"]).sum())
            wrong += int((transition.source.ids != self.tensors[f"step{i}.input_ids"]).sum())
            drift = max(drift, (transition.t - self.tensors[f"step{i}.t"]).abs().max().item())
            for part, key in (("ids", "teacher_input_ids"), ("masked", "teacher_masked")):
                golden = self.tensors.get(f"step{i}.{key}")
                if golden is not None:
                    wrong += int((getattr(transition.target, part) != golden).sum())
        wrong += self._wrong_counts(memory, states, batch, anchor)
        return Trajectory(transitions, anchor), {"count": float(wrong), "coefficient": drift}

    def _times(
        self, memory: MemoryConfig, states: list[State], batch: CleanBatch
    ) -> list[torch.Tensor]:
        if memory.trajectory == "anchor_to_target":
            return [self.t]
        if memory.trajectory == "inconsistent":
            ratios = planned_ratios(
                memory.inconsistent_start_ratio, memory.prompt_mask_ratio, memory.num_steps
            )
            return [ratio.expand_as(self.t) for ratio in ratios]
        return [realised_ratio(state.masked, batch.maskable) for state in states]

    def _wrong_counts(
        self, memory: MemoryConfig, states: list[State], batch: CleanBatch, anchor: State
    ) -> int:
        """Compare the golden numbers of masked tokens with those our builder would choose."""
        total = batch.maskable.sum(dim=1)
        golden = torch.stack([state.masked.sum(dim=1) for state in states], dim=1)
        if memory.trajectory in ("anchor_consistent", "pre_anchor_only"):
            ours = mask_counts(
                anchor.masked.sum(dim=1), total, golden.shape[1], memory.pre_anchor_scale
            )
            return int((ours != golden).sum())
        if memory.trajectory == "inconsistent":
            ratios = planned_ratios(
                memory.inconsistent_start_ratio, memory.prompt_mask_ratio, memory.num_steps
            )
            ours = (total[:, None] * ratios[1:]).long()
            return int((ours != golden[:, 1:]).sum())
        return 0

    def fast_weights(self, prefix: str, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the golden tensors `prefix.<module>.<factor>` under our names and shapes."""
        values = {name: tensor.clone() for name, tensor in like.items()}
        for key, tensor in self.tensors.items():
            if key.startswith(f"{prefix}."):
                name, index = _native(key.removeprefix(f"{prefix}."))
                values[name][index] = tensor
        return values

    def inner_losses(self) -> torch.Tensor:
        """Return the loss of every step [steps]."""
        return torch.tensor(self.meta["inner_losses"])

    def clipped(self) -> list[int]:
        """Return the number of clipped matrices of every step."""
        return self.meta["num_params_clipped_per_step"]

    def compare(self, prefix: str, ours: dict[str, torch.Tensor]) -> float:
        """Return the largest |ours - golden| / max(|golden|, 1e-6) over `prefix.*` tensors."""
        worst = 0.0
        for key, golden in self.tensors.items():
            if key.startswith(f"{prefix}."):
                name, index = _native(key.removeprefix(f"{prefix}."))
                worst = max(worst, _of_norm(ours[name][index], golden))
        return worst

    def compare_gradients(self, gradients: list[dict[str, torch.Tensor]]) -> float:
        """Compare the gradients of all steps before clipping."""
        return max(
            (self.compare(f"step{i}.grad", grads) for i, grads in enumerate(gradients)), default=0.0
        )

    def compare_outer_gradients(self, model: torch.nn.Module) -> float:
        """Compare the gradients of the base weights that the case stores."""
        worst = 0.0
        for key, golden in self.tensors.items():
            if key.startswith("outer.grad."):
                ours = _outer_gradient(model, key.removeprefix("outer.grad."))
                worst = max(worst, _of_norm(ours, golden))
        return worst


def _native(key: str) -> tuple[str, tuple[int, ...]]:
    """Return our tensor name and index of an official `<module>.<factor>`; row 0 is the memory."""
    module, factor = key.rsplit(".", 1)
    for pattern, replacement in _NATIVE.items():
        module = re.sub(pattern, replacement, module)
    match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", module)
    if match:
        return f"{match[1]}.{match[3]}.{factor}", (0, int(match[2]))
    return f"{module}.{factor}", (0,)


def _outer_gradient(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Return the gradient of the base weight with this official name."""
    is_dense_llada = name.startswith("model.transformer.")
    names = llada.OFFICIAL_NAMES if is_dense_llada else llada2.OFFICIAL_NAMES
    for pattern, replacement in names.items():
        name = re.sub(pattern, replacement, name)
    match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
    if match is None:
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        return gradient
    fused = "down_proj" if match[3] == "down_proj" else "gate_up_proj"
    gradient = model.get_parameter(f"{match[1]}.{fused}").grad
    assert gradient is not None, name
    expert = gradient[int(match[2])]
    if fused == "down_proj":
        return expert
    return expert.chunk(2)[match[3] == "up_proj"]


def _of_norm(ours: torch.Tensor, golden: torch.Tensor) -> float:
    # Tensors of (nearly) zero norm are compared absolutely.
    return ((ours - golden).norm() / golden.norm().clamp(min=1e-2)).item()


def relative(ours: torch.Tensor, golden: torch.Tensor) -> float:
    return ((ours - golden).abs() / golden.abs().clamp(min=1e-6)).max().item()
