"""From files to batches: readers, row formats, tokenisation, collation, tokenizers, tasks.

Import from the modules (`memdlm.data.dataset`, `memdlm.data.collation`, ...): this package imports
nothing by itself, so that `import memdlm` stays light.
"""
