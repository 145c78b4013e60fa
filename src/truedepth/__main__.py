"""`python -m truedepth`."""

from truedepth.cli import main

main()
