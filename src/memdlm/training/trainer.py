"""`MemDLMTrainer`: transformers' Trainer with the outer step as its loss, and nothing else changed.

Every random draw of the method comes from a stream named by (seed, step, micro-batch, rank), so
that memory on and off see the same batches and masks, and a resumed run continues exactly.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from memdlm.backbones.adapters import add_lora
from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.loading import load_model
from memdlm.backbones.quantization import is_quantized
from memdlm.data.collation import Collator
from memdlm.diffusion.states import CleanBatch
from memdlm.errors import CheckpointError, ConfigError, DataError, NonFiniteError, UsageError
from memdlm.files import defect, is_disk_full
from memdlm.seeding import derive_seed, preserved_rng
from memdlm.training.checkpoints import CheckpointFolder
from memdlm.training.config import MemDLMConfig
from memdlm.training.guard import NonFiniteGuard, trained_weights_are_finite
from memdlm.training.metrics import StepMetrics
from memdlm.training.outer_step import OuterStep, plan_step
from memdlm.training.resuming import apply_settings, settings_of
from memdlm.training.row_order import ordered, prepare_stream

_LOGGER = logging.getLogger("memdlm")


class MemDLMTrainer(Trainer):
    """Train a masked diffusion language model, with or without parametric memory.

    Works with full fine-tuning and PEFT adapters, gradient accumulation, gradient checkpointing,
    bf16, evaluation and exact resume. The evaluation loss never uses a memory: one written from the
    very labels it scores would not be comparable with anything.

    Example:
        >>> trainer = MemDLMTrainer(model, MemDLMConfig("runs/first"), train_dataset=rows,
        ...                         processing_class=tokenizer, peft_config=LoraConfig(...))
        >>> trainer.train()
    """

    # Each micro-batch's loss is a mean of its own; the Trainer divides by their number.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: MemDLMConfig | None = None,
        *,
        data_collator: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        """Prepare training of `model`.

        Args:
            model: A memdlm backbone, possibly a PEFT model around one.
            args: Settings; the paper's by default.
            data_collator: Gives `input_ids` and `labels` [B, L] (-100 on the prompt); padded as
                `args.objective.padding` says by default.
            processing_class: The tokenizer; supplies the pad and mask tokens the config lacks.
            peft_config: A `peft.LoraConfig`: puts a new adapter on `model` (see
                `memdlm.add_lora`), routed experts included.
            kwargs: As for `transformers.Trainer` (`train_dataset`, `eval_dataset`, `callbacks`...).

        Raises:
            ConfigError: If the memory's scope selects no module, or `compute_metrics` is given:
                evaluation returns losses alone; for a 4-bit model without an adapter or in fp16;
                or if `peft_config` asks for something not supported.
            DataError: If neither model nor tokenizer has a mask or pad token.
            UsageError: If `model` holds no memdlm backbone, or `args` is no `MemDLMConfig`.
        """
        args = args or MemDLMConfig(output_dir="runs/memdlm")
        _check_call(args, kwargs.get("compute_metrics"))
        if peft_config is not None:
            model = add_lora(model, peft_config)
        self.outer_step = OuterStep(model, args.memory)
        _check_quantized(model, args)
        self.mask_token_id = self._token_id("mask_token_id", processing_class)
        if data_collator is None:
            pad_token_id = self._token_id("pad_token_id", processing_class)
            data_collator = Collator(pad_token_id, padding=args.objective.padding)
        prepare_stream(kwargs.get("train_dataset"), args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        self.guard = NonFiniteGuard()
        self.add_callback(self.guard)
        self.metrics = {"train": StepMetrics(), "eval": StepMetrics()}
        self._micro_batch = (-1, 0)
        self._eval_batch = 0
        self._staging: Path | None = None

    def _token_id(self, name: str, tokenizer: Any) -> int:
        for source in (self.outer_step.backbone.config, tokenizer):
            value = getattr(source, name, None)
            if value is not None:
                return int(value)
        raise DataError(
            f"neither the model's config nor the tokenizer has a {name}; set model.config.{name}"
        )

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train, or continue from a checkpoint (True: the newest whole one in `output_dir`).

        Settings given now hold, also where the checkpoint was written with others.

        Raises:
            CheckpointError: If the checkpoint is not whole, does not fit the model, or holds
                weights only, from which no run can continue.
            NonFiniteError: If the loss becomes inf or nan.
        """
        folder = CheckpointFolder(str(self.args.output_dir))
        if self.args.should_save:
            folder.tidy()
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            newest = folder.newest(_LOGGER.warning)
            if newest is None:
                raise CheckpointError(
                    f"{folder.path}: no checkpoint to resume from; start without resuming"
                )
            resume_from_checkpoint = str(newest)
        elif resume_from_checkpoint:
            reason = defect(Path(resume_from_checkpoint))
            if reason is not None:
                raise CheckpointError(
                    f"{resume_from_checkpoint} cannot be resumed because {reason}; choose another "
                    "checkpoint"
                )
        if resume_from_checkpoint and not any(Path(resume_from_checkpoint).glob("optimizer*")):
            raise CheckpointError(
                f"{resume_from_checkpoint}: no optimizer state, so the run cannot be continued; "
                "choose a checkpoint saved with save_only_model: false"
            )
        self._micro_batch = (-1, 0)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the Trainer write a checkpoint aside, then put it in place whole.

        Raises:
            NonFiniteError: A trained weight is inf or nan: the last checkpoint stays the last.
            CheckpointError: The disk is full.
        """
        step = self.state.global_step
        if not trained_weights_are_finite(model):
            raise NonFiniteError(
                f"weights became inf or nan by step {step}, which is not saved: lower "
                "learning_rate or max_grad_norm and start again, or go on with them from the last "
                "checkpoint, whose weights are finite"
            )
        folder = CheckpointFolder(self._get_output_dir(trial))
        commits = self.args.should_save
        try:
            with folder.writing(
                step, commits=commits, wait=self.accelerator.wait_for_everyone
            ) as self._staging:
                super()._save_checkpoint(model, trial)
                if commits and self.state.best_global_step:
                    self._place_best(folder, self._staging / f"checkpoint-{step}")
        except Exception as error:
            if is_disk_full(error):
                raise CheckpointError(
                    f"the disk is full, so step {step} could not be saved in {folder.path}; "
                    "earlier checkpoints are whole: free some space and resume"
                ) from error
            raise
        finally:
            self._staging = None
        if commits:
            keep = [f"checkpoint-{step}", self.state.best_model_checkpoint or ""]
            folder.rotate(self.args.save_total_limit, keep)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder.path / f"checkpoint-{step}"))

    def _place_best(self, folder: CheckpointFolder, staged: Path) -> None:
        """Have the best checkpoint called by the place it has when all is done."""
        best = folder.path / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir() or best.name == staged.name:
            self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing yet: the folder being written is about to be renamed."""

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # those of the checkpoint hold otherwise
        return position

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that died between its last save and its end would take one step too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        settings = settings_of(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            apply_settings(settings, self.optimizer, self.lr_scheduler)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        try:
            if model is None and isinstance(self.model, DiffusionMaskedLM):
                _load_official(self.model, resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise CheckpointError(
                f"{resume_from_checkpoint} does not fit the model: resume with the model and "
                "adapter that the run was started with"
            ) from error

    def _load_best_model(self) -> None:
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if isinstance(self.model, DiffusionMaskedLM) and not is_sharded:
            _load_official(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        config = cast(MemDLMConfig, self.args)
        return ordered(sampler, config, lambda: int(self.state.epoch or 0))

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run forward and backward of one micro-batch, then take the memory off the model."""
        try:
            return super().training_step(model, *args, **kwargs)
        finally:
            self.outer_step.release()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the weighted MDLM loss of one batch, conditioned on its memory when training."""
        batch = self._clean_batch(inputs)
        device = inputs["input_ids"].device
        config = cast(MemDLMConfig, self.args)
        if model.training:
            memory = config.memory
            indices: tuple[int, ...] = (config.seed, *self._next_micro_batch())
        else:
            memory = replace(config.memory, enabled=False)
            indices = (derive_seed(config.seed, "eval"), self._eval_batch, config.process_index)
            self._eval_batch += 1
        plan = plan_step(batch, config.objective, memory, self.mask_token_id, indices)
        result = self.outer_step.forward(model, plan.to(device), keep_logits=return_outputs)
        self.metrics["train" if model.training else "eval"].add(result, int((~batch.padding).sum()))
        if model.training:
            self.guard.watch(result)
        return (result.loss, {"logits": result.logits}) if return_outputs else result.loss

    def _next_micro_batch(self) -> tuple[int, int, int]:
        """Return (step, micro-batch, rank), counting micro-batches within an optimizer step."""
        step, count = self._micro_batch
        count = count + 1 if step == self.state.global_step else 0
        self._micro_batch = (self.state.global_step, count)
        return (*self._micro_batch, self.args.process_index)

    def _clean_batch(self, inputs: dict[str, Any]) -> CleanBatch:
        host = inputs.get("host")
        if isinstance(host, CleanBatch):
            return host
        for name in ("input_ids", "labels"):
            if name not in inputs:
                raise DataError(
                    f"the batch has no {name}; let the collator give input_ids and labels [B, L], "
                    "labels -100 on the prompt"
                )
        # A collator that is not ours: fetch its labels from the device, at the price of one sync.
        attention_mask = inputs.get("attention_mask")
        padding = None if attention_mask is None else attention_mask.cpu() == 0
        return CleanBatch.from_labels(inputs["input_ids"].cpu(), inputs["labels"].cpu(), padding)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the loss of one evaluation batch, without memory."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate on the same masks every time, and add the unweighted NLL."""
        self._eval_batch = 0
        self.metrics["eval"].pop()
        # A data loader takes its seed from the global generator, which dropout goes on with.
        with preserved_rng(self.args.device):
            output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        cast(dict[str, float], output.metrics).update(
            {f"{prefix}_{name}": value for name, value in self.metrics["eval"].pop().items()}
        )
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this period's step metrics to a training log line."""
        if "loss" in logs:
            logs = {**logs, **self.metrics["train"].pop()}
        super().log(logs, start_time)


def _check_call(args: Any, compute_metrics: Any) -> None:
    if not isinstance(args, MemDLMConfig):
        raise UsageError(
            f"args is a {type(args).__name__}; use MemDLMConfig, which takes the same fields"
        )
    if compute_metrics is not None:
        raise ConfigError(
            "compute_metrics: evaluation returns losses alone, so it would never be called; "
            "read eval_loss and eval_nll, or score answers of memdlm.generate"
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs are visible to one process; launch with `accelerate launch` or "
            "`torchrun --nproc-per-node`, or set CUDA_VISIBLE_DEVICES=0"
        )


def _check_quantized(model: nn.Module, args: MemDLMConfig) -> None:
    if not is_quantized(model):
        return
    if not hasattr(model, "peft_config"):
        raise ConfigError(
            "the model's weights are 4-bit and cannot be trained: give an adapter as peft_config, "
            "or load the model without quantization"
        )
    if args.fp16:
        raise ConfigError("fp16: 4-bit weights compute in bfloat16; set bf16 in its place")


def _load_official(model: DiffusionMaskedLM, folder: str) -> None:
    """Load weights saved in the official layout.

    transformers would look for native key names, find none and go on with what is there.
    """
    model.load_state_dict(load_model(folder, dtype=model.dtype).state_dict())
