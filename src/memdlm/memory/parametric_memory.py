"""Parametric memory phi_K: write it from tokens, use it in a `with` block, erase it (MemDLM Eq. 9).

The public face of this package for inference. Each row of a batch gets a memory of its own, which
depends on that row's tokens and seed alone, never on the other rows. A memory can be kept in a
folder (`memdlm.memory.artefact`), and kept ones be put side by side in one batch (`stack`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from memdlm.backbones.batch_rows import present_rows
from memdlm.backbones.wrapping import unwrap
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import ConfigError, DataError, UsageError
from memdlm.memory.artefact import Artefact, delete_memory
from memdlm.memory.config import MemoryConfig
from memdlm.memory.exclusive import exclusive
from memdlm.memory.export import export_adapter
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import InnerStats, merge_stats, plan_inner_loop, run_inner_loop
from memdlm.memory.inspection import describe
from memdlm.memory.placement import place
from memdlm.memory.prompt import Round, check_tokens, plan_rounds, prompt_trajectory, real_tokens
from memdlm.memory.provenance import MemoryRow, PromptRecord
from memdlm.memory.stacking import check_alike, stack_memories
from memdlm.seeding import generator

# Backbones that answer with a memory at this moment. Linear layers would add a second one and
# experts would replace the first, so there is never more than one.
_IN_USE: "WeakSet[nn.Module]" = WeakSet()


class ParametricMemory:
    """Fast weights written from tokens, kept until erased.

    Threads may share a model: `write` and an `attached` block wait for one another. A plain forward
    of the model in another thread does not wait and would see the memory that is attached.

    Example:
        >>> memory = ParametricMemory(model, MemoryConfig())
        >>> memory.write(prompt_ids)
        >>> with memory.attached():
        ...     logits = model(canvas_ids).logits
        >>> memory.save_pretrained("notes-memory")
        >>> memory.erase()
    """

    def __init__(
        self,
        model: nn.Module,
        config: MemoryConfig | None = None,
        objective: ObjectiveConfig | None = None,
    ) -> None:
        """Prepare a memory for `model`; nothing is allocated before `write`.

        Args:
            model: A backbone, possibly inside PEFT or DDP.
            config: Placement and inner loop; the paper's settings by default.
            objective: Noise schedule that draws the anchor.

        Raises:
            ConfigError: If memory is disabled, shared by processes, or its scope selects no module.
            UsageError: If `model` holds no backbone.
        """
        self.config = config or MemoryConfig()
        if not self.config.enabled:
            raise ConfigError("memory.enabled is off; a ParametricMemory needs it on")
        if self.config.sharing == "global_batch":
            raise ConfigError(
                "memory.sharing: global_batch joins the processes of a training run; a memory "
                "written here takes sequence or batch"
            )
        self.objective = objective or ObjectiveConfig()
        self.backbone = unwrap(model)
        self.placement = place(self.backbone.model, self.config)
        self.fast_weights: FastWeights | None = None
        self.stats: InnerStats | None = None
        self.rows: tuple[MemoryRow | None, ...] = ()
        self._is_stack = False

    @property
    def is_written(self) -> bool:
        """Whether there is something to attach."""
        return self.fast_weights is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of the fast weights; 0 when nothing is written."""
        return 0 if self.fast_weights is None else self.fast_weights.num_bytes

    @torch.inference_mode(False)  # a caller that decodes may be in it, and nothing could be learnt
    def write(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        seed: int | Sequence[int] = 0,
        extend: bool = False,
    ) -> InnerStats:
        """Run the inner loop on `input_ids` and keep the result, replacing what was there.

        All real tokens may be masked; the anchor's ratio is `config.prompt_mask_ratio`. The model
        runs in eval mode; weights, gradients, mode and random state are left as they were. If
        anything fails, so is the memory. A prompt longer than `config.chunk_length` (the model's
        context by default) is written chunk by chunk into the same memory: each chunk runs all
        inner steps, from the fast weights that the chunk before left (`memdlm.memory.prompt`).

        Args:
            input_ids: Tokens to remember [B, L] int64.
            attention_mask: 1 on real tokens, 0 on padding [B, L]; None means no padding.
            seed: Decides masks and initial fast weights; one for all rows, or one per row.
            extend: Write on in the memory that is there, row by row, instead of replacing it; it
                keeps its seeds.

        Returns:
            Statistics of all steps in order. Where rows have different numbers of chunks, steps
            that a row did not take have loss nan and zeros.

        Raises:
            ConfigError: If `config.chunk_length` exceeds the context.
            DataError: If a row is empty or the backbone has no mask token.
            UsageError: If a tensor is of another shape or type, a memory is attached, seeds do not
                fit the rows, or there is nothing to extend.
        """
        check_tokens(input_ids, attention_mask)
        with exclusive(self.backbone):
            self._check_free("write")
            rounds = plan_rounds(input_ids, attention_mask, self._chunk_length())
            prompts = real_tokens(input_ids, attention_mask)
            fast, rows = self._start(len(prompts), seed, extend)
            was_training = [module for module in self.backbone.modules() if module.training]
            self.backbone.eval()
            try:
                stats, fast, rows = self._write_rounds(rounds, fast, rows)
            finally:
                for module in was_training:
                    module.training = True
            records = [PromptRecord.of(prompt) for prompt in prompts]
            records_of = [records] if self._is_shared else [[record] for record in records]
            self.rows = tuple(
                row.written(written, 0, is_alive=True)
                for row, written in zip(rows, records_of, strict=True)
            )
            self.fast_weights, self.stats, self._is_stack = fast, stats, False
        return stats

    @property
    def _is_shared(self) -> bool:
        return self.config.sharing == "batch"

    def _chunk_length(self) -> int:
        context: int = self.backbone.config.max_position_embeddings
        wanted = self.config.chunk_length
        if wanted is not None and wanted > context:
            raise ConfigError(
                f"memory.chunk_length: {wanted:,} exceeds the model's context of {context:,} "
                "tokens; use at most that, or null"
            )
        return context if wanted is None else wanted

    def _start(
        self, num_prompts: int, seed: int | Sequence[int], extend: bool
    ) -> tuple[FastWeights, list[MemoryRow]]:
        """Return the fast weights to begin with, ours to change, and the rows they belong to."""
        num_rows = 1 if self._is_shared else num_prompts
        if extend:
            self._check_no_stack()
            if self.fast_weights is None:
                raise UsageError("there is no memory to extend; write(input_ids) one first")
            if len(self.rows) != num_rows:
                raise UsageError(
                    f"the memory has {len(self.rows)} rows and cannot be extended by {num_rows}; "
                    "give one prompt per row"
                )
            fast = self.fast_weights.select(range(num_rows))
            return fast, [row for row in self.rows if row is not None]
        seeds = [seed] * num_rows if isinstance(seed, int) else list(seed)
        if len(seeds) != num_rows:
            raise UsageError(
                f"seed: {len(seeds)} seeds for {num_rows} memories; give one seed, or one per row"
            )
        device = self.backbone.lm_head.weight.device
        drawn = {s: generator(s, "fast_weights", device=device) for s in dict.fromkeys(seeds)}
        fast = FastWeights(self.placement, self.config, num_rows, device, [drawn[s] for s in seeds])
        return fast, [MemoryRow(s) for s in seeds]

    def _write_rounds(
        self, rounds: list[Round], fast: FastWeights, rows: list[MemoryRow]
    ) -> tuple[InnerStats, FastWeights, list[MemoryRow]]:
        """Write every round into its rows of `fast`; a row that met inf or nan is left out."""
        parts: list[tuple[tuple[int, ...], InnerStats]] = []
        for chunk in rounds:
            places = (0,) * len(chunk.rows) if self._is_shared else chunk.rows
            targets = tuple(dict.fromkeys(places))
            is_whole = len(targets) == len(rows)
            part = fast if is_whole else fast.select(targets)
            stats = self._write_round(chunk, part, [rows[place] for place in places])
            # What has met inf or nan once has no effect ever after.
            was_dropped = torch.tensor([rows[row].is_dropped for row in targets])
            if bool(was_dropped.any()):
                stats = replace(stats, alive=stats.alive & ~was_dropped.to(stats.alive.device))
                part.drop(stats.alive)
            if not is_whole:
                fast.put(targets, part)
            for row, is_alive in zip(targets, stats.alive.tolist(), strict=True):
                rows[row] = rows[row].written((), 1, is_alive)
            parts.append((targets, stats))
        return merge_stats(parts, len(rows)), fast, rows

    def _write_round(
        self, chunk: Round, fast: FastWeights, rows: Sequence[MemoryRow]
    ) -> InnerStats:
        """Run the inner loop on one chunk; `rows` are the memories its rows are written into."""
        mask_token_id = self.backbone.config.mask_token_id
        if mask_token_id is None:
            raise DataError("the model's config has no mask_token_id; set config.mask_token_id")
        device = self.backbone.lm_head.weight.device
        trajectory, batch = prompt_trajectory(
            chunk,
            [row.seed for row in rows],
            [row.num_chunks for row in rows],
            self.config,
            self.objective,
            mask_token_id,
        )
        config = replace(self.config, weighting=self.config.prompt_weighting)
        plan = plan_inner_loop(trajectory, batch, config, self.objective).to(device)
        mask = None if chunk.attention_mask is None else chunk.attention_mask.to(device, copy=True)
        with torch.no_grad():
            _, inputs = self.backbone.model.embed(plan.states[0], mask)
        return run_inner_loop(self.backbone, fast, plan, config, inputs)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let every forward of the model within the block use the memory.

        Another thread that writes or attaches a memory of the same model waits for the block's end.

        Raises:
            UsageError: If nothing has been written or a memory is attached already; and, from a
                forward within the block, if its batch has not as many rows as the memory (any
                number will do for a shared one).
        """
        with exclusive(self.backbone):
            if self.fast_weights is None:
                raise UsageError("the memory is empty; call write(input_ids) before attached()")
            self._check_free("attach")
            num_rows = self.fast_weights.num_rows

            def check_rows(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                present = present_rows()
                expected = num_rows if present is None else len(present)
                if num_rows != 1 and expected != args[0].shape[0]:
                    raise UsageError(
                        f"the memory was written from {expected} rows, but the batch has "
                        f"{args[0].shape[0]}; write it from that batch, or set memory.sharing: "
                        "batch"
                    )

            # Deltas see flattened tokens and could not tell rows of another number apart.
            first = self.backbone.model.layers[self.placement.first_layer]
            handle = first.register_forward_pre_hook(check_rows)
            _IN_USE.add(self.backbone)
            try:
                with self.fast_weights.attached(self.backbone.model):
                    yield
            finally:
                _IN_USE.discard(self.backbone)
                handle.remove()

    def erase(self) -> None:
        """Forget everything written; the tensors are freed."""
        self.fast_weights = self.stats = None
        self.rows, self._is_stack = (), False

    @staticmethod
    def stack(memories: "Sequence[ParametricMemory | None]") -> "ParametricMemory":
        """Return a memory whose rows are those of `memories`, in order, to attach to one batch.

        None is a row without memory: its outputs are those of the model alone. The tensors are
        copies; erasing the stack leaves its parts alone, and the other way round.

        Raises:
            UsageError: A part is empty, is on another model, has other sites, rank or scale, or
                there is none.
        """
        parts = [memory for memory in memories if memory is not None]
        if not parts:
            raise UsageError("there is no memory to stack; give at least one that is not None")
        first = parts[0]
        for part in parts:
            first.check_alike(part)
        stacked = ParametricMemory(first.backbone, first.config, first.objective)
        stacked.fast_weights = stack_memories(
            [None if memory is None else memory.fast_weights for memory in memories]
        )
        stacked.rows = tuple(
            row for memory in memories for row in ((None,) if memory is None else memory.rows)
        )
        stacked._is_stack = True
        return stacked

    def check_alike(self, other: "ParametricMemory") -> None:
        """Refuse memories that cannot share a batch.

        Raises:
            UsageError: One is empty, they are on different models, or they differ in sites, rank or
                scale.
        """
        if self.fast_weights is None or other.fast_weights is None:
            raise UsageError("a memory is empty; write(input_ids) it before it is used")
        if self.backbone is not other.backbone:
            raise UsageError("memories of different models cannot share a batch")
        check_alike(self.fast_weights, other.fast_weights)

    def row(self, index: int) -> "ParametricMemory":
        """Return a copy of one row as a memory of its own.

        Raises:
            UsageError: There is no such row, or the memory is a stack.
        """
        self._check_no_stack()
        if self.fast_weights is None or not 0 <= index < len(self.rows):
            raise UsageError(f"row {index}: the memory has {len(self.rows)} rows, counted from 0")
        single = ParametricMemory(self.backbone, self.config, self.objective)
        single.fast_weights = self.fast_weights.select([index])
        single.rows = (self.rows[index],)
        return single

    def save_pretrained(self, folder: str | Path) -> None:
        """Keep the memory in a new `folder`; see `memdlm.memory.artefact` for what it holds.

        Raises:
            CheckpointError: `folder` exists or cannot be written; nothing is left behind.
            UsageError: Nothing has been written.
        """
        self._artefact().save(Path(folder))

    def export(self, folder: str | Path, *, row: int = 0, layout: str = "peft") -> None:
        """Write one row as a LoRA adapter that PEFT reads; see `memdlm.memory.export`.

        Raises:
            CheckpointError: `folder` exists or cannot be written; nothing is left behind.
            ConfigError: `layout` is unknown.
            UsageError: Nothing has been written, or the memory is no LoRA.
        """
        export_adapter(self._artefact(), folder, row=row, layout=layout)

    def describe(self) -> dict[str, Any]:
        """Return size, norms per layer and the experts written; see `memdlm.memory.inspection`."""
        return describe(self._artefact())

    @staticmethod
    def delete(folder: str | Path) -> None:
        """Remove a kept memory from the disk; `erase` forgets one that was read.

        Raises:
            CheckpointError: `folder` holds no memory, or other files besides.
        """
        delete_memory(Path(folder))

    def _artefact(self) -> Artefact:
        if self.fast_weights is None:
            raise UsageError("the memory is empty; call write(input_ids) before you keep it")
        self._check_no_stack()
        rows = tuple(row for row in self.rows if row is not None)
        return Artefact.of(self.backbone, self.config, self.objective, rows, self.fast_weights)

    def _check_no_stack(self) -> None:
        # Its parts may have other settings, and it has rows without a memory.
        if self._is_stack:
            raise UsageError("this is a stack of memories; use its parts one by one")

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module) -> "ParametricMemory":
        """Read a kept memory, ready to attach to `model`.

        Raises:
            CheckpointError: `folder` holds no memory, is damaged or of an unknown version, or the
                memory was written on another base or with another outer adapter.
            UsageError: If `model` holds no backbone.
        """
        artefact = Artefact.load(Path(folder))
        lm = unwrap(model)
        artefact.check_fits(lm)
        memory = cls(lm, artefact.config, artefact.objective)
        memory.fast_weights = artefact.fast_weights(memory.placement, lm.lm_head.weight.device)
        memory.rows = artefact.rows
        return memory

    def _check_free(self, action: str) -> None:
        if self.backbone in _IN_USE:
            raise UsageError(
                f"a memory is attached to this model; leave its `with` block before you {action}"
            )
