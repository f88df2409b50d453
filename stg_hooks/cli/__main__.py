"""`python -m stg_hooks.cli` is `stg-hooks`."""

from stg_hooks.cli import main

if __name__ == "__main__":
    main()
