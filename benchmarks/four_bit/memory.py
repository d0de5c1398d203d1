"""Memory of a 4-bit model: at rest, at the peak of loading, at the peak of a step. Linux, CPU.

    python -m benchmarks.four_bit.memory

Writes a bfloat16 checkpoint of random weights, then loads it in fresh processes, unquantised and in
4 bits, and runs one forward and backward of a short input there. Memory is the process's anonymous
memory (RssAnon) beyond what it had after its imports: the checkpoint, which is mapped and not read
into memory, does not count. Freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_).
It is read every millisecond. Prints one JSON object with all sizes in MiB.
"""

import argparse
import gc
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 2**20
SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "max_position_embeddings": 512,
    "vocab_size": 2048,
    "mask_token_id": 2047,
    "pad_token_id": 2046,
    "eos_token_id": 2046,
}
TOKENS = 32


def anonymous_bytes(process: int | str = "self") -> int:
    """Return the anonymous memory of a process."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status has no RssAnon: this benchmark needs Linux")


class Peak:
    """The most anonymous memory while a block runs, in bytes."""

    def __enter__(self) -> "Peak":
        # A process of its own: a thread would wait for Python's lock until an operator has ended.
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.four_bit.memory", "--watch", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._watcher.stdout is not None
        self._watcher.stdout.readline()  # it has begun
        return self

    def __exit__(self, *unused: object) -> None:
        self.value = int(self._watcher.communicate("")[0])


def watch(process: int) -> None:
    """Print the most anonymous memory of `process` until standard input ends."""
    most = anonymous_bytes(process)
    print("watching", flush=True)
    while not select.select([sys.stdin], [], [], 0.001)[0]:
        most = max(most, anonymous_bytes(process))
    print(max(most, anonymous_bytes(process)))


def write_checkpoint(folder: Path, num_layers: int) -> None:
    """Write a bfloat16 model of `SIZES` with random weights."""
    import torch

    from memdlm.backbones.llada_moe import LLaDAMoEConfig, LLaDAMoEForMaskedLM

    torch.set_default_dtype(torch.bfloat16)
    config = LLaDAMoEConfig(**{**SIZES, "num_hidden_layers": num_layers})
    LLaDAMoEForMaskedLM(config).save_pretrained(folder)


def measure(folder: Path, kind: str) -> dict[str, Any]:
    """Load `folder` in this process and run it once; sizes in MiB."""
    import torch

    from memdlm.backbones.loading import load_model
    from memdlm.backbones.quantization import report, stored_bytes

    if kind != "none":
        import bitsandbytes  # noqa: F401 - imported here, so as not to be counted
    torch.randn(64, 64) @ torch.randn(64, 64)
    before = anonymous_bytes()
    with Peak() as loading:
        model = load_model(folder, quantization=kind)
    gc.collect()
    rest = anonymous_bytes()
    model.requires_grad_(False)
    _run(model)  # the first run makes the libraries allocate what they keep
    warm = anonymous_bytes()
    with Peak() as running:
        _run(model)
    told = report(model)
    found = {
        "weights_millions": told.total_weights / 1e6,
        "quantized_millions": told.quantized_weights / 1e6,
        "quantized": told.quantized_bytes / MIB,
        "kept": told.kept_bytes / MIB,
        "at_rest": (rest - before) / MIB,
        "peak_of_loading": (loading.value - before) / MIB,
        "transient_of_loading": (loading.value - rest) / MIB,
        "transient_of_running": (running.value - warm) / MIB,
    }
    if told.quantized_weights:
        found["bits_per_quantized_weight"] = told.quantized_bytes * 8 / told.quantized_weights
        found["predicted"] = stored_bytes(told.quantized_weights, told.double) / MIB
    return {name: round(value, 3) for name, value in found.items()}


def _run(model: Any) -> None:
    """Run forward and backward of a short input."""
    import torch

    tokens = torch.arange(TOKENS)[None]
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.float().sum().backward()


def compare(num_layers: int) -> dict[str, Any]:
    """Measure both kinds in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        _spawn("--write", folder, "--layers", str(num_layers))
        return {
            kind: json.loads(_spawn("--read", folder, "--kind", kind)) for kind in ("none", "nf4")
        }


def _spawn(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.four_bit.memory", *arguments]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return done.stdout


def main() -> None:
    """Run the comparison, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--watch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.watch is not None:
        watch(given.watch)
    elif given.write is not None:
        write_checkpoint(given.write, given.layers)
    elif given.read is not None:
        print(json.dumps(measure(given.read, given.kind)))
    else:
        print(json.dumps(compare(given.layers), indent=2))


if __name__ == "__main__":
    main()
