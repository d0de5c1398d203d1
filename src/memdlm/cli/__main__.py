"""`python -m memdlm.cli`, which launchers of several processes can start."""

import sys

from memdlm.cli import main

sys.exit(main())
