"""Where a memory comes from: hashes and counts of what was written, never the text itself."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class PromptRecord:
    """One prompt that was written.

    Attributes:
        sha256: Of its token ids as little-endian int64, in hex.
        num_tokens: Its length.
    """

    sha256: str
    num_tokens: int

    @classmethod
    def of(cls, ids: torch.Tensor) -> "PromptRecord":
        """Describe the ids [L] int64."""
        data = ids.cpu().numpy().astype("<i8").tobytes()
        return cls(hashlib.sha256(data).hexdigest(), len(ids))


@dataclass(frozen=True)
class MemoryRow:
    """One memory of a batch.

    Attributes:
        seed: Of its masks and initial fast weights.
        prompts: What was written, in order; side by side where the memory is shared by a batch.
        num_chunks: Chunks written so far, each of which draws masks of its own.
        is_dropped: The inner loop met inf or nan, so that the memory has no effect.
    """

    seed: int
    prompts: tuple[PromptRecord, ...] = ()
    num_chunks: int = 0
    is_dropped: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens written."""
        return sum(prompt.num_tokens for prompt in self.prompts)

    def written(
        self, prompts: Sequence[PromptRecord], num_chunks: int, is_alive: bool
    ) -> "MemoryRow":
        """Return the row after `prompts` have been written in `num_chunks` more chunks."""
        return replace(
            self,
            prompts=(*self.prompts, *prompts),
            num_chunks=self.num_chunks + num_chunks,
            is_dropped=self.is_dropped or not is_alive,
        )
