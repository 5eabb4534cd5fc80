"""`python -m pyllm` is the command `pyllm`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
