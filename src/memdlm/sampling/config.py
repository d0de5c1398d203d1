"""Settings of a decode. Knows ranges and contradictions; knows neither model nor prompt."""

import math
from dataclasses import dataclass, field
from typing import Any

from memdlm.errors import ConfigError

POLICIES = ("low_confidence", "random", "margin", "entropy")
STEP_SCHEDULES = ("even", "linear", "cosine")
# Beyond any context; a typo of more zeros should fail here, not when memory runs out.
_LIMIT = 1_000_000


@dataclass(frozen=True)
class SamplingConfig:
    """How a response is decoded; the defaults are the paper's evaluation: greedy, a token a step.

    Raises:
        ConfigError: A value is out of range or two values contradict each other.
    """

    max_new_tokens: int = field(
        default=128, metadata={"help": "Number of mask slots appended to each prompt."}
    )
    num_unmasking_steps: int | None = field(
        default=None,
        metadata={
            "help": "Forward passes that commit tokens, spread evenly over the blocks "
            "(default: max_new_tokens, one token per step). Steps that would commit nothing are "
            "not run."
        },
    )
    block_length: int | None = field(
        default=None,
        metadata={
            "help": "Slots denoised together; blocks are filled from left to right "
            "(default: max_new_tokens, one block). Must divide max_new_tokens."
        },
    )
    policy: str = field(
        default="low_confidence",
        metadata={
            "help": "Which slots are committed first: low_confidence (highest probability of the "
            "chosen token; LLaDA's name for keeping the least sure ones masked), random, margin "
            "(largest gap between the two best tokens) or entropy (lowest entropy)."
        },
    )
    step_schedule: str = field(
        default="even",
        metadata={
            "help": "Tokens committed per step: even (LLaDA), or the expected counts of a linear "
            "or cosine noise schedule run backwards."
        },
    )
    temperature: float = field(
        default=0.0,
        metadata={"help": "Gumbel noise on the token choice, drawn in float64; 0 is greedy."},
    )
    guidance_scale: float = field(
        default=0.0,
        metadata={
            "help": "Classifier-free guidance against a masked prompt (arXiv 2502.09992): logits = "
            "unconditional + (scale + 1) x (conditional - unconditional). 0 is off; otherwise "
            "every step runs the model twice."
        },
    )
    suppress_tokens: tuple[int, ...] = field(
        default=(), metadata={"help": "Token ids that are never generated."}
    )
    stop_at_eos: bool = field(
        default=True,
        metadata={"help": "Cut the response before its first end-of-text token."},
    )
    seed: int = field(
        default=0,
        metadata={
            "help": "Seed of the random policy and of temperature. Each row draws from its own "
            "stream, so a row's answer does not depend on its batch."
        },
    )

    def __post_init__(self) -> None:
        """Check every value, then how they fit together."""
        _check_integer("max_new_tokens", self.max_new_tokens, minimum=1, maximum=_LIMIT)
        for name in ("num_unmasking_steps", "block_length"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), minimum=1, maximum=_LIMIT)
        _check_choice("policy", self.policy, POLICIES)
        _check_choice("step_schedule", self.step_schedule, STEP_SCHEDULES)
        _check_non_negative("temperature", self.temperature)
        _check_non_negative("guidance_scale", self.guidance_scale)
        _check_integer("seed", self.seed, minimum=0)
        if not isinstance(self.stop_at_eos, bool):
            raise _invalid("stop_at_eos", self.stop_at_eos, "use true or false")
        # A YAML recipe gives a list; the frozen config holds a tuple.
        if not isinstance(self.suppress_tokens, (list, tuple)):
            raise _invalid("suppress_tokens", self.suppress_tokens, "give a list of token ids")
        object.__setattr__(self, "suppress_tokens", tuple(self.suppress_tokens))
        for token in self.suppress_tokens:
            _check_integer("suppress_tokens", token, minimum=0)
        self._check_blocks()

    def _check_blocks(self) -> None:
        remainder = self.max_new_tokens % self.tokens_per_block
        if remainder:
            fitting = self.max_new_tokens - remainder + self.tokens_per_block
            raise ConfigError(
                f"sampling.block_length: {self.block_length} does not divide "
                f"max_new_tokens={self.max_new_tokens}; set max_new_tokens={fitting} or a "
                "block_length that divides it"
            )
        if self.num_unmasking_steps is not None and self.num_unmasking_steps % self.num_blocks:
            lower = self.num_unmasking_steps // self.num_blocks * self.num_blocks
            choices = f"{lower} or {lower + self.num_blocks}" if lower else str(self.num_blocks)
            raise ConfigError(
                f"sampling.num_unmasking_steps: {self.num_unmasking_steps} is not divisible by the "
                f"{self.num_blocks} blocks of {self.tokens_per_block} tokens; use {choices}"
            )

    @property
    def tokens_per_block(self) -> int:
        """Slots of one block: `block_length`, or all of them."""
        return self.max_new_tokens if self.block_length is None else self.block_length

    @property
    def num_blocks(self) -> int:
        """Blocks of a response."""
        return self.max_new_tokens // self.tokens_per_block

    @property
    def steps_per_block(self) -> int:
        """Unmasking steps planned for one block, those that commit nothing included."""
        steps = self.num_unmasking_steps
        return (self.max_new_tokens if steps is None else steps) // self.num_blocks


def _invalid(name: str, value: Any, remedy: str) -> ConfigError:
    return ConfigError(f"sampling.{name}: {value!r} is not valid; {remedy}")


def _check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < minimum or (maximum is not None and value > maximum):
        limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise _invalid(name, value, f"use an integer {limits}")


def _check_non_negative(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise _invalid(name, value, "use a finite number of at least 0")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise _invalid(name, value, f"choose one of {', '.join(choices)}")
