"""What is measured: one model, one batch, and one training step of each variant on it.

A step is draws, plan, forward and backward; the optimiser's update is the same for all variants and
left out. Shapes: B batch, L length.
"""

import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from benchmarks.speed.naive import naive_memdlm_step
from memdlm.backbones import (
    DiffusionMaskedLM,
    LLaDAConfig,
    LLaDAForMaskedLM,
    LLaDAMoEConfig,
    LLaDAMoEForMaskedLM,
)
from memdlm.diffusion import CleanBatch, ObjectiveConfig, State, corrupt, get_schedule
from memdlm.memory.config import MemoryConfig
from memdlm.memory.trajectories import Trajectory, TrajectoryRequest, build_trajectory
from memdlm.seeding import generator
from memdlm.training.outer_step import OuterStep, lay_out_step

VARIANTS = ("mdlm", "memdlm", "naive")
FAMILIES = ("dense", "moe")
SIZES = ("small", "real")
TUNINGS = ("lora", "full")

_SEED_INDICES = (0, 0, 0, 0)
_SMALL_VOCABULARY = 16384


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: a model, how it is trained, and the batch it sees."""

    family: str = field(default="moe", metadata={"help": "dense (LLaDA) or moe (LLaDA-MoE)."})
    size: str = field(
        default="small", metadata={"help": "small, or real: LLaDA-8B and LLaDA-MoE-7B-A1B."}
    )
    tuning: str = field(
        default="lora",
        metadata={"help": "lora: rank 32 on all linear layers but experts and head; or full."},
    )
    length: int = field(default=1024, metadata={"help": "Tokens per sequence."})
    batch_size: int = field(default=1, metadata={"help": "Sequences."})
    response: float = field(default=0.1, metadata={"help": "Share of tokens that is response."})
    mask_ratio: float = field(
        default=0.5, metadata={"help": "Time t of the anchor: expected masked share of it."}
    )
    sharing: str = field(default="sequence", metadata={"help": "One memory per sequence or batch."})
    prefix: str = field(
        default="exact",
        metadata={"help": "memory.pre_anchor_prefix: exact, or shared_prompt (an approximation)."},
    )


def model_config(family: str, size: str) -> LLaDAConfig | LLaDAMoEConfig:
    """Return real shapes, or small ones of about the same ratio of vocabulary to width."""
    if family == "moe":
        if size == "real":
            return LLaDAMoEConfig()
        return LLaDAMoEConfig(
            vocab_size=_SMALL_VOCABULARY,
            hidden_size=256,
            expert_intermediate_size=128,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_experts=8,
            num_experts_per_tok=2,
            mask_token_id=_SMALL_VOCABULARY - 1,
            pad_token_id=_SMALL_VOCABULARY - 2,
            eos_token_id=_SMALL_VOCABULARY - 2,
        )
    if size == "real":
        return LLaDAConfig(mlp_hidden_size=12288)
    return LLaDAConfig(
        vocab_size=_SMALL_VOCABULARY,
        d_model=256,
        n_layers=8,
        n_heads=4,
        mlp_hidden_size=768,
        mask_token_id=_SMALL_VOCABULARY - 1,
        pad_token_id=_SMALL_VOCABULARY - 2,
        eos_token_id=_SMALL_VOCABULARY - 2,
    )


def build_model(case: Case, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the model of `case` with random weights, in train mode."""
    config = model_config(case.family, case.size)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: nn.Module
            if isinstance(config, LLaDAMoEConfig):
                model = LLaDAMoEForMaskedLM(config)
            else:
                model = LLaDAForMaskedLM(config)
    finally:
        torch.set_default_dtype(default)
    if case.tuning == "lora":
        model = _with_lora(model)
    return model.train()


def _with_lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=32, lora_alpha=64, lora_dropout=0.05, target_modules="all-linear")
    with warnings.catch_warnings():
        # peft asks transformers under a name that the latter has deprecated.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return get_peft_model(model, config)


@dataclass(frozen=True)
class Draw:
    """The random part of a step: the same for all variants, the trajectory None without memory."""

    anchor: State
    t: torch.Tensor
    trajectory: Trajectory | None


class Workload:
    """A model with one batch, on which each variant can run its step."""

    def __init__(
        self, model: nn.Module, batch: CleanBatch, case: Case, memory: MemoryConfig | None = None
    ) -> None:
        """Prepare `model` (from `build_model`, or any backbone) for steps on `batch`."""
        self.model, self.batch, self.case = model, batch, case
        self.objective = ObjectiveConfig()
        self.memory = memory or MemoryConfig(sharing=case.sharing, pre_anchor_prefix=case.prefix)
        self.backbone = next(m for m in model.modules() if isinstance(m, DiffusionMaskedLM))
        self.outer_steps = {
            "mdlm": OuterStep(model, replace(self.memory, enabled=False)),
            "memdlm": OuterStep(model, self.memory),
        }

    @classmethod
    def build(cls, case: Case, device: torch.device, dtype: torch.dtype) -> "Workload":
        """Build the model and a batch of random tokens whose last part is the response."""
        model = build_model(case, device, dtype)
        draws = generator(0, "speed_batch")
        clean = torch.randint(0, 10000, (case.batch_size, case.length), generator=draws)
        maskable = torch.zeros_like(clean, dtype=torch.bool)
        maskable[:, case.length - max(1, round(case.response * case.length)) :] = True
        return cls(model, CleanBatch(clean, maskable, torch.zeros_like(maskable)), case)

    def draw(self, *, has_memory: bool) -> Draw:
        """Draw the step as `plan_step` does, but at the case's mask ratio instead of a random t."""
        seed, *indices = _SEED_INDICES
        mask_token_id = self.backbone.config.mask_token_id
        t = torch.full((self.batch.clean.shape[0],), self.case.mask_ratio)
        schedule = get_schedule(self.objective.schedule)
        draws = generator(seed, "outer_mask", *indices)
        anchor = corrupt(self.batch, t, schedule, mask_token_id, draws)
        if not has_memory:
            return Draw(anchor, t, None)
        draws = generator(seed, "trajectory", *indices)
        request = TrajectoryRequest(self.batch, anchor, t, self.memory, mask_token_id, draws)
        return Draw(anchor, t, build_trajectory(request))

    def run(self, variant: str) -> torch.Tensor:
        """Run one step of `variant`; return the outer loss, leave gradients on the parameters."""
        self.model.zero_grad(set_to_none=True)
        drawn = self.draw(has_memory=variant != "mdlm")
        if variant == "naive":
            assert drawn.trajectory is not None
            return naive_memdlm_step(
                self.model,
                self.batch,
                drawn.anchor,
                drawn.t,
                drawn.trajectory,
                self.objective,
                replace(self.memory, pre_anchor_prefix="exact"),
                _SEED_INDICES,
            ).loss
        step = self.outer_steps[variant]
        plan = lay_out_step(
            self.batch,
            drawn.anchor,
            drawn.t,
            drawn.trajectory,
            self.objective,
            step.memory,
            _SEED_INDICES,
        ).to(self.backbone.lm_head.weight.device)
        try:
            result = step.forward(self.model, plan)
            result.loss.backward()
        finally:
            step.release()
        return result.loss.detach()
