"""``python -m hydra_rlhf`` is ``hydra-rlhf``."""

import sys

from hydra_rlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
