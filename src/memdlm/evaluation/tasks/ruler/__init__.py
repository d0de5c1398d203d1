"""RULER (Hsieh et al., arXiv 2404.06654) at any length: needles, chains, common and frequent words.

Prompts are lm-eval's, sample by sample, at every length where lm-eval can make them; at shorter
ones, where it does not return, they are made as far as the length holds a document.
"""

from memdlm.evaluation.tasks.ruler.task import RULER

__all__ = ["RULER"]
