"""`python -m lltm_ray.cli`."""

from lltm_ray.cli import main

main()
