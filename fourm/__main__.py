"""`python -m fourm` is `fourm`."""

from fourm.cli import main

main()
