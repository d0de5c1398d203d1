"""The training batch that needs the most memory: full rows, every response token masked.

Laid out on the CPU by the same code as any other step (`memdlm.training.outer_step`), only with
t = 1 in place of a random time. Shapes: B batch, L length.
"""

import torch

from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.diffusion.states import CleanBatch
from memdlm.memory.config import MemoryConfig
from memdlm.memory.trajectories import TrajectoryRequest, build_trajectory
from memdlm.seeding import generator
from memdlm.training.outer_step import StepPlan, inner_view, lay_out_step


def worst_step(
    batch_size: int,
    length: int,
    response: int,
    objective: ObjectiveConfig,
    memory: MemoryConfig,
) -> StepPlan:
    """Lay out a step in which the last `response` tokens of every row are masked.

    Args:
        batch_size: Rows B.
        length: Tokens L of every row; none of them is padding.
        response: Maskable tokens of a row, 1 to L.
        objective: Schedule, weights, normaliser, padding.
        memory: With `enabled` off the plan has no inner loop.
    """
    clean = torch.zeros(batch_size, length, dtype=torch.int64)
    maskable = torch.zeros_like(clean, dtype=torch.bool)
    maskable[:, length - response :] = True
    batch = CleanBatch(clean, maskable, torch.zeros_like(maskable))
    t = torch.ones(batch_size)
    mask_token_id = 0  # nothing depends on values here, only on how many positions are masked
    anchor = batch.state(maskable, mask_token_id)
    trajectory = None
    if memory.enabled:
        inner_batch, inner_anchor = inner_view(batch, anchor, objective, mask_token_id)
        draws = generator(0, "trajectory")
        trajectory = build_trajectory(
            TrajectoryRequest(inner_batch, inner_anchor, t, memory, mask_token_id, draws)
        )
    return lay_out_step(batch, anchor, t, trajectory, objective, memory, (0, 0, 0, 0))
