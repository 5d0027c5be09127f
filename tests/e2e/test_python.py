"""The chain in Python, as a notebook has it: every path is a string."""

import numpy as np

import robustkd as rk
from tests.audit_nets import images

SHORT = (
    "noise_draws: 1\npgd_steps: 1\napgd_steps: 2\ntargets: 0\nsquare_queries: 5\nfresh_process: false\n"
    "ladder_images: 0\nscale_images: 0\nmemory_images: 0\n"
)


def test_paths_may_be_strings(tmp_path):
    data = images(96, size=16)
    np.savez(tmp_path / "data.npz", x=data.images, y=data.labels)
    (tmp_path / "short.yaml").write_text(SHORT)
    (tmp_path / "recipe.yaml").write_text(
        f"dataset: {{name: npz, train: ['{tmp_path}/data.npz'], test: ['{tmp_path}/data.npz'], holdout: 8}}\n"
        "student: {name: resnet18, width: 0.0625}\nmethod: standard\n"
        "train: {epochs: 1, batch_size: 16, threads: 1, tensorboard: false}\n"
        f"audit: {{policy: '{tmp_path}/short.yaml', n: 8}}\n"
    )
    recipe = rk.load_recipe(str(tmp_path / "recipe.yaml"))
    checkpoint = rk.distill(recipe, str(tmp_path / "run"))
    (bundle,) = rk.export(str(checkpoint.path), output=str(tmp_path / "out"))
    engine = rk.load_engine(str(bundle.path))
    assert engine.logits(data.floats()[:3]).shape == (3, 4)
    result, folder = rk.audit(str(bundle.path), source=str(checkpoint.path), output=str(tmp_path / "audit"))
    assert folder == tmp_path / "audit" and result.dataset.n == 8
    assert rk.report([str(folder)], str(tmp_path / "page.html")).is_file()
