"""``python -m gradcomp``; what torchrun starts on each host."""

import sys

from gradcomp.cli import main

if __name__ == "__main__":
    sys.exit(main())
