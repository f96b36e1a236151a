"""The one door for durable writes: what is published here is complete, hashed and on the disk, or absent.

A file or folder is written beside its place under a temporary name, fsynced, renamed, and the parent folder
is fsynced. A folder carries `manifest.json` with the size and SHA-256 of every file, so that damage is found
and named. At no moment does a reader see half an artefact. What is replaced is always there, old or new: a
folder changes places with its successor in one call (`renameat2` of Linux). Where the file system does not
offer that call (NFS, for one), a folder that is replaced is absent between two renames; after a kill just
there the next writer gives the old one its name back.

`calls.py` holds every system call that changes the disk, with a fail point for tests at each; nothing else
of llmkit creates, renames or removes files, but for the list in `tests/contracts/test_one_door.py`.

**Source**: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014, section 3 (why rename needs
both fsyncs).
"""

from llmkit.durable.calls import foreign_write
from llmkit.durable.locks import RunLock, lock_holder, one_at_a_time, scratch_folder
from llmkit.durable.manifest import MANIFEST, hash_file, read_manifest, verify_folder
from llmkit.durable.refusals import naming_full_disks
from llmkit.durable.removing import discard, remove_file, remove_folder, sweep, sweep_beside
from llmkit.durable.writing import (
    make_folders,
    open_log,
    replace_in_folder,
    sync_log,
    write_file,
    write_folder,
    write_json,
    write_new_file,
)

__all__ = [
    "MANIFEST",
    "RunLock",
    "discard",
    "foreign_write",
    "hash_file",
    "lock_holder",
    "make_folders",
    "naming_full_disks",
    "one_at_a_time",
    "open_log",
    "read_manifest",
    "remove_file",
    "remove_folder",
    "replace_in_folder",
    "scratch_folder",
    "sweep",
    "sweep_beside",
    "sync_log",
    "verify_folder",
    "write_file",
    "write_folder",
    "write_json",
    "write_new_file",
]
