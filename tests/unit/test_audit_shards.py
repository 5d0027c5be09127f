"""Shards: in any order, killed or not, from one machine or several, they give the unsharded audit."""

import json
import signal

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper, numpy_helper

from robustkd.auditing.facts import ArtifactFacts, SourceModel
from robustkd.auditing.merge import complete, finished, missing, shard_folder, shards_folder, write_shard
from robustkd.auditing.run import Order, carry_out, carry_out_shard
from robustkd.auditing.shards import ALL, Shard
from robustkd.auditing.store import Store, partial_folder
from robustkd.cli.app import run as command
from robustkd.errors import ArtifactError, ConfigError, Interrupted
from robustkd.recipe.policy import AuditConfig, Policy
from robustkd.threat import ThreatModel
from tests.audit_nets import Quadrants, TorchEngine, images
from tests.unit.test_audit_resume import Dying, plain

CHEAP = "fresh_process: false\nladder_images: 0\nscale_images: 0\nmemory_images: 0\nuint8: none\n"
POLICY = Policy(
    name="test",
    noise_draws=2,
    pgd_steps=3,
    apgd_steps=4,
    targets=1,
    square_queries=20,
    uint8="post",
    ladder_images=0,
    scale_images=0,
    memory_images=0,
)


def order(folder, engine=None, **changes):
    net = Quadrants()
    values = {
        "artifact": ArtifactFacts("x.onnx", "sha256:0"),
        "images": images(40),
        "threat": ThreatModel(eps=0.04),
        "policy": POLICY,
        "audit": AuditConfig(tolerance=8, batch_size=8),
        "source": SourceModel(net, "s", "sha256:1"),
        "folder": folder,
        **changes,
    }
    return Order(engine or TorchEngine(net), **values)


@pytest.fixture(scope="module")
def whole():
    return carry_out(order(None))


def merged(folder):
    shards = complete(finished([folder]))
    return carry_out(order(folder, resume=True, shards=shards))


def shard(folder, part, **changes):
    home = shard_folder(folder, part)
    write_shard(carry_out_shard(order(home, **changes), part), folder, part, None)


@pytest.mark.parametrize("numbers", [(2, 3, 1), (1, 2)])
def test_white_box_attacks_of_a_whole_batch_too(tmp_path, whole, numbers):
    """APGD draws one stream for a batch: equality holds because a batch is the same in every division."""
    folder = tmp_path / "audit"
    for number in numbers:
        shard(folder, Shard(number, len(numbers)))
    result, arrays = merged(folder)
    assert plain(result) == plain(whole[0])
    assert np.array_equal(arrays.ledger.worst, whole[1].ledger.worst)
    assert arrays.ledger.worst_attack == whole[1].ledger.worst_attack
    assert arrays.store.names() and result.seconds > 0


def test_a_killed_shard_continues(tmp_path, whole):
    folder, first = tmp_path / "audit", Shard(1, 2)
    home = shard_folder(folder, first)
    with pytest.raises(Interrupted):
        carry_out_shard(order(home, Dying(Quadrants(), 110)), first)
    assert list(partial_folder(home).glob("*.npz")) and not home.exists()
    shard(folder, first, resume=True)
    shard(folder, Shard(2, 2))
    assert plain(merged(folder)[0]) == plain(whole[0])


def test_a_shard_of_another_audit_is_refused(tmp_path):
    folder = tmp_path / "audit"
    shard(folder, Shard(1, 2))
    shard(folder, Shard(2, 2), threat=ThreatModel(eps=0.05))
    with pytest.raises(ArtifactError, match="eps differ"):
        merged(folder)


def test_more_shards_than_chunks(tmp_path, whole):
    folder = tmp_path / "audit"
    for number in range(7, 0, -1):
        shard(folder, Shard(number, 7))
    assert plain(merged(folder)[0]) == plain(whole[0])


def test_every_chunk_is_of_one_shard():
    for total in range(1, 9):
        held = [[Shard(i, total).holds(chunk) for i in range(1, total + 1)] for chunk in range(20)]
        assert all(sum(row) == 1 for row in held)
    assert all(ALL.holds(chunk) for chunk in range(5))


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2", ""])
def test_what_is_no_shard(text):
    with pytest.raises(ConfigError, match="not a shard"):
        Shard.parse(text)


def test_missing_names_the_division_that_lacks_fewest():
    assert missing([Shard(1, 3), Shard(3, 3)]) == [Shard(2, 3)]
    assert missing([Shard(1, 4), Shard(1, 2), Shard(2, 2)]) == []
    assert missing([]) == []


def test_pieces_in_memory_are_no_shard():
    with pytest.raises(ArtifactError, match="memory"):
        Store(None, {}).begin()


