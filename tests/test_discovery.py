"""Causal discovery on small tables: the estimator, the command, and the posterior that ships; most with a posterior made by hand."""

import functools
import json

import jax
import numpy as np
import pytest
from sklearn.base import clone

from dmsec_jax import cli, discovery
from dmsec_jax.causal import features
from dmsec_jax.causal.background import Background
from dmsec_jax.checkpoints import skeleton as stored
from dmsec_jax.core.marks import ARROW, CIRCLE, NONE, TAIL
from dmsec_jax.discovery import SPOT
from dmsec_jax.methods import spot
from dmsec_jax.models import skeleton_net

NAMES = ("rain", "sprinkler", "wet", "slip")
SEARCH = spot.Config(num_steps=6, inner_steps=50, learning_rate=0.03)
SHORT = ["--set", "num_steps=6", "inner_steps=50", "learning_rate=0.03", "--restarts", "2"]


def by_hand(strength=8.0, middle=4.2):
    """Logit strength * (z - middle), where z is the feature of the correlation plus the least one given one other: a link has both."""
    net = skeleton_net.EdgeMLP(width=2, depth=1)
    params = jax.tree.map(np.zeros_like, jax.device_get(skeleton_net.init(jax.random.key(0), net, features.COUNT)))
    params["dense_0"]["kernel"][[0, 4], 0] = 1.0
    params["head"]["kernel"][0, 0] = strength
    params["head"]["bias"][0] = -strength * middle
    return stored.Posterior(params, net, {"recipe": {"train": {"rows": [100, 1000], "sizes": [4, 20]}}})


@pytest.fixture(scope="module")
def posterior(tmp_path_factory):
    folder = tmp_path_factory.mktemp("posterior")
    stored.write(folder, by_hand())
    return folder


@functools.cache
def sample(rows=400):
    """rain -> wet <- sprinkler, wet -> slip."""
    rng = np.random.default_rng(0)
    rain, sprinkler, a, b = rng.normal(size=(4, rows))
    wet = rain + sprinkler + 0.5 * a
    return np.stack([5 + rain, sprinkler, 100 * wet, wet + 0.7 * b], axis=1)


class Frame(dict):
    """As much of a data frame as is asked of one."""

    @property
    def columns(self):
        return list(self)


@pytest.fixture(scope="module")
def fitted(posterior):
    model = SPOT(restarts=2, search=SEARCH, posterior=posterior)
    stages = []
    frame = Frame(zip(NAMES, sample().T, strict=True))
    return model.fit(frame, on_step=lambda *at: stages.append(at)), stages


def test_the_collider_and_what_it_causes_are_told(fitted):
    model, _ = fitted
    skeleton = model.pag_ != NONE
    assert np.argwhere(np.triu(skeleton)).tolist() == [[0, 2], [1, 2], [2, 3]]
    assert (model.pag_[0, 2], model.pag_[1, 2]) == (ARROW, ARROW)
    assert (model.pag_[2, 3], model.pag_[3, 2]) == (ARROW, TAIL)
    assert (model.mag_[2, 3], model.mag_[3, 2]) == (ARROW, TAIL)
    # in standard deviations: 1 / sqrt(1 + 1 + 0.25); column 2 is in other units
    assert model.coef_[0, 2] + model.omega_[0, 2] == pytest.approx(1 / 1.5, abs=0.1)


def test_the_outcome_is_named_and_whole(fitted):
    model, stages = fitted
    assert tuple(model.feature_names_in_) == model.names_ == NAMES
    assert model.n_features_in_ == 4
    p = model.edge_probabilities_
    np.testing.assert_array_equal(p, p.T)
    assert (np.diagonal(p) == 0).all()
    assert ((p >= 0) & (p <= 1)).all()
    assert model.bic_ == model.bics_.min()
    assert model.marks_.shape == (3, 4, 4)
    assert model.notes_ == ()
    ended = [at[0] for at in stages if at[1] == at[2]]
    assert ended == ["edge probabilities", "search from 2 starts", "local search", "orientations"]


def test_units_do_not_matter(fitted, posterior):
    """Columns are standardised: scaled and shifted data give the same graph and coefficients."""
    model, _ = fitted
    other = clone(model).fit(sample() * [1, 1e-3, 50, 7] - 3)
    np.testing.assert_array_equal(other.mag_, model.mag_)
    np.testing.assert_allclose(other.coef_, model.coef_, atol=1e-3)
    assert other.names_ == ("x0", "x1", "x2", "x3")


def test_knowledge_binds(posterior):
    known = Background(required=(("slip", "rain"),), forbidden=(("wet", "slip"),), apart=(("sprinkler", "wet"),))
    model = SPOT(restarts=2, search=SEARCH, posterior=posterior, background=known).fit(sample_frame())
    rain, sprinkler, wet, slip = range(4)
    assert (model.mag_[slip, rain], model.mag_[rain, slip]) == (ARROW, TAIL)
    assert (model.pag_[slip, rain], model.pag_[rain, slip]) == (ARROW, TAIL)
    assert model.edge_probabilities_[slip, rain] == 1
    assert model.edge_probabilities_[sprinkler, wet] == 0
    assert model.coef_[wet, slip] == 0
    assert (model.coef_[sprinkler, wet], model.coef_[wet, sprinkler], model.omega_[sprinkler, wet]) == (0, 0, 0)


