"""The score of a linear Gaussian model with hidden causes, from the covariance alone, and its exact fit for a given graph.

    X = X W + e,   Cov(e) = Omega = C + diag(noise),   Sigma = (I - W)^-T Omega (I - W)^-1;   W -> `directed`, C -> `bidirected`

ABIC (Bhattacharya et al., AISTATS 2021) regresses each variable on its parents and on pseudo-variables Z of its siblings, taken at the last
iterate as in residual iterative conditional fitting (Drton, Eichler, Richardson, JMLR 2009):

    LS = 1 / (2 n) sum_i |X_i - X W_i - Z^(i) C_i|^2,   Z^(i) = e_-i (Omega_-i,-i)^-1

With K = Omega^-1 at the last iterate, Q = K C and U = Q - K diag(Q_ii / K_ii), the column Z^(i) C_i is X (I - W_last) U_i: so

    LS = 1/2 tr(R^T S R),   R = (I - W) - (I - W_last) U

needs one inverse and no rows, where the published form has V inverses and V matrices of the size of the data.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmsec_jax.causal.graphs import Edges
from dmsec_jax.core.types import AnyArray

Matrix = Float[AnyArray, "V V"]


class Pseudo(NamedTuple):
    """The iterate at which pseudo-variables are taken."""

    directed: Matrix
    precision: Matrix
    """K, of the errors."""


class Fit(NamedTuple):
    """A model of maximal likelihood for its graph."""

    directed: Matrix
    omega: Matrix
    bic: Float[AnyArray, ""]


def pseudo(directed: Matrix, bidirected: Matrix, covariance: Matrix) -> Pseudo:
    """Pseudo-variables at an iterate; noise variances are those of the residuals, raised where C would not leave Omega positive definite.

    The lift (diagonal at least 1.01 times the row sum of |C|) differs from the reference code, which inverts whatever it meets.
    """
    residual = jnp.eye(len(directed)) - directed
    noise = jnp.einsum("ki,kl,li->i", residual, covariance, residual)
    noise = jnp.maximum(noise, 1.01 * jnp.abs(bidirected).sum(axis=1))
    return Pseudo(directed, jnp.linalg.inv(bidirected + jnp.diag(noise)))


def least_squares(directed: Matrix, bidirected: Matrix, covariance: Matrix, at: Pseudo) -> Float[Array, ""]:
    """LS, quadratic in (W, C); half the sum of residual variances."""
    one = jnp.eye(len(directed), dtype=covariance.dtype)
    regressed = at.precision @ bidirected
    regressed = regressed - at.precision * (jnp.diagonal(regressed) / jnp.diagonal(at.precision))
    residual = one - directed - (one - at.directed) @ regressed
    return (residual * (covariance @ residual)).sum() / 2


def l0(weights: Float[AnyArray, "..."], num_rows: float | Int[AnyArray, ""]) -> Float[Array, "..."]:
    """tanh(log(n) / 2 |w|): nearly 1 for an edge and 0 for none, the smooth count of ABIC."""
    return jnp.tanh(jnp.log(jnp.asarray(num_rows, jnp.float32)) / 2 * jnp.abs(weights))


def bic(directed: Matrix, omega: Matrix, covariance: Matrix, num_rows: float | Int[AnyArray, ""]) -> Float[Array, ""]:
    """-2 log-likelihood + log(n) x parameters of an acyclic model: edges and V variances; as `metrics.graph.bic`."""
    size = len(directed)
    factor = jnp.linalg.cholesky(omega)
    residual = jnp.eye(size) - directed
    errors = residual.T @ covariance @ residual
    fit = 2 * jnp.log(jnp.diagonal(factor)).sum() + jnp.trace(jax.scipy.linalg.cho_solve((factor, True), errors))
    edges = (directed != 0).sum() + (jnp.triu(omega, 1) != 0).sum()
    rows = jnp.asarray(num_rows, jnp.float32)
    return rows * (fit + size * jnp.log(2 * jnp.pi)) + jnp.log(rows) * (edges + size)


def refit(
    directed: Edges,
    bidirected: Edges,
    covariance: Matrix,
    num_rows: float | Int[AnyArray, ""],
    *,
    max_sweeps: int = 50,
    tolerance: float = 1e-5,
) -> Fit:
    """Residual iterative conditional fitting of a bow-free graph, one vertex after the other: the likelihood never falls.

    Vertices without i <-> j are regressed on their parents once. A sweep over the others costs O(V^3) each.
    """
    parents, siblings = jnp.asarray(directed) != 0, jnp.asarray(bidirected) != 0
    size = len(covariance)
    one = jnp.eye(size)
    weights = jax.lax.map(lambda i: _regress(one, one[i], parents[:, i], covariance), jnp.arange(size)).T
    residual = one - weights
    noise = jnp.einsum("ki,kl,li->i", residual, covariance, residual)
    has_sibling = siblings.any(axis=1)
    order = jnp.argsort(~has_sibling)  # those with siblings first

    def update(k, model):
        weights, omega = model
        i = order[k]
        precision = jnp.linalg.inv(omega)
        rest = precision - jnp.outer(precision[i], precision[i]) / precision[i, i]  # inverse without i
        design = jnp.where(parents[:, i], one, jnp.where(siblings[:, i], (one - weights) @ rest, 0.0))
        found = _regress(design, one[i], parents[:, i] | siblings[:, i], covariance)
        shared = jnp.where(siblings[:, i], found, 0.0)
        left = one[i] - design @ found
        variance = left @ covariance @ left + shared @ rest @ shared
        omega = omega.at[i].set(shared).at[:, i].set(shared).at[i, i].set(variance)
        return weights.at[:, i].set(jnp.where(parents[:, i], found, 0.0)), omega

    def sweep(state):
        count, _, model = state
        new = jax.lax.fori_loop(0, has_sibling.sum(), update, model)
        moved = jnp.maximum(jnp.abs(new[0] - model[0]).max(), jnp.abs(new[1] - model[1]).max())
        return count + 1, moved, new

    def going(state):
        return (state[0] < max_sweeps) & (state[1] > tolerance)

    weights, omega = jax.lax.while_loop(going, sweep, (0, jnp.float32(jnp.inf), (weights, jnp.diag(noise))))[2]
    return Fit(weights, omega, bic(weights, omega, covariance, num_rows))


def _regress(design, target, used, covariance):
    """Coefficients [V] of X target on the used columns of X design; the others are zero."""
    moment = design.T @ covariance @ design * (used[:, None] & used[None])
    ridge = jnp.where(used, 1e-7 * jnp.diagonal(moment), 1.0)
    return jnp.linalg.solve(moment + jnp.diag(ridge), jnp.where(used, design.T @ covariance @ target, 0.0))
