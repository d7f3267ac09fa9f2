"""`python -m trimtab`, for `accelerate launch -m trimtab train ...`."""

from trimtab.cli import main

main()
