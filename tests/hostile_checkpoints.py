"""Checkpoints that create a file when they are unpickled, in every place that holds a pickle."""

import builtins
import functools
import io
import os
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from ultramem.files.checksums import Checksums

METADATA = "model_and_optim/.metadata"


class Call:
    """Its pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def system(marker):
    """A call of `os.system`."""
    return Call(os.system, f"touch '{marker}'")


def nested_name(marker):
    """The name `os.system` in a module that metadata do name, which has imported `os`."""
    command = f"touch '{marker}'".encode()
    module, name = b"torch.distributed.checkpoint.metadata", b"os.system"
    text = b"".join(b"\x8c" + bytes([len(part)]) + part for part in (module, name))
    return b"\x80\x04" + text + b"\x93" + b"\x8c" + bytes([len(command)]) + command + b"\x85R."


# What is put where, given the file that must not appear.
PICKLES = {
    "system": lambda marker: pickle.dumps(system(marker)),
    "eval": lambda marker: pickle.dumps(Call(builtins.eval, f"open({str(marker)!r}, 'w').close()")),
    "exec in a tuple": lambda marker: pickle.dumps(({}, [Call(builtins.exec, f"open({str(marker)!r}, 'w').close()")])),
    "getattr": lambda marker: pickle.dumps(Call(getattr, system(marker), "x")),
    "map": lambda marker: pickle.dumps(Call(list, Call(map, os.system, [f"touch '{marker}'"]))),
    "nested name": nested_name,
    "old protocol": lambda marker: pickle.dumps(system(marker), protocol=0),
}


def put_metadata(checkpoint, marker, kind):
    """A hostile `.metadata`."""
    (checkpoint / METADATA).write_bytes(PICKLES[kind](marker))


def put_hidden_metadata(checkpoint, marker):
    """Good metadata, but for one value."""
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    metadata.planner_data = {"x": system(marker)}
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))


def put_tensor(checkpoint, marker):
    """A hostile item of a shard, in a tensor's place."""
    replace_item(checkpoint, "model.embeddings.weight", system(marker))


def put_raw_tensor(checkpoint, marker):
    """The same without a zip archive around it."""
    replace_item(checkpoint, "model.embeddings.weight", pickle.dumps(system(marker), protocol=2))


def put_value(checkpoint, marker):
    """A hostile item that is no tensor."""
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    name = next(n for n, e in metadata.state_dict_metadata.items() if isinstance(e, BytesStorageMetadata))
    replace_item(checkpoint, name, system(marker))


def put_state(checkpoint, marker):
    """A hostile state of the trainer."""
    torch.save({"global_step": 1, "rng": system(marker)}, checkpoint / "train" / "rank0.pt")


HOSTILE = {kind: functools.partial(put_metadata, kind=kind) for kind in PICKLES}
HOSTILE |= {
    "hidden": put_hidden_metadata,
    "tensor": put_tensor,
    "raw tensor": put_raw_tensor,
    "value": put_value,
    "state": put_state,
}
ONLY_FOR_TRAINING = ("value", "state")  # others do not read them


def replace_item(checkpoint: Path, name: str, content) -> None:
    """Put something else in the place of a stored item; what is in `bytes` as it is."""
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == name)
    buffer = io.BytesIO()
    buffer.write(content) if isinstance(content, bytes) else torch.save(content, buffer)
    (checkpoint / "model_and_optim" / "new.distcp").write_bytes(buffer.getvalue())
    vars(metadata.storage_data[index]).update(relative_path="new.distcp", offset=0, length=len(buffer.getvalue()))
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))


def sign(checkpoint: Path) -> None:
    """Give changed files the checksums of what they are now, as whoever changes them can."""
    old = Checksums.load(checkpoint)
    if old is None:
        return
    names = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
    pieces = {
        name: [length for length, _ in old.files[name]]
        for name in names
        if name.endswith(".distcp") and name in old.files
    }
    Checksums.compute(checkpoint, [name for name in names if name != "checksums.json"], pieces).save()
