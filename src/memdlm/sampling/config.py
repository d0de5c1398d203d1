"""Settings of a decode. Knows ranges and contradictions; knows neither model nor prompt."""

from dataclasses import dataclass, field

from memdlm.errors import ConfigError
from memdlm.sampling.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    invalid,
    token_ids,
)

POLICIES = ("low_confidence", "random", "margin", "entropy", "independent")
STEP_SCHEDULES = ("even", "linear", "cosine", "dream")
END_TOKENS = ("free", "defer", "suppress")
CONFIDENCE_SOURCES = ("model", "sampling")
DECODERS = ("auto", "masked", "block")
CACHES = ("auto", "none", "exact", "prefix", "dual")
# Beyond any context; a typo of more zeros should fail here, not when memory runs out.
_LIMIT = 1_000_000
# Beyond any use; keeps float64 scores finite.
_LARGEST_SCALE = 1000.0


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
            "(default: one token per step). Steps that would commit nothing are not run."
        },
    )
    block_length: int | None = field(
        default=None,
        metadata={
            "help": "Slots denoised together; blocks are filled from left to right "
            "(default: max_new_tokens, one block). Must divide max_new_tokens unless "
            "uneven_blocks is set."
        },
    )
    uneven_blocks: bool = field(
        default=False,
        metadata={
            "help": "Let a block_length that does not divide max_new_tokens leave a shorter last "
            "block, and a number of steps that does not divide by the blocks round up per block."
        },
    )
    policy: str = field(
        default="low_confidence",
        metadata={
            "help": "Which slots are committed first: low_confidence (highest probability of the "
            "chosen token; LLaDA's name for keeping the least sure ones masked, Dream's "
            "maskgit_plus), random, margin (largest gap between the two best tokens, Dream's "
            "topk_margin), entropy (lowest entropy) or independent (every slot by its own draw, "
            "Dream's origin)."
        },
    )
    step_schedule: str = field(
        default="even",
        metadata={
            "help": "Tokens committed per step: even (LLaDA), the expected counts of a linear "
            "or cosine noise schedule run backwards, or dream (those of linear times from 1 to "
            "schedule_epsilon, rounded down, the rest in the last step)."
        },
    )
    schedule_epsilon: float = field(
        default=1e-3, metadata={"help": "Last time of step_schedule dream; Dream's eps."}
    )
    threshold: float | None = field(
        default=None,
        metadata={
            "help": "Commit in every step all slots of the block whose confidence reaches this, "
            "on top of what the schedule asks for, which is at least one. For the policies "
            "low_confidence and margin, whose confidence lies between 0 and 1."
        },
    )
    temperature: float = field(
        default=0.0,
        metadata={"help": "Gumbel noise on the token choice, drawn in float64; 0 is greedy."},
    )
    top_k: int | None = field(
        default=None,
        metadata={"help": "Sample among the k most probable tokens only; before top_p."},
    )
    top_p: float | None = field(
        default=None,
        metadata={
            "help": "Sample among the fewest most probable tokens whose probabilities, after "
            "temperature, add up to this."
        },
    )
    confidence_source: str = field(
        default="model",
        metadata={
            "help": "Probabilities that the policy ranks by: model (as the model gives them, "
            "LLaDA) or sampling (after temperature, top_k and top_p, Dream)."
        },
    )
    confidence_temperature: float = field(
        default=0.0,
        metadata={
            "help": "Draw the slots to commit with probabilities softmax(confidence / this) "
            "instead of taking the most confident; Dream's alg_temp. 0 is off."
        },
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
    defer_tokens: tuple[int, ...] = field(
        default=(),
        metadata={"help": "Token ids that are committed only when nothing else in the block is."},
    )
    stop_tokens: tuple[int, ...] = field(
        default=(),
        metadata={"help": "Token ids that end a response, besides the model's end-of-text ids."},
    )
    end_tokens: str = field(
        default="free",
        metadata={
            "help": "What becomes of the ids that end a response: free, defer (LLaDA's "
            "confidence_eos_eot_inf: committed last in a block) or suppress (LLaDA's "
            "logits_eos_inf: never generated)."
        },
    )
    min_new_tokens: int = field(
        default=0, metadata={"help": "Slots at the start of a response that cannot end it."}
    )
    stop_at_eos: bool = field(
        default=True,
        metadata={"help": "Cut the response before its first end-of-text token."},
    )
    stop_early: bool = field(
        default=True,
        metadata={
            "help": "Leave a row as soon as its end, a token of stop_at_eos or a task's stop "
            "string, and everything before it stand: what would follow is cut anyway, so no "
            "answer changes."
        },
    )
    infill: bool = field(
        default=False,
        metadata={
            "help": "Fill the mask tokens inside the prompts and append none; blocks are windows "
            "of block_length over the prompt, max_new_tokens and stop_at_eos do not apply."
        },
    )
    decoder: str = field(
        default="auto",
        metadata={
            "help": "masked (LLaDA, Dream: a response attends to all of itself), block (LLaDA2.x: "
            "blocks of block_length counted from the start of the prompt, each attending to itself "
            "and what precedes it) or auto (block for families that offer block-causal attention)."
        },
    )
    cache: str = field(
        default="auto",
        metadata={
            "help": "Keys and values kept between steps: none; exact (block decoding: those of "
            "finished blocks, changes no token); prefix or dual (masked decoding, APPROXIMATE, "
            "arXiv 2505.22618: within a block, those of what precedes it, or of all other "
            "positions, stay as they were at its first step); auto (exact for block decoding, "
            "else none)."
        },
    )
    min_tokens_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Block decoding: commit at least so many slots per step, in place of "
            "num_unmasking_steps; LLaDA2.1's num_to_transfer."
        },
    )
    editing_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Block decoding: replace a committed token of the current block where the "
            "model prefers another one with a confidence above this; LLaDA2.1's token editing, "
            "published with 0.9. Off by default, as in the paper's evaluation."
        },
    )
    max_editing_steps: int = field(
        default=16,
        metadata={
            "help": "With editing_threshold, steps spent on a block after its last mask is gone; "
            "LLaDA2.1's max_post_steps."
        },
    )
    abandon_block_at_eos: bool = field(
        default=False,
        metadata={
            "help": "Block decoding: leave a block, masks and all, once it holds an end-of-text "
            "token, as MemDLM's published sampler does on eos_early_stop. An answer may then "
            "contain mask tokens; stop_early saves the same steps without."
        },
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
        check_integer("max_new_tokens", self.max_new_tokens, minimum=1, maximum=_LIMIT)
        for name in ("num_unmasking_steps", "block_length", "top_k", "min_tokens_per_step"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum=1, maximum=_LIMIT)
        check_integer("min_new_tokens", self.min_new_tokens, minimum=0, maximum=_LIMIT)
        check_integer("max_editing_steps", self.max_editing_steps, minimum=0, maximum=_LIMIT)
        check_integer("seed", self.seed, minimum=0)
        for name in ("temperature", "guidance_scale", "confidence_temperature"):
            check_number(name, getattr(self, name), 0, _LARGEST_SCALE)
        for name in ("threshold", "top_p", "editing_threshold"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, 1, exclusive=True)
        check_number("schedule_epsilon", self.schedule_epsilon, 0, 1)
        check_choice("policy", self.policy, POLICIES)
        check_choice("step_schedule", self.step_schedule, STEP_SCHEDULES)
        check_choice("confidence_source", self.confidence_source, CONFIDENCE_SOURCES)
        check_choice("end_tokens", self.end_tokens, END_TOKENS)
        check_choice("decoder", self.decoder, DECODERS)
        check_choice("cache", self.cache, CACHES)
        for name in (
            "uneven_blocks",
            "stop_at_eos",
            "stop_early",
            "infill",
            "abandon_block_at_eos",
        ):
            check_flag(name, getattr(self, name))
        for name in ("suppress_tokens", "defer_tokens", "stop_tokens"):
            object.__setattr__(self, name, token_ids(name, getattr(self, name)))
        self._check_together()
        self._check_decoder()
        # An infilled prompt has as many slots as it has, so its blocks are never checked for fit.
        if not (self.infill or self.uneven_blocks or self.decoder == "block"):
            self._check_blocks()

    def _check_together(self) -> None:
        """Refuse pairs of settings of which one would do nothing."""
        if self.threshold is not None and self.policy not in ("low_confidence", "margin"):
            raise invalid(
                "threshold",
                self.threshold,
                f"policy={self.policy} has no confidence from 0 to 1; use low_confidence or margin",
            )
        if self.confidence_temperature and self.policy in ("random", "independent"):
            raise invalid(
                "confidence_temperature",
                self.confidence_temperature,
                f"policy={self.policy} ignores confidence; use another policy or 0",
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise invalid(
                "min_new_tokens",
                self.min_new_tokens,
                f"use at most max_new_tokens={self.max_new_tokens}",
            )
        if self.infill and self.min_new_tokens:
            raise invalid("min_new_tokens", self.min_new_tokens, "use 0 with infill")

    def _check_decoder(self) -> None:
        """Refuse what the other way of decoding would need; `auto` is checked against the model."""
        if self.decoder == "masked" and self.block_only:
            name = self.block_only[0]
            raise invalid(name, getattr(self, name), "use it with decoder=block, or leave it out")
        if self.decoder == "block" and self.masked_only:
            name = self.masked_only[0]
            raise invalid(name, getattr(self, name), "use it with decoder=masked, or leave it out")
        if self.cache in ("prefix", "dual") and self.infill:
            raise invalid("cache", self.cache, "use none with infill")
        if self.min_tokens_per_step is not None and self.num_unmasking_steps is not None:
            raise invalid(
                "min_tokens_per_step",
                self.min_tokens_per_step,
                f"num_unmasking_steps={self.num_unmasking_steps} says the same; give one of them",
            )

    @property
    def block_only(self) -> tuple[str, ...]:
        """Settings, other than default, that only block decoding knows."""
        given = {
            "cache": self.cache == "exact",
            "min_tokens_per_step": self.min_tokens_per_step is not None,
            "editing_threshold": self.editing_threshold is not None,
            "abandon_block_at_eos": self.abandon_block_at_eos,
        }
        return tuple(name for name, is_given in given.items() if is_given)

    @property
    def masked_only(self) -> tuple[str, ...]:
        """Settings, other than default, that only masked decoding knows."""
        given = {
            "cache": self.cache in ("prefix", "dual"),
            "infill": self.infill,
            "guidance_scale": self.guidance_scale > 0,
            "policy": self.policy == "independent",
        }
        return tuple(name for name, is_given in given.items() if is_given)

    def _check_blocks(self) -> None:
        remainder = self.max_new_tokens % self.tokens_per_block
        if remainder:
            fitting = self.max_new_tokens - remainder + self.tokens_per_block
            raise ConfigError(
                f"sampling.block_length: {self.block_length} does not divide "
                f"max_new_tokens={self.max_new_tokens}; set max_new_tokens={fitting} or a "
                "block_length that divides it, or set uneven_blocks"
            )
        if self.num_unmasking_steps is not None and self.num_unmasking_steps % self.num_blocks:
            lower = self.num_unmasking_steps // self.num_blocks * self.num_blocks
            choices = f"{lower} or {lower + self.num_blocks}" if lower else str(self.num_blocks)
            raise ConfigError(
                f"sampling.num_unmasking_steps: {self.num_unmasking_steps} is not divisible by the "
                f"{self.num_blocks} blocks of {self.tokens_per_block} tokens; use {choices}, "
                "or set uneven_blocks"
            )

    @property
    def tokens_per_block(self) -> int:
        """Slots of one block: `block_length`, or all of them."""
        return self.max_new_tokens if self.block_length is None else self.block_length

    @property
    def num_blocks(self) -> int:
        """Blocks of a response, the shorter last one included."""
        return -(-self.max_new_tokens // self.tokens_per_block)

    @property
    def steps_per_block(self) -> int:
        """Unmasking steps planned for one block, those that commit nothing included."""
        if self.num_unmasking_steps is None:
            return self.tokens_per_block
        return -(-self.num_unmasking_steps // self.num_blocks)
