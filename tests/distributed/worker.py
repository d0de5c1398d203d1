"""One of the two processes that torchrun starts: runs every case, rank 0 saves what came out."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from tests.distributed import steps


def main(output: Path) -> None:
    """Write the records of all cases, and what both ranks hold where they must agree."""
    PartialState(cpu=True)
    torch.set_num_threads(1)
    records = {
        **{f"ddp_{case}": steps.with_trainer(case) for case in steps.CASES},
        **{f"fsdp2_{case}": steps.with_fsdp2(case, steps.shard_by_layer) for case in steps.CASES},
        **{
            f"accelerate_fsdp2_{case}": steps.with_fsdp2(case, steps.shard_by_accelerate)
            for case in steps.CASES
        },
        "memories": {name: steps.shared_memory(name) for name in steps.NORMALISERS},
    }
    torch.save(records, output / f"rank_{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
