"""Controls on real images: a robust net by others survives in part, an undefended one not at all."""

import numpy as np
import pytest

from robustkd.auditing.run import ArtifactFacts, SourceModel, run_audit
from robustkd.catalog import Shelf
from robustkd.datasets._base import ImageSet
from robustkd.engines.pytorch import PytorchEngine
from robustkd.models._files import load_state, read_state
from robustkd.recipe.policy import AuditConfig, Policy
from robustkd.threat import ThreatModel
from tests.real_data import TEST_FILE, need_data, read_grids

POLICY = Policy(name="test", noise_draws=4, pgd_steps=10, apgd_steps=20, targets=3, square_queries=100)
NETS = {"cifar10_resnet20_pgdat8_a": (0.12, 0.48), "cifar10_resnet20_plain_raw01": (0.0, 0.05)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_robust_and_undefended_nets_by_others(name):
    weights = f"weights/{name}.safetensors"
    folder = need_data(TEST_FILE, weights)
    x, y = read_grids(folder / TEST_FILE)
    images = ImageSet(np.ascontiguousarray(x[:48].transpose(0, 3, 1, 2)), y[:48], tuple("0123456789"), "cifar10", "test")
    net = Shelf("models").get("cifar-resnet")(depth=20).build(channels=3, classes=10)
    load_state(net, read_state(folder / weights), name)
    result, _ = run_audit(
        PytorchEngine(net.eval(), input_shape=(3, 32, 32), classes=10),
        artifact=ArtifactFacts(name, ""),
        images=images,
        threat=ThreatModel(),
        policy=POLICY,
        audit=AuditConfig(tolerance=8, batch_size=48),
        source=SourceModel(net, name, ""),
    )
    low, high = NETS[name]
    assert result.engine.clean_accuracy.estimate > 0.75
    assert low <= result.engine.robust_accuracy.estimate <= high
    assert not [check for check in result.checks if check.status == "block"], result.checks
