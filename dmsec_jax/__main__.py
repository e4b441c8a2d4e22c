"""`python -m dmsec_jax` is `dmsec`."""

import sys

from dmsec_jax.cli import main

sys.exit(main())
