"""`python -m glann` is the `glann` command."""

import sys

if not sys.flags.safe_path:  # `-m` puts the working folder first: a `profile.py` in it would be imported as Python's
    del sys.path[0]

from .cli.main import main

main()