def test_without_hidden_causes_every_edge_is_directed_or_open_at_both_ends(posterior):
    """The collider and what follows from it are told; of a chain nothing is, unless the order in time is known."""
    rain, sprinkler, wet, slip = range(4)
    model = SPOT(restarts=2, search=SEARCH, posterior=posterior, family="dag").fit(sample_frame())
    for cause, effect in ((rain, wet), (sprinkler, wet), (wet, slip)):
        assert (model.pag_[cause, effect], model.pag_[effect, cause]) == (ARROW, TAIL)
    chain = sample()[:, [rain, wet, slip]]
    model = SPOT(restarts=2, search=SEARCH, posterior=posterior, family="dag").fit(chain)
    assert set(model.pag_[model.pag_ != NONE].tolist()) == {CIRCLE}
    told = model.set_params(background=Background(tiers=(("x0",), ("x1", "x2")))).fit(chain).pag_
    assert (told[0, 1], told[1, 0], told[1, 2], told[2, 1]) == (ARROW, TAIL, ARROW, TAIL)


def sample_frame():
    return Frame(zip(NAMES, sample().T, strict=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"family": "trees"}, "family must be"),
        ({"transform": "log"}, "transform must be"),
        ({"restarts": 0}, "restarts"),
    ],
)
def test_wrong_options_are_named(posterior, options, said):
    with pytest.raises(ValueError, match=said):
        SPOT(posterior=posterior).set_params(**options).fit(sample())


def test_fewer_rows_than_variables_are_shrunk_towards_independence():
    corr = np.corrcoef(np.random.default_rng(0).normal(size=(5, 8)), rowvar=False).astype(np.float32)
    found = discovery.regularised(corr, 5)
    assert np.linalg.eigvalsh(corr).min() < 1e-5
    assert np.linalg.eigvalsh(found).min() > 0.05
    np.testing.assert_array_equal(discovery.regularised(corr, 100), corr)


def test_nearly_equal_columns_end_in_a_finite_graph(posterior):
    data = sample().copy()
    data[:, 3] -= 2 * data[:, 2]
    assert 1e-7 < 1 + np.corrcoef(data[:, 2:], rowvar=False)[0, 1] < 1e-5
    model = SPOT(restarts=2, search=SEARCH, posterior=posterior).fit(data)
    for found in (model.edge_probabilities_, model.coef_, model.omega_, model.bic_):
        assert np.isfinite(found).all()


@pytest.mark.slow  # compiles for another number of variables
def test_fewer_rows_than_variables_end_in_a_finite_graph_and_a_note(posterior):
    data = np.random.default_rng(0).normal(size=(10, 12))
    model = SPOT(restarts=2, search=SEARCH, posterior=posterior).fit(data)
    for found in (model.edge_probabilities_, model.coef_, model.omega_, model.bic_):
        assert np.isfinite(found).all()
    assert any("no more rows than variables" in note for note in model.notes_)


def csv_of(path, values):
    lines = [",".join(NAMES)] + [",".join("" if np.isnan(x) else f"{x:.6g}" for x in row) for row in values]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_command_writes_everything(posterior, tmp_path, capsys):
    values = sample().copy()
    values[:3, 1] = np.nan
    data = csv_of(tmp_path / "garden.csv", values)
    common = ["discover", str(data), "--out", str(tmp_path / "out"), "--posterior", str(posterior), *SHORT]
    assert cli.main(common) == 1
    error = capsys.readouterr().err
    assert "missing values in sprinkler (3 of 400)" in error
    assert "--drop-missing" in error
    assert cli.main([*common, "--drop-missing", "--tiers", "rain,sprinkler", "wet"]) == 0
    assert "rain o-> wet" in capsys.readouterr().out
    out = tmp_path / "out"
    names = {"best.dot", "best.graphml", "graph.dot", "graph.graphml", "graph.svg", "probabilities.svg"}
    assert {path.name for path in out.iterdir()} == names | {"report.html", "result.json"}
    found = json.loads((out / "result.json").read_text())
    assert found["details"]["names"] == list(NAMES)
    assert {(edge["source"], edge["target"]) for edge in found["details"]["edges"]} == {
        ("rain", "wet"),
        ("sprinkler", "wet"),
        ("wet", "slip"),
    }
    page = (out / "report.html").read_text()
    for text in ("3 dropped for missing values", "in time, rain and sprinkler, then wet", "These are hypotheses"):
        assert text in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--required", "rain"], "written as `cause>effect`"),
        (["--columns", "rain", "snow", "wet"], "got snow"),
        (["--tiers", "rain", "snow"], "got snow"),
        (["--set", "steps=3"], "unknown key 'steps'"),
    ],
)
def test_a_wrong_command_line_is_one_line(tmp_path, capsys, posterior, options, said):
    data = csv_of(tmp_path / "garden.csv", sample())
    assert cli.main(["discover", str(data), "--out", str(tmp_path), "--posterior", str(posterior), *options]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_shipped_posterior_knows_a_chain_and_how_good_it_is():
    shipped = stored.read(discovery.SHIPPED, features.COUNT)
    size = 6
    noise = np.random.default_rng(3).normal(size=(2000, size))
    for i in range(1, size):
        noise[:, i] += 0.8 * noise[:, i - 1]
    corr = np.corrcoef(noise, rowvar=False).astype(np.float32)
    found = np.asarray(discovery.linked(shipped.params, shipped.net, corr, 2000.0))
    chain = np.eye(size, k=1, dtype=bool)
    assert found[chain].min() > 0.9
    assert found[chain].min() > found[np.triu(~chain, 2)].max()
    assert {entry["variables"] for entry in shipped.card["calibration"]} == set(shipped.card["recipe"]["check_sizes"])