# through the command line


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A bare linear .onnx file that is right on most of 300 images, and a policy."""
    folder = tmp_path_factory.mktemp("bare")
    data = images(400)
    corners = np.zeros((4, 8, 8), np.float32)
    for i, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        corners[i, top : top + 4, left : left + 4] = 4.0
    nodes = [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(corners.reshape(4, 64).T.copy(), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(folder / "net.onnx"))
    np.savez(folder / "data.npz", x=data.images, y=data.labels)
    (folder / "p.yaml").write_text(CHEAP + "noise_draws: 2\npgd_steps: 2\napgd_steps: 3\ntargets: 1\nsquare_queries: 20\n")
    return folder


def call(capsys, home, *words, eps="0.04"):
    common = ["--dataset", home / "data.npz", "--eps", eps, "--policy", home / "p.yaml", "--n", 300, "--min-clean", 10]
    code = command(["audit", str(home / "net.onnx"), *map(str, common), *map(str, words)])
    seen = capsys.readouterr()
    return code, seen.out, seen.err


def test_the_command_in_any_order_and_from_several_places(home, tmp_path, capsys):
    code, out, err = call(capsys, home, "--output", tmp_path / "whole", "--json")
    assert code == 0, err
    whole = plain(json.loads(out))

    here = tmp_path / "here"
    code, out, err = call(capsys, home, "--shard", "3/3", "--output", here, "--json")
    assert code == 11 and json.loads(out)["missing"] == ["1/3", "2/3"], err
    code, out, err = call(capsys, home, "--shard", "3/3", "--output", here)
    assert code == 5 and "finished already" in err
    code, out, err = call(capsys, home, "--shard", "1/3", "--output", here, eps="0.05")
    assert code == 5 and "eps differ" in err
    code, out, err = call(capsys, home, "--shard", "1/3", "--output", here)
    assert code == 11 and "2/3 missing" in out
    assert command(["report", str(here), "--output", str(tmp_path / "r.html")]) == 5
    assert "2/3 missing" in capsys.readouterr().err

    there = tmp_path / "there"
    code, _, _ = call(capsys, home, "--shard", "2/3", "--output", there)
    assert code == 11
    code, _, err = call(capsys, home, "--merge", there, "--output", tmp_path / "lacking")
    assert code == 5 and "1/3" in err and "3/3" in err
    code, out, err = call(capsys, home, "--merge", there, "--merge", shards_folder(here), "--output", tmp_path / "m", "--json")
    assert code == 0, err
    assert plain(json.loads(out)) == whole
    code, out, err = call(capsys, home, "--shard", "2/3", "--output", here, "--json")
    assert code == 0 and plain(json.loads(out)) == whole, err
    assert not shards_folder(here).exists() and here.is_dir()
    tables = [pq.read_table(tmp_path / name / "records.parquet").to_pylist() for name in ("whole", "here", "m")]
    assert tables[0] == tables[1] == tables[2]
    kept = [np.load(tmp_path / name / "adversarial.npz")["x_adv"] for name in ("whole", "here", "m")]
    assert np.array_equal(kept[0], kept[1]) and np.array_equal(kept[0], kept[2])


def test_the_command_refuses(home, tmp_path, capsys):
    code, _, err = call(capsys, home, "--shard", "4/3", "--output", tmp_path / "a")
    assert code == 3 and "1/4" in err
    code, _, err = call(capsys, home, "--merge", tmp_path, "--output", tmp_path / "a")
    assert code == 5 and "no finished shard" in err
    code, _, _ = call(capsys, home, "--shard", "1/2", "--output", tmp_path / "a")
    piece = next(shards_folder(tmp_path / "a").glob("1-of-2/*.npz"))
    piece.write_bytes(piece.read_bytes()[:-7])
    code, _, err = call(capsys, home, "--shard", "2/2", "--output", tmp_path / "a")
    assert code == 5 and piece.name in err


def test_a_signal_in_a_shard_says_how_to_resume(home, tmp_path, capsys, monkeypatch):
    from robustkd.attacks.square import Square

    original = Square._search

    def raising(self, *args):
        signal.raise_signal(signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(Square, "_search", raising)
    code, out, err = call(capsys, home, "--shard", "1/2", "--output", tmp_path / "a")
    assert code == 143 and out == "" and "--shard 1/2" in err and "--resume" in err
    monkeypatch.undo()
    assert call(capsys, home, "--shard", "1/2", "--output", tmp_path / "a", "--resume")[0] == 11
    assert call(capsys, home, "--shard", "2/2", "--output", tmp_path / "a")[0] == 0
