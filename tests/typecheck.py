"""The type checker that tests put on every function of dmsec_jax: beartype, reading two annotations as jax does.

A `float` may be traced, since configs keep their floats as pytree leaves; a dtype may be given by name or scalar type.
"""

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import Array, Float

scalar = float | int | np.floating | Float[Array, ""]
dtype_like = np.dtype | str | type
checked = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({float: scalar, np.dtype: dtype_like})))
