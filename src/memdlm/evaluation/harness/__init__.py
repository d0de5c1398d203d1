"""The bridge to lm-evaluation-harness: its model interface, answered by memdlm."""
