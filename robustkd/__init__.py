"""robustkd: adversarial distillation, export to the edge, and an audit of the exported engine itself."""

from __future__ import annotations

__version__ = "0.1.0"
