"""`python -m glann` is the `glann` command."""

from .cli.main import main

main()
