"""Make the quickstart's starting checkpoint: `python -m memdlm.quickstart.make_start FOLDER`.

Writes the model in LLaDA's official layout, its tokenizer, and `pretraining.json` (settings and
log). Two heads of width 32 and a large rotary base leave many slowly turning dimensions, in which
tokens can be matched over several hundred places.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memdlm.backbones.llada import LLaDAForMaskedLM
from memdlm.backbones.tiny import TinySizes, tiny_config
from memdlm.data.readers import read_records
from memdlm.data.tasks import vocabulary
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.quickstart.pretraining import PretrainingConfig, pretrain
from memdlm.seeding import derive_seed, preserved_rng

START_SIZES: dict[str, Any] = {
    "width": 64,
    "num_layers": 4,
    "num_heads": 2,
    "mlp_width": 192,
    "init_std": 0.08,
}
ROTARY_BASE = 500_000.0
"""As in LLaDA-8B."""


def build_start(seed: int = 0, texts: Iterable[str] = ()) -> tuple[Any, Any]:
    """Return the quickstart's model with random weights, and the tokenizer of all task words.

    Words of `texts` are known besides, for a start on other data.
    """
    tokenizer = build_word_tokenizer([" ".join(vocabulary())], extra_words=texts)
    config = tiny_config(
        "llada",
        TinySizes(**START_SIZES),
        ROTARY_BASE,
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with preserved_rng(torch.device("cpu")):
        torch.manual_seed(derive_seed(seed, "tiny_weights"))
        return LLaDAForMaskedLM(config), tokenizer


def make_start(
    output_dir: str | Path,
    config: PretrainingConfig | None = None,
    on_log: Callable[[dict[str, float]], None] | None = None,
    texts: Iterable[str] = (),
) -> None:
    """Pretrain a fresh model and write it, its tokenizer and `pretraining.json` to a folder."""
    config = config or PretrainingConfig()
    model, tokenizer = build_start(config.seed, texts)
    log = pretrain(model, tokenizer, config, on_log)
    output = Path(output_dir)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    record = {
        "settings": asdict(config),
        "sizes": START_SIZES,
        "rotary_base": ROTARY_BASE,
        "torch": str(torch.__version__),
        "num_threads": torch.get_num_threads(),
        "log": log,
    }
    (output / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Read the folder from the command line, pretrain, and print the log as JSON lines."""
    parser = argparse.ArgumentParser(description="Make the quickstart's starting checkpoint.")
    parser.add_argument("output_dir", help="Folder to write the checkpoint to.")
    parser.add_argument(
        "--words-of",
        metavar="FILE",
        default=[],
        nargs="*",
        help="Know the words of these files too (any format that training reads).",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, texts and masks.")
    arguments = parser.parse_args()
    texts = [
        str(value)
        for file in arguments.words_of
        for record in read_records(file)
        for value in record.values.values()
    ]
    make_start(
        arguments.output_dir,
        PretrainingConfig(seed=arguments.seed),
        on_log=lambda entry: print(json.dumps(entry), flush=True),
        texts=texts,
    )


if __name__ == "__main__":
    main()
