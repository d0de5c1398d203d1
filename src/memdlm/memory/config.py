"""Every setting of the parametric memory, once. Defaults are the paper's hyperparameters."""

import math
from dataclasses import dataclass, field

from memdlm.diffusion.objective import NORMALISERS, WEIGHTINGS
from memdlm.errors import ConfigError

KINDS = ("lora", "full")
SCOPES = ("ffn", "ffn_attention", "modules")
SHARINGS = ("sequence", "batch", "global_batch")
CLIP_SCOPES = ("local", "global")
TRAJECTORY_NAMES = ("anchor_consistent", "pre_anchor_only", "anchor_to_target", "inconsistent")
SUPERVISIONS = ("masked", "newly_revealed")
LOSS_NAMES = ("cross_entropy", "kl", "reverse_kl", "hidden_mse", "hidden_cosine")
HIDDEN_COMPARISONS = ("corrected", "reference")
PRE_ANCHOR_PREFIXES = ("exact", "shared_prompt")

_CHOICES = {
    "kind": KINDS,
    "scope": SCOPES,
    "sharing": SHARINGS,
    "clip_scope": CLIP_SCOPES,
    "trajectory": TRAJECTORY_NAMES,
    "supervision": SUPERVISIONS,
    "loss": LOSS_NAMES,
    "hidden_comparison": HIDDEN_COMPARISONS,
    "pre_anchor_prefix": PRE_ANCHOR_PREFIXES,
    "weighting": WEIGHTINGS,
    "prompt_weighting": WEIGHTINGS,
    "normaliser": NORMALISERS,
}


