"""Artefacts on disk or object storage: written whole or not at all, sealed, checked when they are opened.

One safetensors file (:func:`save_artifact`, :func:`load_artifact`) or a folder with a manifest
(:func:`seal_folder`, :func:`open_folder`). docs/trust.md says what the checks are good for.
"""

from torchrec_sid.artifact.disk import disk_errors, save_array, work_folder, write_atomically, write_json
from torchrec_sid.artifact.folder import (
    Contents,
    FileRecord,
    SealedFolder,
    has_manifest,
    open_folder,
    read_array,
    record_file,
    record_tree,
    seal_folder,
    unused_name,
    whole_folder,
)
from torchrec_sid.artifact.lock import folder_lock
from torchrec_sid.artifact.place import Place, RemotePath, locate
from torchrec_sid.artifact.tensor_file import (
    Artifact,
    fingerprint,
    load_artifact,
    read_manifest,
    save_artifact,
)

__all__ = [
    "Artifact",
    "Contents",
    "FileRecord",
    "Place",
    "RemotePath",
    "SealedFolder",
    "disk_errors",
    "fingerprint",
    "folder_lock",
    "has_manifest",
    "load_artifact",
    "locate",
    "open_folder",
    "read_array",
    "read_manifest",
    "record_file",
    "record_tree",
    "save_array",
    "save_artifact",
    "seal_folder",
    "unused_name",
    "whole_folder",
    "work_folder",
    "write_atomically",
    "write_json",
]
