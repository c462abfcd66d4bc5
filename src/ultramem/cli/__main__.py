"""`python -m ultramem.cli`, and `torchrun -m ultramem.cli`."""

from ultramem.cli import main

main()
