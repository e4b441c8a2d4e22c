"""The folder of a skeleton posterior: written whole or not at all, and read only where both files belong together."""

import jax
import numpy as np
import pytest

from dmsec_jax.checkpoints import io, skeleton
from dmsec_jax.core.files import write_json
from dmsec_jax.models import skeleton_net
from dmsec_jax.models.skeleton_net import EdgeMLP, EdgeTransformer

FEATURES = 5


def posterior(net):
    return skeleton.Posterior(skeleton_net.init(jax.random.key(0), net, FEATURES), net, {"recipe": {}})


@pytest.mark.parametrize("net", [EdgeMLP(width=4, depth=1), EdgeTransformer(width=4, depth=1)])
def test_what_is_written_is_read(tmp_path, net):
    (tmp_path / "out").mkdir()
    skeleton.write(tmp_path / "out", posterior(net))
    found = skeleton.read(tmp_path / "out", FEATURES)
    assert found.net == net
    jax.tree.map(np.testing.assert_array_equal, found.params, jax.device_get(posterior(net).params))


def test_weights_of_another_network_are_refused(tmp_path):
    skeleton.write(tmp_path / "out", posterior(EdgeMLP(width=4, depth=1)))
    with pytest.raises(ValueError, match="the weights that card.json describes, got others: dense_0/kernel;"):
        skeleton.read(tmp_path / "out", FEATURES + 1)
    write_json(tmp_path / "out" / "card.json", {"net": {"kind": "EdgeMLP", "width": 4, "depth": 2}})
    with pytest.raises(ValueError, match="got others: dense_1/bias, dense_1/kernel;"):
        skeleton.read(tmp_path / "out", FEATURES)


def test_a_write_that_fails_leaves_the_old_posterior(tmp_path, monkeypatch):
    first, second = posterior(EdgeMLP(width=4, depth=1)), posterior(EdgeMLP(width=8, depth=1))
    skeleton.write(tmp_path / "out", first)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(skeleton, "write_json", full)
    with pytest.raises(OSError, match="nothing was changed"):
        skeleton.write(tmp_path / "out", second)
    assert skeleton.read(tmp_path / "out", FEATURES).net == first.net
    assert io.read_tensors(tmp_path / "out" / "posterior.safetensors")["dense_0/kernel"].shape == (FEATURES, 4)
