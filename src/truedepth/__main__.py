"""`python -m truedepth`."""

from truedepth.cli.app import main

main()
