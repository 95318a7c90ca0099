"""`python -m glann` is the `glann` command."""

from .cli import main

main()
