"""Ways of answering the requests of one task: the published one, ours, and ours in processes.

The published way: one request at a time; as many forwards as the task has tokens, logits at every
position; the operations of the official code, experts in a Python loop; LLaDA2.x without keys and
values kept; PyTorch's own matrix products. Its memories are written by our own inner loop, which
favours it. Ours: `DiffusionLM`, with the matrix products of `memdlm eval`.
"""

import contextlib
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.speed.published_operations import published_operations
from memdlm.backbones.loading import load_model
from memdlm.backbones.tiny import TINY_FAMILIES, build_tiny
from memdlm.backbones.tokenizers import load_tokenizer
from memdlm.cli.host_matmul import speed_up_products
from memdlm.cli.host_memory import keep_freed_memory
from memdlm.cli.libraries import prepare_libraries
from memdlm.evaluation.config import EvalConfig
from memdlm.evaluation.harness.model import DiffusionLM
from memdlm.evaluation.harness.sharding import Shard, ShareDone
from memdlm.evaluation.prepared import prepare
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.quickstart.start import load_start
from memdlm.sampling.config import SamplingConfig

TASK = "generated_variable_tracking"


@dataclass(frozen=True)
class Case:
    """What is asked, of which network.

    Attributes:
        family: A tiny family, `quickstart` for the quickstart's start, which is a dense LLaDA, or
            the folder of a trained model.
        words: Lengths of the prompts, a task each, one after the other as in `memdlm eval`.
        has_memory: Whether a memory is written from each prompt.
        budget: New tokens of an answer; 0 for the longest answer and one.
        num_samples: Requests of each length.
    """

    family: str
    words: tuple[int, ...]
    has_memory: bool
    budget: int
    num_samples: int


class Subject:
    """A case's network and requests, the same in every process that makes them."""

    def __init__(self, case: Case) -> None:
        """Build the network and the requests."""
        self.case = case
        self.model: Any
        self.model, self.tokenizer = load_start()
        if case.family in TINY_FAMILIES:
            self.model = build_tiny(case.family, self.tokenizer).eval()
        elif case.family != "quickstart":
            self.model = load_model(case.family)
            self.tokenizer = load_tokenizer(case.family)
        self.memory = MemoryConfig(learning_rate=0.02) if case.has_memory else None
        self.tasks = [self._requests(f"{TASK}@{words}") for words in case.words]

    def _requests(self, task: str) -> list[Any]:
        config = EvalConfig(tasks=(task,), num_samples=self.case.num_samples)
        requests = prepare(task, self.tokenizer, config, seed=0).requests
        for request in requests:
            text, arguments = request.args
            if self.case.budget:
                request.arguments = (text, {**arguments, "max_gen_toks": self.case.budget})
        return requests

    @property
    def num_requests(self) -> int:
        """Requests of all lengths."""
        return sum(map(len, self.tasks))

    @property
    def num_new_tokens(self) -> int:
        """New tokens that a request grants, the most of all."""
        return max(task[0].args[1]["max_gen_toks"] for task in self.tasks)

    def harness(self, batch_size: int, **settings: Any) -> DiffusionLM:
        """Return our way of answering."""
        return DiffusionLM(
            self.model, self.tokenizer, memory=self.memory, batch_size=batch_size, **settings
        )

    def ours(self, batch_size: int) -> list[str]:
        """Answer all requests our way."""
        products = speed_up_products()
        try:
            return self.answer_tasks(self.harness(batch_size))
        finally:
            if products is not None:
                products.end()

    def published(self) -> list[str]:
        """Answer all requests the published way."""
        with published_operations():
            if self.case.family == "llada2":  # blocks of 32, each to its end, nothing kept
                sampling = SamplingConfig(cache="none", stop_early=False)
                return self.answer_tasks(self.harness(1, sampling=sampling))
            return [answer for task in self.tasks for answer in self._one_by_one(task)]

    def answer_tasks(self, lm: DiffusionLM) -> list[str]:
        """Return the answers of `lm` to one task after the other, without those others gather."""
        answers = []
        for task in self.tasks:
            with contextlib.suppress(ShareDone):
                answers += lm.generate_until(task)
        return answers

    def _one_by_one(self, requests: list[Any]) -> list[str]:
        subject, answers = self.harness(1).subject, []
        for seed, request in enumerate(requests):
            text, arguments = request.args
            prompt, num_new = torch.tensor(subject.encode(text)), arguments["max_gen_toks"]
            if self.memory is None:
                tokens = unmask_one_by_one(self.model, prompt, num_new)
            else:
                writer = ParametricMemory(self.model, self.memory)
                writer.write(prompt[None], seed=seed)
                with writer.attached():
                    tokens = unmask_one_by_one(self.model, prompt, num_new)
                writer.erase()
            ends = (tokens == self.tokenizer.eos_token_id).nonzero()
            kept = tokens[: int(ends[0])] if len(ends) else tokens
            answers.append(str(self.tokenizer.decode(kept, skip_special_tokens=True)))
        return answers


@torch.no_grad()
def unmask_one_by_one(model: Any, prompt: torch.Tensor, num_new_tokens: int) -> torch.Tensor:
    """Return the answer [N] to one prompt [L]: LLaDA's greedy sampler, written plainly.

    Every step runs the whole canvas with logits everywhere and commits the slot whose best token is
    the most probable (low-confidence remasking, steps = block = N).
    """
    mask_id = model.config.mask_token_id
    canvas = torch.cat([prompt, prompt.new_full((num_new_tokens,), mask_id)])[None]
    for _ in range(num_new_tokens):
        logits = model(canvas).logits.float()
        logits[..., mask_id] = float("-inf")
        confidence, best = logits.softmax(-1).max(-1)
        confidence = confidence.masked_fill(canvas != mask_id, -1.0)
        place = int(confidence.argmax())
        canvas[0, place] = best[0, place]
    return canvas[0, len(prompt) :]


class Workers:
    """Processes of one thread each that answer a case together, as `memdlm eval --processes` does.

    They are started once, since a program's start is not what is measured; each round has a cache
    of its own, in which their answers meet.
    """

    def __init__(self, case: Case, count: int, batch_size: int) -> None:
        """Start them, and wait until all have the network."""
        context = multiprocessing.get_context("spawn")
        self._lines: list[Connection] = []
        for index in range(count):
            ours, theirs = context.Pipe()
            arguments = (theirs, case, Shard(index, count), batch_size)
            context.Process(target=_work, args=arguments, daemon=True).start()
            self._lines.append(ours)
        for line in self._lines:
            line.recv()

    def answer(self) -> list[str]:
        """Answer all requests; done when every process is."""
        with tempfile.TemporaryDirectory() as folder:
            for line in self._lines:
                line.send(folder)
            answers: list[list[str]] = [line.recv() for line in self._lines]
        return answers[0]

    def stop(self) -> None:
        """End the processes."""
        for line in self._lines:
            line.send(None)


def _work(line: Connection, case: Case, shard: Shard, batch_size: int) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    prepare_libraries()
    subject = Subject(case)
    line.send("ready")
    while (folder := line.recv()) is not None:
        lm = subject.harness(batch_size, shard=shard, cache=folder, settings="benchmark")
        line.send(subject.answer_tasks(lm))


def rest() -> None:
    """Let the threads of the last computation fall asleep: for a while they wait by spinning."""
    time.sleep(0.3)
