import dataclasses
from html.parser import HTMLParser

import numpy as np
import pytest

from dmsec_jax.metrics.extraction import Interval, Matches, Summary, rate_interval
from dmsec_jax.report.extraction import Extraction, Method, Threshold

TAU = 0.5
SHA = "0123456789abcdef" * 4


def summary_of(scores, nulls):
    def interval(values):
        return Interval(float(np.mean(values)), float(np.min(values)), float(np.max(values)), len(values))

    taus = (0.6, 0.7, TAU)
    rates = lambda s: {tau: rate_interval(np.asarray(s) >= tau) for tau in taus}
    has = nulls is not None
    return Summary(
        interval(scores), rates(scores), interval(nulls) if has else None, rates(nulls) if has else None, None, None
    )


def pictures(count, seed=0, side=8):
    return np.random.default_rng(seed).uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


def method(name="finextract", scores=(0.9, 0.8, 0.7, 0.2), nulls=(0.1, 0.2, 0.3, 0.1), **changes):
    """Four training pictures, each with its own extracted picture of the same index, and the hold-outs likewise."""
    scores = np.asarray(scores, np.float64)
    matches = lambda values: Matches(np.arange(len(values)) % len(scores), np.asarray(values, np.float64))
    fields = {
        "name": name,
        "label": name.title(),
        "description": f"What {name} does.",
        "evaluations": 50,
        "generated": 40,
        "finite": 40,
        "extracted": pictures(len(scores), 1),
        "sizes": np.arange(len(scores), 0, -1),
        "tightness": np.full(len(scores), 0.75),
        "base_similarity": np.full(len(scores), 0.1),
        "matches": matches(scores),
        "holdout_matches": None if nulls is None else matches(nulls),
        "clustered": summary_of(scores, nulls),
        "everything": summary_of(scores, nulls),
        "samples": pictures(3, 2),
    }
    return Method(**(fields | changes))


def failed(name="finextract"):
    """A method none of whose images was finite."""
    nothing = dict.fromkeys(("base_similarity", "matches", "holdout_matches", "clustered", "everything"))
    empty = {"extracted": pictures(0), "sizes": np.zeros(0, int), "tightness": np.zeros(0)}
    return method(name, finite=0, samples=np.full((2, 8, 8, 3), np.nan, np.float32), **nothing, **empty)


def extraction(methods=None, **changes):
    fields = {
        "prompt": "a painting",
        "base": "nano",
        "tuned": "nano, 600 steps",
        "pictures": pictures(4),
        "names": tuple(f"train-{i}.png" for i in range(4)),
        "holdouts": pictures(4, 3),
        "holdout_names": tuple(f"held-{i}.png" for i in range(4)),
        "methods": methods or (method(), method("plain", (0.6, 0.1, 0.1, 0.1))),
        "threshold": Threshold(value=TAU, false_match_rate=0.01, pairs=1000),
        "command": "dmsec extract --seed 0",
        "config": {"w": 3.0},
        "seeds": {"sampling": 0},
        "seconds": {"sampling": 1.5},
        "inputs": {"model": SHA},
    }
    return Extraction(**(fields | changes))


def without_holdouts(**changes):
    return extraction(methods=(method(nulls=None),), holdouts=None, holdout_names=(), **changes)


class Seen(HTMLParser):
    """Tags with their attributes, and the text a reader sees."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.quiet = [], "", 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.quiet += tag in ("style", "script")

    def handle_endtag(self, tag):
        self.quiet -= tag in ("style", "script")

    def handle_data(self, data):
        self.text += "" if self.quiet else data

    def all(self, tag):
        return [attributes for found, attributes in self.tags if found == tag]

    @property
    def words(self):
        return " ".join(self.text.split())


@dataclasses.dataclass(frozen=True)
class Made:
    extraction = staticmethod(extraction)
    method = staticmethod(method)
    failed = staticmethod(failed)
    without_holdouts = staticmethod(without_holdouts)
    pictures = staticmethod(pictures)
    seen = Seen


@pytest.fixture(scope="session")
def made():
    """Makers of small reports, and a reader of pages."""
    return Made
