"""`python -m dsmoe_jax` is `dsmoe`."""

import sys

from dsmoe_jax.cli import main

sys.exit(main())
