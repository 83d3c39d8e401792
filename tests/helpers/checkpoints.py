"""Copies of a bundled model with something changed, by the bytes of its one safetensors file."""

import json
import shutil

from jaxllm.config import BUNDLED_MODEL, bundled_model_dir

WEIGHTS = "model.safetensors"


def copy_of_bundled(folder, *, name=BUNDLED_MODEL, without=()):
    """A model directory of its own; `without`: names of files left out."""
    shutil.copytree(bundled_model_dir(name), folder, ignore=lambda *_: set(without))
    return folder


def split(folder):
    """(header, data) of the weights."""
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])


def join(folder, header, data):
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))


def negate(folder, name):
    """Every value of one bf16 tensor with the other sign."""
    header, data = split(folder)
    begin, end = header[name]["data_offsets"]
    for at in range(begin + 1, end, 2):
        data[at] ^= 0x80
    join(folder, header, data)


def drop(folder, name):
    """The file without one tensor, all else in its place."""
    header, data = split(folder)
    begin, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [at - (end - begin) for at in entry["data_offsets"]]
    join(folder, header, data[:begin] + data[end:])


def edit_json(folder, name, **changes):
    """Keys of one of its JSON files set, or removed with None."""
    path = folder / name
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
