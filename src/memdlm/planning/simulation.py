"""One optimizer step of the real Trainer, on tensors that have a shape and a type but no data.

The model is built on the meta device and runs under `FakeTensorMode` as if on the CPU, whose fused
attention keeps what CUDA's keeps: no scores [L, L]. Forward, inner loop, backward, recomputation,
autocast, clipping and the optimizer are the code that trains; nothing is estimated. What is alive
and what is multiplied is read off the operations as they pass.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memdlm.backbones.token_losses import chunk_spans
from memdlm.errors import ConfigError
from memdlm.memory.fast_weights import FastWeights
from memdlm.planning.flops import operation_flops
from memdlm.planning.gpu_kernels import handle_all_at_once, use_gpu_dropout
from memdlm.planning.grouped import grouped_mm_result
from memdlm.planning.ledger import ACTIVATIONS, MemoryLedger
from memdlm.planning.quantized import is_four_bit, store_weight
from memdlm.seeding import preserved_rng
from memdlm.training.config import MemDLMConfig
from memdlm.training.outer_step import OuterStep, StepPlan
from memdlm.training.trainer import MemDLMTrainer

WEIGHTS = "weights"
ADAPTER = "adapter"
CASTS = "cast_weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
FAST = "fast_weights"
LOGITS = "logits"
PARTS = (WEIGHTS, ADAPTER, CASTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, FAST)

T = TypeVar("T")


@dataclass(frozen=True)
class StepFigures:
    """What one optimizer step needs.

    Attributes:
        peak: Bytes of every part in `PARTS` at the moment when their sum is largest.
        largest: The most bytes of every part, each at a moment of its own.
        flops: Matrix products of all its micro-batches.
        num_fast: Fast weights of one memory; 0 without.
        num_memories: Memories of one micro-batch; 0 without.
    """

    peak: dict[str, int]
    largest: dict[str, int]
    flops: int
    num_fast: int
    num_memories: int

    @property
    def peak_bytes(self) -> int:
        """Sum of all parts."""
        return sum(self.peak.values())


def simulate_step(
    model: nn.Module,
    adapter: frozenset[str],
    arguments: MemDLMConfig,
    plan: StepPlan,
    *,
    is_gpu: bool = True,
) -> StepFigures:
    """Run one optimizer step without data.

    Args:
        model: A backbone on the meta device, PEFT adapter included; it is used up.
        adapter: Names of the parameters that belong to the adapter.
        arguments: Settings of the Trainer, with `use_cpu`.
        plan: One micro-batch, on the CPU.
        is_gpu: Keep what the kernels of a GPU keep where they differ; see `gpu_kernels`.

    Raises:
        ConfigError: An optimizer or another setting that cannot run without data.
    """
    # Real tensors may come in: tables that a library makes for itself, a few hundred bytes each.
    ledger, mode = MemoryLedger(), FakeTensorMode(allow_non_fake_inputs=True)
    with preserved_rng(torch.device("cpu")):
        trainer = _SimulatedTrainer(model, arguments, ledger, without_data(plan, mode))
        with mode:
            for tensor in give_shapes(model):
                ledger.label(tensor, WEIGHTS)
            _label_parameters(model, adapter, ledger)
        _enable_checkpointing(trainer)
        optimizer = _prepare_optimizer(trainer)
        if is_gpu:
            use_gpu_dropout(model)
            handle_all_at_once(optimizer)
        with mode:
            _take_first_step(trainer, optimizer, ledger)
            wrapped = trainer.accelerator.prepare_model(trainer.network, device_placement=False)
            with _Watch(ledger, _logit_shapes(plan, trainer)) as watch:
                flops = _run(trainer, wrapped, optimizer, watch)
    peak, largest = ledger.peak(), ledger.largest()
    step = trainer.watched_step
    return StepFigures(
        peak={part: peak.get(part, 0) for part in PARTS},
        largest={part: largest.get(part, 0) for part in PARTS},
        flops=flops,
        num_fast=step.num_fast,
        num_memories=0 if plan.inner is None else plan.num_rows,
    )


class _WatchedStep(OuterStep):
    """The outer step, telling the ledger which tensors are fast weights or their gradients."""

    def __init__(self, model: nn.Module, config: MemDLMConfig, ledger: MemoryLedger) -> None:
        super().__init__(model, config.memory)
        self.ledger = ledger
        self.num_fast = 0
        self._fast: FastWeights | None = None

    def initial_fast_weights(self, plan: StepPlan) -> FastWeights:
        self._fast = super().initial_fast_weights(plan)
        self.num_fast = sum(t[0].numel() for t in self._fast.tensors.values())
        self.watch(0, self._fast.tensors)
        return self._fast

    def watch(self, step: int, grads: Mapping[str, torch.Tensor]) -> None:
        """Label inner gradients, and the fast weights that they are of."""
        assert self._fast is not None
        for tensor in (*grads.values(), *self._fast.tensors.values()):
            self.ledger.label(tensor, FAST)

    def release(self) -> None:
        super().release()
        self._fast = None


class _SimulatedTrainer(MemDLMTrainer):
    """The Trainer on one given micro-batch, its model staying where it is."""

    def __init__(
        self, model: nn.Module, config: MemDLMConfig, ledger: MemoryLedger, plan: StepPlan
    ) -> None:
        backbone = OuterStep(model, replace(config.memory, enabled=False)).backbone
        if backbone.config.mask_token_id is None:
            backbone.config.mask_token_id = 0  # the tokenizer would have given it
        super().__init__(model, config, data_collator=list)
        self.watched_step = self.outer_step = _WatchedStep(model, config, ledger)
        self.network, self.plan = model, plan
        self.current_gradient_accumulation_steps = config.gradient_accumulation_steps

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        pass

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        observe = self.watched_step.watch
        result = self.outer_step.forward(model, self.plan, observe=observe)
        if result.fast_weights is not None:
            observe(0, result.fast_weights.tensors)
        return result.loss


class _Watch(TorchDispatchMode):
    """Hands every operation to the ledger and sums FLOPs."""

    def __init__(self, ledger: MemoryLedger, logit_shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.ledger, self.logit_shapes = ledger, logit_shapes
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # more than half of all calls
            return func(*args)
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            out = grouped_mm_result(*args[:3])
        else:
            out = func(*args, **(kwargs or {}))
        self.flops += operation_flops(func, args, kwargs or {}, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and self.ledger.hold(tensor):
                if tuple(tensor.shape) in self.logit_shapes:
                    self.ledger.label(tensor, LOGITS)
                elif self._is_cast_weight(func, args):
                    self.ledger.label(tensor, CASTS)
        return out

    def _is_cast_weight(self, func: Any, args: tuple[Any, ...]) -> bool:
        is_cast = func is torch.ops.aten._to_copy.default
        return is_cast and self.ledger.label_of(args[0]) in (WEIGHTS, ADAPTER)


def _run(trainer: _SimulatedTrainer, model: nn.Module, optimizer: Any, watch: _Watch) -> int:
    """Run one optimizer step as `Trainer` does, and return its FLOPs.

    Of accumulated micro-batches the second finds what all later ones find, so two suffice.
    """
    accelerator, num_micro_batches = trainer.accelerator, trainer.args.gradient_accumulation_steps
    num_run = min(num_micro_batches, 2)
    for index in range(num_run):
        accelerator.gradient_state._set_sync_gradients(index == num_run - 1)
        trainer.training_step(model, {"input_ids": trainer.plan.noisy})
    flops = watch.flops // num_run * num_micro_batches
    before = watch.flops
    if trainer.args.max_grad_norm > 0:
        accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    optimizer.step()
    model.zero_grad()
    return flops + watch.flops - before


def _prepare_optimizer(trainer: _SimulatedTrainer) -> Any:
    """Return the optimizer that the Trainer would make, without states yet."""
    try:
        with warnings.catch_warnings():
            # transformers tells shared embeddings by their address, to log how many there are.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            optimizer = trainer.create_optimizer()
    except (ImportError, ValueError) as error:  # its package is not installed, ...
        raise ConfigError(f"training.optim: {' '.join(str(error).split())}") from error
    return trainer.accelerator.prepare_optimizer(optimizer, device_placement=False)


def _take_first_step(trainer: _SimulatedTrainer, optimizer: Any, ledger: MemoryLedger) -> None:
    """Give the optimizer the states that it has from its second step on."""
    trained = [p for p in trainer.network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(
            lambda p: ledger.label(cast(torch.Tensor, p.grad), GRADIENTS)
        )
        parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # whatever its code does with values that are not there
        reason = " ".join(str(error).split()) or type(error).__name__
        name = getattr(trainer.args.optim, "value", trainer.args.optim)
        raise ConfigError(
            f"training.optim: {name} cannot be planned: it does not run without data "
            f"({reason[:120]}); use adamw_torch_fused or adamw_bnb_8bit"
        ) from error
    trainer.network.zero_grad()
    for state in optimizer.state.values():
        for tensor in tree_leaves(state):
            if isinstance(tensor, torch.Tensor):
                ledger.label(tensor, OPTIMIZER)


def _enable_checkpointing(trainer: _SimulatedTrainer) -> None:
    """Turn on gradient checkpointing as `Trainer.train` does before its first step."""
    if not trainer.args.activation_checkpointing:
        return
    kwargs = dict(cast(Any, trainer.args.activation_checkpointing_kwargs) or {})
    if kwargs.pop("offload", False):
        raise ConfigError(
            "training.gradient_checkpointing_kwargs: offload moves activations to the host, which "
            "cannot be planned; leave it out"
        )
    every = kwargs.pop("every_n_layers", 1)
    cast(Any, trainer.network).activation_checkpointing_enable(
        activation_checkpointing_kwargs=kwargs or None, every_n_layers=every
    )


def give_shapes(model: nn.Module) -> list[torch.Tensor]:
    """Replace meta tensors by fake ones of the CPU, shared ones by shared ones.

    Returns:
        The tensors of 4-bit layers, of which not all are parameters.
    """
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            shaped = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
            )
            if isinstance(tensor, nn.Parameter):
                shaped = nn.Parameter(shaped, tensor.requires_grad)
            made[id(tensor)] = shaped
        return made[id(tensor)]

    originals = [*model.parameters(), *model.buffers()]  # alive, so that ids stay theirs
    unshaped = {id(tensor) for tensor in originals}
    stored = []
    for module in model.modules():
        if is_four_bit(module):
            stored += store_weight(module)
        for tensors in cast(list[dict[str, Any]], [module._parameters, module._buffers]):
            tensors.update(
                {n: fake(t) for n, t in tensors.items() if t is not None and id(t) in unshaped}
            )
    del originals
    return stored


def _label_parameters(model: nn.Module, adapter: frozenset[str], ledger: MemoryLedger) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        ledger.label(tensor, ADAPTER if name in adapter else WEIGHTS)


def _logit_shapes(plan: StepPlan, trainer: _SimulatedTrainer) -> set[tuple[int, ...]]:
    """Return the shapes [n, V] of the logits of every chunk of both loops."""
    supervisions = [plan.supervision]
    supervisions += [step.supervision for step in plan.inner.steps] if plan.inner else []
    size = trainer.outer_step.backbone.config.vocab_size
    chunks = [
        span
        for supervision in supervisions
        for span in chunk_spans(len(supervision.valid), size, plan.logits_budget)
    ]
    return {(span.stop - span.start, size) for span in chunks}


def without_data(value: T, mode: FakeTensorMode) -> T:
    """Return a copy of nested dataclasses and tuples whose tensors have lost their data."""
    result: Any = value
    if isinstance(value, torch.Tensor):
        result = mode.from_tensor(value)
    elif isinstance(value, tuple):
        result = tuple(without_data(item, mode) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        result = type(value)(
            **{f.name: without_data(getattr(value, f.name), mode) for f in fields(value)}
        )
    return cast(T, result)
