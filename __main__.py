"""`python -m limbeck COMMAND ...` is `limbeck COMMAND ...`; launchers take it as `torchrun -m limbeck COMMAND ...`."""

import sys

from .scripts.run.main import main

if __name__ == "__main__":
    sys.exit(main())
