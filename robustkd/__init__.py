"""robustkd: adversarial distillation, export to the edge, and an audit of the exported engine itself.

    import robustkd as rk

    recipe = rk.load_recipe("quickstart")
    checkpoint = rk.distill(recipe)
    bundles = rk.export(checkpoint.path)
    result, folder = rk.audit(bundles[0].path)

Each name is loaded on first use, so `import robustkd` imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from robustkd.api import audit, distill, export, load_engine, load_recipe, report, run

__all__ = ["__version__", "audit", "distill", "export", "load_engine", "load_recipe", "report", "run"]


def __getattr__(name: str) -> Any:
    """PEP 562: the verbs of `robustkd.api`."""
    if name in __all__:
        from robustkd import api

        return getattr(api, name)
    raise AttributeError(f"module 'robustkd' has no attribute {name!r}")
