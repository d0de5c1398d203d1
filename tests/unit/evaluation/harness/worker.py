"""Processes that answer requests, forked from one that has paid for the imports.

Reads one JSON list per line, of jobs {"folder", "shard", "kill", "log"} to run side by side, and
answers with their exit codes when all are gone. `kill` is the batch in which a process kills
itself, 0 for none; the log receives how many batches it computed, and its answers.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdlm.evaluation.harness.generating import GenerationRound
from memdlm.evaluation.harness.sharding import ShareDone
from memdlm.sampling.config import SamplingConfig
from tests.unit.evaluation.harness.asking import MEMORY, PROMPTS, ask, build_lm

SAMPLING = SamplingConfig(temperature=1.0)
REQUESTS = PROMPTS + PROMPTS[:3]


def answer(folder: str, shard: str, kill: int, log: str) -> None:
    """Answer all requests, or die in the middle."""
    compute = GenerationRound.compute
    calls = 0

    def count(self: GenerationRound, places: Sequence[int], divisor: int) -> list[dict[str, Any]]:
        nonlocal calls
        calls += 1
        answers = compute(self, places, divisor)
        if calls == kill:  # computed, and not yet stored
            os.kill(os.getpid(), signal.SIGKILL)
        return answers

    GenerationRound.compute = count  # type: ignore[method-assign]
    lm = build_lm(memory=MEMORY, sampling=SAMPLING, batch_size=2, cache=folder, shard=shard)
    try:
        texts = lm.generate_until(ask(REQUESTS))
    except ShareDone:
        texts = ["share done"]
    Path(log).write_text(json.dumps([calls, texts]))


def serve() -> None:
    """Run jobs until standard input closes."""
    print("ready", flush=True)
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    answer(**job)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    serve()
