"""The random numbers of a RULER task, drawn as lm-eval draws them, without global state."""

import random
from dataclasses import dataclass

import numpy as np

ORDER_SEED = 42
"""RULER's constant seed of everything that is shuffled; no setting changes it."""

_NUMPY_SEED = 1234


@dataclass
class Draws:
    """The generators that stand in for `random` and `numpy.random`.

    Seed s gives what a run of lm-eval gives for the task alone with `--seed s,{1234 + s}`; seed 0
    is its default. In one run of several tasks lm-eval's later tasks continue the generators of the
    earlier ones; here every task begins anew.

    Attributes:
        python: In place of the module `random`.
        numpy: In place of `numpy.random`.
        order: RULER's own generator, which shuffles the lists of common words.
    """

    python: random.Random
    numpy: np.random.RandomState
    order: random.Random

    @classmethod
    def of(cls, seed: int) -> "Draws":
        """Return fresh generators."""
        return cls(
            python=random.Random(seed),
            numpy=np.random.RandomState(_NUMPY_SEED + seed),
            order=random.Random(ORDER_SEED),
        )
