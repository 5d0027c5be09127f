"""Where weights come from: a file or folder here, the Hugging Face Hub, an address, and a record of what came first.

What is fetched goes under the folder of teachers, where it can as well be put by hand: `hf/ORG/REPO/FILE` for the Hub,
`HOST/PATH` for an address.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from robustkd.bundle import MANIFEST, sha256, write_json
from robustkd.errors import ArtifactError, ConfigError, RequirementError
from robustkd.models._files import start_of
from robustkd.training.fetch import fetch
from robustkd.training.places import folders

Listen = Callable[[dict[str, Any]], None]
WEIGHTS = (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".bin")
_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>.+))?")


def remote(source: str) -> bool:
    """Whether the weights are elsewhere: `hf:ORG/REPO[@REVISION][/FILE]`, or a http(s) address."""
    return source.startswith(("hf:", "http://", "https://"))


def bring(source: str, root: Path | None, *, digest: str | None = None, listen: Listen = lambda event: None) -> Path:
    """The file of a remote source: one that lies in its place already, otherwise fetched.

    Args:
        source: as `remote` takes it.
        root: the data root.
        digest: what the file must have; a file fetched now that has another is not kept.
        listen: called with `download` events.

    Raises:
        ConfigError: the source is not of one of these forms.
        RequirementError: huggingface_hub is not installed.
        ArtifactError: it cannot be fetched; the message says where to put it by hand.
    """
    place = _place(source)
    for folder in folders(root):
        if (folder / place).is_file():
            return folder / place
    file = next(folders(root)) / place
    if source.startswith("hf:"):
        listen({"event": "stage", "message": f"fetching {source}"})
        return _from_hub(source, file)

    def told(done: int, total: int | None) -> None:
        listen({"event": "download", "file": file.name, "done": done, "total": total})

    return fetch(source, file, digest=digest, told=told)


def locate(source: str, root: Path | None, *, digest: str | None = None, listen: Listen = lambda event: None) -> Path:
    """The file a source stands for, fetched where it is remote, or the folder of the checkpoint bundle it stands for.

    Raises:
        ArtifactError: a folder holds neither, or see `bring`.
    """
    if remote(source):
        return bring(source, root, digest=digest, listen=listen)
    path = Path(source).expanduser()
    return inside(path) if path.is_dir() else path


def digest_of(file: Path, wanted: str | None, *, first: bool) -> str:
    """The file's digest, compared before any parser sees the file.

    Args:
        file: the file.
        wanted: what is stated of it, with or without `sha256:`.
        first: where nothing is stated, hold it against its first use.

    Raises:
        ArtifactError: it cannot be read, or is another file than stated or first used.
    """
    start_of(file)  # a file that is not there says so
    digest = sha256(file)
    if wanted is not None and digest.removeprefix("sha256:") != wanted.removeprefix("sha256:"):
        raise ArtifactError(
            f"{file.name} is not the file described: its digest differs",
            where=str(file),
            fix="delete it and fetch it again; or state the digest of the file you mean",
        )
    if first and wanted is None:
        check_first(file, digest)
    return digest


def _place(source: str) -> Path:
    """Where the file lies under a folder of teachers; never outside it."""
    if source.startswith("hf:"):
        found = _hub(source)
        at = [f"@{found['revision']}"] if found["revision"] else []
        return Path("hf", *found["repo"].split("/"), *at, *_inside(found["file"]))
    parts = urlsplit(source)
    names = _inside(unquote(parts.path)) or ["weights"]
    if parts.query:
        names[-1] = f"{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}-{names[-1]}"
    return Path(*_inside(parts.netloc.rpartition("@")[2].replace(":", "_")), *names)


def _inside(path: str) -> list[str]:
    return [name for name in re.split(r"[/\\]", path) if name not in ("", ".", "..")]


def _hub(source: str) -> dict[str, str]:
    if (found := _HUB.fullmatch(source)) is None or {".", ".."} & set(found["repo"].split("/")):
        raise ConfigError(f"{source} names nothing on the Hub", fix="write hf:ORG/REPO/FILE, or hf:ORG/REPO@REVISION/FILE")
    return {name: value or "" for name, value in found.groupdict().items()} | {"file": found["file"] or "model.safetensors"}


def _from_hub(source: str, file: Path) -> Path:
    """The Hub's own downloader resumes, checks and shows its progress."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise RequirementError(
            "weights of the Hub need huggingface_hub", where=source, fix="pip install 'robustkd[hub]'"
        ) from error
    wanted = _hub(source)
    folder = file.parents[len(_inside(wanted["file"])) - 1]
    try:
        came = hf_hub_download(
            wanted["repo"],
            wanted["file"],
            revision=wanted["revision"] or None,
            local_dir=folder,
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except Exception as error:  # its errors are of several libraries, which change with its version
        said = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise ArtifactError(
            f"the Hub does not give {wanted['file']}: {said}",
            where=source,
            fix=f"check the name and your access, or go online; or fetch it elsewhere, and put it at {file.absolute()}",
        ) from error
    return Path(came)


def inside(folder: Path) -> Path:
    """What a folder stands for: the checkpoint bundle it is or holds, or its only file of weights.

    Raises:
        ArtifactError: it holds neither.
    """
    for bundle in (folder, folder / "checkpoint"):
        if (bundle / MANIFEST).is_file():
            return bundle
    found = sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS)
    if len(found) == 1:
        return found[0]
    named = f": {', '.join(file.name for file in found[:5])}" if found else ""
    raise ArtifactError(
        f"the folder holds no checkpoint bundle and {len(found)} files of weights{named}",
        where=str(folder),
        fix="name one file",
    )


# --- the digest of the first use


def first_digest(file: Path) -> str | None:
    """The digest a file had when it was first used, or None.

    Raises:
        ArtifactError: the record cannot be read.
    """
    record = _record(file)
    if not record.is_file():
        return None
    try:
        return str(json.loads(record.read_bytes())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"the record of {file.name}'s digest cannot be read", where=str(record), fix="delete the record"
        ) from error


def check_first(file: Path, digest: str) -> None:
    """Hold a file against its first use.

    Raises:
        ArtifactError: it is another file than it was then.
    """
    if (before := first_digest(file)) is not None and before != digest:
        raise ArtifactError(
            f"{file.name} is not the file of its first use: its digest differs",
            where=str(file),
            fix=f"fetch it again; if you replaced it on purpose, delete {_record(file).name} beside it",
        )


def remember(file: Path, digest: str) -> None:
    """Record the digest of a file that has proved good; where the folder is not ours to write, nothing is."""
    if not _record(file).exists():
        with contextlib.suppress(ArtifactError):
            write_json(_record(file), {"file": file.name, "sha256": digest})


def _record(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256.json")
