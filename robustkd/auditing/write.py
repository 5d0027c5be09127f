"""The audit bundle: result.json, one row per image in records.parquet, the images in adversarial.npz."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkd.auditing.facts import AuditArrays
from robustkd.auditing.ledger import Track, distances
from robustkd.bundle import Bundle, create, write_atomic, write_json
from robustkd.errors import RequirementError
from robustkd.result import AuditResult


def write_audit(result: AuditResult, arrays: AuditArrays, folder: Path, parent: Bundle | None) -> Bundle:
    """Write a finished audit in one piece, and forget what was kept for resuming it.

    Raises:
        ArtifactError: something is at `folder` already, or it cannot be written.
        RequirementError: pyarrow is missing.
    """
    fields: dict[str, Any] = {"threat": result.threat, "precision": result.artifact.precision}
    fields |= {"hardware": {"device": result.artifact.device}, "audited": result.digests()}
    with create(folder, "audit", parent=parent, **fields) as (work, _):
        write_json(work / "result.json", result.model_dump(mode="json", by_alias=True))
        _parquet(work / "records.parquet", columns(arrays, result.threat.norm))
        buffer = io.BytesIO()
        ledger = arrays.ledger
        np.savez_compressed(buffer, x=arrays.x, x_adv=ledger.worst, y=arrays.y, index=arrays.index)
        write_atomic(work / "adversarial.npz", buffer.getvalue())
    arrays.store.remove()
    return Bundle.open(folder, kind="audit")


def columns(arrays: AuditArrays, norm: str) -> dict[str, Any]:
    """One entry per image and column.

    `<attack>:prediction` and `<attack>:robust` are null where the attack was not tried; predictions are -1 where the
    logits were not finite. `source:` begins the columns of the source. `worst_attack` made the image in
    adversarial.npz, the one of smallest margin on the engine; `adversarial_prediction` is the engine's answer to it.
    """
    ledger = arrays.ledger
    engine = ledger.engine
    linf, l2 = (distances(ledger.worst, arrays.x, kind) for kind in ("linf", "l2"))
    table: dict[str, Any] = {
        "index": arrays.index,
        "label": arrays.y,
        "clean_prediction": engine.clean.prediction,
        "clean_robust": engine.clean.robust,
        "adversarial_prediction": _worst_predictions(arrays),
        "robust": engine.robust(),
        "worst_attack": ledger.worst_attack,
        "margin": ledger.worst_margin,
        "linf": linf,
        "l2": l2,
        **_answers(engine, ""),
    }
    if ledger.source is not None:
        source = ledger.source
        table |= {
            "source:clean_prediction": source.clean.prediction,
            "source:clean_robust": source.clean.robust,
            "source:robust": source.robust(),
            **_answers(source, "source:"),
        }
    return table


def _worst_predictions(arrays: AuditArrays) -> NDArray[np.int64]:
    engine = arrays.ledger.engine
    found: NDArray[np.int64] = engine.clean.prediction.copy()
    for i, name in enumerate(arrays.ledger.worst_attack):
        if name:
            found[i] = engine.attacks[name].prediction[i]
    return found


def _answers(track: Track, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, judged in track.attacks.items():
        tried = track.tried(name)
        found[f"{prefix}{name}:prediction"] = np.ma.masked_array(judged.prediction, ~tried)
        found[f"{prefix}{name}:robust"] = np.ma.masked_array(judged.robust, ~tried)
    return found


def _parquet(file: Path, table: dict[str, Any]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise RequirementError(
            "records.parquet needs the package pyarrow", where=str(error), fix="pip install robustkd"
        ) from error
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: _column(pa, values) for name, values in table.items()}), buffer)
    write_atomic(file, buffer.getvalue())


def _column(pa: Any, values: Any) -> Any:
    if isinstance(values, np.ma.MaskedArray):
        return pa.array(values.data, mask=np.ma.getmaskarray(values))
    return pa.array(values)
