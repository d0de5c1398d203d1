"""BABILong (Kuratov et al., arXiv 2406.10149): bAbI facts hidden in book text, then a question.

Prompts are lm-eval's: a description, two fixed examples, the text and the question. The documents
are the benchmark's own from the hub, or hidden here in a text of the user's.
"""

from memdlm.evaluation.tasks.babilong.task import BABILONG

__all__ = ["BABILONG"]
