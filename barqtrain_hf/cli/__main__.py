"""``python -m barqtrain_hf.cli``."""

import sys

from barqtrain_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
