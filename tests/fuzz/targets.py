"""One fuzzer per reader: makes a good artefact once, changes a copy of it, and says what is right."""

import io
import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from tests.earlier import ARTEFACTS
from tests.fuzz.change import change_bytes, change_tensor, change_value
from tests.fuzz.log_targets import Log, SpecificationFile
from tests.fuzz.target import Target
from torchrec_sid.artifact import load_artifact, record_file, save_artifact, sealed
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.checkpoint_files import list_checkpoints, read_checkpoint
from torchrec_sid.parallel.dcp import read_metadata
from torchrec_sid.parallel.planner_file import load_planner_config
from torchrec_sid.quantizers import load_quantizer
from torchrec_sid.serving.program_check import check_program
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.sentencepiece.pieces import SidPieces

SPEC = SidSpec((8, 3, 4))
MARK = "ab" * 32


class Catalog(Target):
    def make(self) -> None:
        ids = torch.arange(0, 60, 3)
        codes = torch.stack([ids * 7 % k for k in SPEC.cardinalities], 1)
        catalog = SidCatalog.create(self.home / "good", SPEC, ids[:12], codes[:12], MARK, part_items=6)
        catalog.append(ids[12:], codes[12:], MARK)
        self.good = catalog.path

    def change(self, chance: random.Random) -> bool:
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.good, self.case)
        file = self.case / "manifest.json"
        body = json.loads(file.read_text())
        kind = chance.randrange(4)
        if kind == 0:
            return _change_file(chance.choice(list(self.case.iterdir())), chance)
        if kind == 1:
            body = change_value(body, chance)
            if not isinstance(body, dict):
                file.write_text(json.dumps(body))
                return True
        else:
            part = chance.choice(sorted(self.case.glob("part-*")))
            tensors = load_file(part)
            name = chance.choice(list(tensors))
            tensors[name] = change_tensor(tensors[name], chance)
            save_file(tensors, part)
        _reseal_catalog(self.case, body)
        return False

    def read(self) -> str | None:
        catalog = SidCatalog.open(self.case)
        ids = catalog.item_ids()
        if len(ids.unique()) != len(ids) or len(ids) != len(catalog):
            return "an id twice"
        codes = catalog.codes(ids)
        catalog.spec.validate(codes)
        found = dict(zip(ids.tolist(), catalog.spec.pack(codes).tolist(), strict=True))
        for part in catalog.parts:
            raw = load_file(self.case / part.info.file)
            if any(
                found[i] != s for i, s in zip(raw["item_ids"].tolist(), raw["sids"].tolist(), strict=True)
            ):
                return "a SID that is not in the file"
        return None


def _reseal_catalog(folder: Path, body: dict) -> None:
    """Every hash anew, as far as the manifest still has places for them."""
    files, config = body.get("files"), body.get("config")
    there = {entry.name for entry in folder.iterdir()}
    if isinstance(files, dict):
        files.update(
            {n: record_file(folder, n)._asdict() for n in files if n in there and n != "manifest.json"}
        )
    try:
        head = json.dumps(["sid_catalog", list(config["cardinalities"]), config["quantizer_fingerprint"]])
        chain = "".join(files[part["file"]]["sha256"] for part in config["parts"])
        config["fingerprint"] = sha256((head + chain).encode()).hexdigest()
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
        pass
    rest = {name: value for name, value in body.items() if name != "seal"}
    rest["seal"] = sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "manifest.json").write_text(sealed.to_text(rest))


def _change_file(path: Path, chance: random.Random) -> bool:
    good = path.read_bytes()
    path.write_bytes(change_bytes(good, chance))
    return path.read_bytes() != good


class TensorFile(Target):
    """A quantizer or a vocabulary: one safetensors file."""

    name = ""
    open: Callable[[Path], Any]

    def make(self) -> None:
        old = ARTEFACTS / self.name
        body = json.loads(_metadata(old)["torchrec_sid"])
        self.kind, self.version = body["kind"], body["version"]
        self.good = load_artifact(old, kind=self.kind, version=self.version)

    def change(self, chance: random.Random) -> bool:
        config, tensors = self.good.config, dict(self.good.tensors)
        kind = chance.randrange(3)
        if kind == 1:
            config = change_value(config, chance)
        elif kind == 2:
            name = chance.choice(list(tensors))
            tensors[name] = change_tensor(tensors[name], chance)
        config = config if isinstance(config, dict) else {}
        save_artifact(self.case, kind=self.kind, version=self.version, config=config, tensors=tensors)
        return _change_file(self.case, chance) if kind == 0 else False

    def read(self) -> str | None:
        type(self).open(self.case)
        return None


