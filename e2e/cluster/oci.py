"""OCI image archives that hold one static binary."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

_MEDIA_TYPE = "application/vnd.oci.image."


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), mode
    archive.addfile(member, io.BytesIO(content))


def _document(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def write_image(archive: Path, reference: str, binary: Path, *, user: str, architecture: str) -> None:
    """Write an image that runs `binary`. The same input gives the same bytes; the file appears whole or not at all.

    Args:
        archive: The tar file to write.
        reference: The image's full name with its tag.
        binary: A static Linux program; it lies in the root of the image.
        user: `uid:gid`, or empty for root.
        architecture: GOARCH of the binary.
    """
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        _add(tar, binary.name, binary.read_bytes(), 0o755)
    blobs: dict[str, bytes] = {}

    def blob(content: bytes, media_type: str) -> dict[str, Any]:
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {"mediaType": f"{_MEDIA_TYPE}{media_type}", "digest": digest, "size": len(content)}

    layer_blob = blob(layer.getvalue(), "layer.v1.tar")
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": [f"/{binary.name}"], "User": user},
        "rootfs": {"type": "layers", "diff_ids": [layer_blob["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_MEDIA_TYPE}manifest.v1+json",
        "config": blob(_document(config), "config.v1+json"),
        "layers": [layer_blob],
    }
    entry = blob(_document(manifest), "manifest.v1+json") | {"annotations": {"io.containerd.image.name": reference}}
    archive.parent.mkdir(parents=True, exist_ok=True)
    draft = archive.with_suffix(".draft")
    with tarfile.open(draft, "w") as tar:
        _add(tar, "oci-layout", _document({"imageLayoutVersion": "1.0.0"}))
        _add(tar, "index.json", _document({"schemaVersion": 2, "manifests": [entry]}))
        for digest, content in blobs.items():
            _add(tar, "blobs/" + digest.replace(":", "/"), content)
    draft.replace(archive)
