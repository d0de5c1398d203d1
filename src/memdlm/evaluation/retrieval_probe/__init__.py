"""The retrieval probe: what is answered when the document cannot be looked at."""
