"""`python -m pdlab` is `pdlab`."""

from pdlab.cli import main

main()
