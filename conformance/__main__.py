"""python -m unilabel.conformance: the command `unilabel` without its script."""

from . import main

main()