def _metadata(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


class Quantizer(TensorFile):
    name = "quantizer.safetensors"

    @staticmethod
    def open(path: Path) -> Any:
        quantizer = load_quantizer(path)
        return quantizer.encode(torch.zeros(2, quantizer.dim))


class Pieces(TensorFile):
    name = "pieces.safetensors"
    open = staticmethod(SidPieces.load)


class Checkpoint(Target):
    def make(self) -> None:
        state = {"model": {"w": torch.ones(6, 2)}, "optimizer": {"lr": 0.5}}
        with CheckpointManager(self.home / "good") as manager:
            manager.save(1, state, {"epoch": 1})
        self.good = list_checkpoints(self.home / "good")[0]

    def change(self, chance: random.Random) -> bool:
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.good, self.case / self.good.name)
        folder = self.case / self.good.name
        file = folder / "manifest.json"
        body = json.loads(file.read_text())
        kind = chance.randrange(4)
        if kind == 0:
            return _change_file(file, chance)
        if kind == 1:
            body = change_value(body, chance)
        elif kind == 2:
            (folder / ".metadata").write_bytes(change_bytes((folder / ".metadata").read_bytes(), chance))
        else:
            metadata = pickle.loads((folder / ".metadata").read_bytes())
            _change_metadata(metadata, chance)
            (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        if isinstance(body, dict):
            _reseal_catalog(folder, body)
        else:
            file.write_text(json.dumps(body))
        return False

    def read(self) -> str | None:
        info = read_checkpoint(self.case / self.good.name)
        info.folder.verify()
        read_metadata(info.folder)
        return None


def _change_metadata(metadata: Any, chance: random.Random) -> None:
    info = chance.choice(list(metadata.storage_data.values()))
    name, odd = chance.choice(
        [("relative_path", "../x"), ("offset", -1), ("length", 1 << 40), ("offset", None)]
    )
    entry = metadata.state_dict_metadata["model.w"]
    kind = chance.randrange(4)
    if kind == 0:
        setattr(info, name, odd)
    elif kind == 1:
        entry.chunks.append(entry.chunks[0])
    elif kind == 2:
        entry.chunks[0].sizes = torch.Size((chance.randrange(7), 2))
    else:
        entry.size = torch.Size((chance.randrange(9), chance.randrange(4)))


class Program(Target):
    def make(self) -> None:
        class Small(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return (x * 2).relu().sum(1)

        shapes = ({0: torch.export.Dim.DYNAMIC},)
        exported = torch.export.export(Small(), (torch.rand(3, 4),), dynamic_shapes=shapes)
        exported._example_inputs = None
        torch.export.save(exported, self.home / "program.pt2")
        self.good = (self.home / "program.pt2").read_bytes()

    def change(self, chance: random.Random) -> bool:
        self.data = change_bytes(self.good, chance)
        if chance.randrange(4):
            out = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(self.good)) as old, zipfile.ZipFile(out, "w") as new:
                for info in old.infolist():
                    data = old.read(info)
                    if info.filename.endswith("model.json"):
                        data = json.dumps(change_value(json.loads(data), chance)).encode()
                    new.writestr(info.filename, data)
            self.data = out.getvalue()
        return False

    def read(self) -> str | None:
        check_program(io.BytesIO(self.data), "program.pt2")
        return None


class Planner(Target):
    def make(self) -> None:
        self.good = {
            "batch_size": 4096,
            "topology": {"world_size": 2},
            "tables": {"history_*": {"sharding_types": ["row_wise"], "compute_kernels": ["fused"]}},
            "reservation": {"kind": "percentage", "share": 0.2},
        }

    def change(self, chance: random.Random) -> bool:
        text = yaml.safe_dump(change_value(self.good, chance))
        file = self.home / "planner.yaml"
        file.write_bytes(change_bytes(text.encode(), chance) if not chance.randrange(3) else text.encode())
        return False

    def read(self) -> str | None:
        load_planner_config(self.home / "planner.yaml")
        return None


TARGETS: dict[str, type[Target]] = {
    "catalog": Catalog,
    "quantizer": Quantizer,
    "pieces": Pieces,
    "checkpoint": Checkpoint,
    "program": Program,
    "planner": Planner,
    "log": Log,
    "specification": SpecificationFile,
}