@dataclass(frozen=True)
class MemoryConfig:
    """Fast weights, their inner loop and the trajectory it follows (MemDLM Eq. 5-9)."""

    enabled: bool = field(
        default=True,
        metadata={"help": "Off is Standard MDLM, bit for bit: the baseline of every comparison."},
    )
    kind: str = field(
        default="lora", metadata={"help": "Fast weights: lora (paper) or full-rank deltas (full)."}
    )
    rank: int = field(default=32, metadata={"help": "Rank of the fast LoRA (paper: 32)."})
    alpha: float = field(
        default=64.0, metadata={"help": "Fast LoRA scale is alpha / rank (paper: 64)."}
    )
    scope: str = field(
        default="ffn",
        metadata={
            "help": "What is adapted in the last layers: ffn (paper; every routed and shared "
            "expert included), ffn_attention, or the named modules."
        },
    )
    modules: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "With scope: modules, the linear layers to adapt, by last name or full path, "
            "e.g. [up_proj, down_proj]; inside experts the same names count."
        },
    )
    layer_fraction: float = field(
        default=0.1, metadata={"help": "Adapt this last fraction of the layers (paper: 0.1)."}
    )
    sharing: str = field(
        default="sequence",
        metadata={
            "help": "One memory per sequence, as the paper's abstract says; one per batch, each "
            "process its own, as the published code trains; or one for the batches of all "
            "processes (global_batch), whose inner gradients are then summed over them."
        },
    )
    num_steps: int = field(
        default=2, metadata={"help": "Inner steps K along the trajectory (paper: 2)."}
    )
    num_epochs: int = field(
        default=1, metadata={"help": "Passes over the trajectory per memory (paper: 1)."}
    )
    learning_rate: float = field(
        default=0.1, metadata={"help": "Learning rate of the inner SGD (paper: 0.1)."}
    )
    clip_norm: float | None = field(
        default=1.0,
        metadata={"help": "Largest gradient norm before an inner step (paper: 1.0); null is off."},
    )
    clip_scope: str = field(
        default="local",
        metadata={"help": "Clip each fast tensor on its own (local, paper) or all jointly."},
    )
    trajectory: str = field(
        default="anchor_consistent",
        metadata={
            "help": "Which states the inner loop visits: anchor_consistent (paper), "
            "pre_anchor_only, anchor_to_target or inconsistent."
        },
    )
    pre_anchor_scale: float = field(
        default=1.5,
        metadata={"help": "The pre-anchor masks min(1, s * ratio) of the response (paper: 1.5)."},
    )
    inconsistent_start_ratio: float = field(
        default=0.8,
        metadata={"help": "Mask ratio at which an inconsistent trajectory starts (paper: 0.8)."},
    )
    pre_anchor_prefix: str = field(
        default="exact",
        metadata={
            "help": "Layers below the adapted ones, for every visited state but the anchor, in "
            "training: exact, or shared_prompt, an approximation that runs the response only, "
            "beside the prompt's keys and values of the anchor. Not used where a memory is written "
            "from a prompt."
        },
    )
    supervision: str = field(
        default="masked",
        metadata={
            "help": "Score all masked tokens (paper's default, clean target) or only those "
            "newly_revealed in the next state (Eq. 7, anchor-token only)."
        },
    )
    loss: str = field(
        default="cross_entropy",
        metadata={"help": "Inner loss: cross_entropy, kl, reverse_kl, hidden_mse, hidden_cosine."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Softmax temperature of the kl and reverse_kl losses."}
    )
    hidden_comparison: str = field(
        default="corrected",
        metadata={
            "help": "Hidden losses compare both states after the final norm (corrected), or a "
            "normed teacher with an un-normed student as the published code does (reference)."
        },
    )
    weighting: str = field(
        default="schedule",
        metadata={"help": "Inner loss weight: omega(t) of the visited state, or uniform."},
    )
    prompt_weighting: str = field(
        default="uniform",
        metadata={"help": "The same when a memory is written from a prompt (paper: uniform)."},
    )
    normaliser: str = field(
        default="token",
        metadata={
            "help": "Inner loss divisor: supervised tokens (token), those of the row then rows "
            "(sequence), rows (batch), or the published quirk reference_sequence."
        },
    )
    prompt_mask_ratio: float = field(
        default=0.2,
        metadata={
            "help": "Anchor mask ratio when a memory is written from a prompt (paper: 0.2); also "
            "where an inconsistent trajectory ends."
        },
    )
    chunk_length: int | None = field(
        default=None,
        metadata={
            "help": "Prompt tokens written at once (default: the model's context). A longer prompt "
            "is written chunk by chunk into one memory, each chunk with all inner steps."
        },
    )

    def __post_init__(self) -> None:
        """Check every value against its table or range.

        Raises:
            ConfigError: One line that names the setting and what it may be.
        """
        object.__setattr__(self, "modules", tuple(self.modules))
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"memory.{name}: {value!r} is not one of {', '.join(allowed)}")
        for name in ("rank", "num_steps", "num_epochs"):
            value = getattr(self, name)
            is_valid = isinstance(value, int) and value >= 1
            _check(name, value, is_valid, "a whole number of at least 1")
        if self.chunk_length is not None:
            is_valid = isinstance(self.chunk_length, int) and self.chunk_length >= 1
            _check("chunk_length", self.chunk_length, is_valid, "a whole number of at least 1")
        _check("alpha", self.alpha, 0 < self.alpha < math.inf, "a positive number")
        _check("temperature", self.temperature, 0 < self.temperature < math.inf, "positive")
        _check("learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "positive")
        _check("layer_fraction", self.layer_fraction, 0 < self.layer_fraction <= 1, "in (0, 1]")
        _check(
            "clip_norm",
            self.clip_norm,
            self.clip_norm is None or 0 < self.clip_norm < math.inf,
            "positive, or null for no clipping",
        )
        _check(
            "pre_anchor_scale",
            self.pre_anchor_scale,
            1 <= self.pre_anchor_scale < math.inf,
            "at least 1, since the pre-anchor is the noisier state",
        )
        for name in ("prompt_mask_ratio", "inconsistent_start_ratio"):
            _check(name, getattr(self, name), 0 < getattr(self, name) <= 1, "in (0, 1]")
        self._check_combinations()

    @property
    def scale(self) -> float:
        """Factor of a fast LoRA's B A: alpha / rank; 1 for full deltas."""
        return self.alpha / self.rank if self.kind == "lora" else 1.0

    def _check_combinations(self) -> None:
        if (self.scope == "modules") != bool(self.modules):
            raise ConfigError(
                "memory.modules: name the modules if and only if memory.scope is 'modules' "
                f"(scope is {self.scope!r}, modules are {list(self.modules)})"
            )
        if (
            self.trajectory == "inconsistent"
            and self.inconsistent_start_ratio < self.prompt_mask_ratio
        ):
            raise ConfigError(
                "memory.inconsistent_start_ratio: must be at least memory.prompt_mask_ratio "
                f"({self.inconsistent_start_ratio} < {self.prompt_mask_ratio})"
            )


def _check(name: str, value: object, is_valid: bool, expected: str) -> None:
    if not is_valid:
        raise ConfigError(f"memory.{name}: {value} is out of range; it must be {expected}")
