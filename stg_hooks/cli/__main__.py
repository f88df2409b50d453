"""`python -m stg_hooks.cli` is `stg-hooks`."""

from stg_hooks.cli import main

main()
