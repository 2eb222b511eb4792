"""Fuzzers of what a preparation reads and writes: the prepared log with its stores, and specifications."""

import io
import json
import random
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml

from tests.fuzz.change import change_bytes, change_tensor, change_value
from tests.fuzz.target import Target
from torchrec_sid.artifact import record_file, sealed
from torchrec_sid.data.batch import BatchConfig
from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.data.specification import Specification
from torchrec_sid.data.synthetic import SyntheticConfig, write_synthetic

_SMALL = SyntheticConfig(items=40, users=12, events=300, topics=4, subtopics=2, dim=4)
_FIELDS = ("item", "history", "history_action", "history_age")


class Log(Target):
    """A prepared log: arrays of items and users, history stores, examples."""

    def make(self) -> None:
        write_synthetic(self.home / "log", _SMALL)
        log = prepare(self.home / "log", self.home / "good", PrepareConfig(block_rows=16))
        self.good = log.path
        self.items, self.actions = log.items, log.actions

    def change(self, chance: random.Random) -> bool:
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.good, self.case)
        manifest = self.case / "manifest.json"
        body = json.loads(manifest.read_text())
        kind = chance.randrange(5)
        if kind == 0:
            file = chance.choice(sorted(f for f in self.case.rglob("*") if f.is_file()))
            good = file.read_bytes()
            file.write_bytes(change_bytes(good, chance))
            return file.read_bytes() != good
        name = ""
        if kind == 1:
            body["config"] = change_value(body["config"], chance)
        else:
            name = chance.choice(sorted(body["files"]))
            _change_file(self.case / name, chance)
        if name:
            body["files"][name] = record_file(self.case, name)._asdict()
        rest = {key: value for key, value in body.items() if key != "seal"}
        rest["seal"] = sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        manifest.write_text(sealed.to_text(rest))
        return False

    def read(self) -> str | None:
        log = PreparedLog.open(self.case, verify=True)
        for array in (log.item_ids, log.item_train_events, log.item_segment):
            if len(array) != log.items:
                return "an array of another length than there are items"
        for split in ("train", "valid", "test"):
            for batch in BatchReader(log, split, BatchConfig(16, 8, _FIELDS)):
                for name in ("item", "history"):
                    values = batch.features[name].values()
                    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < log.items:
                        return f"{split}: {name} outside the items"
                if not bool(((batch.labels == 0) | (batch.labels == 1)).all()):
                    return f"{split}: a label that is none"
                actions = batch.features["history_action"].values()
                if len(actions) and not 0 <= int(actions.min()) <= int(actions.max()) < log.actions:
                    return f"{split}: an action that is none"
        return None


def _change_file(path: Path, chance: random.Random) -> None:
    if path.suffix == ".npy" and chance.randrange(4):
        array = np.load(path)
        if not array.dtype.hasobject:
            out = io.BytesIO()
            np.save(out, change_tensor(torch.from_numpy(array.copy()), chance).numpy())
            path.write_bytes(out.getvalue())
            return
    if path.suffix == ".parquet" and chance.randrange(4):
        table = pq.read_table(path)
        column = chance.randrange(table.num_columns)
        kind = chance.randrange(3)
        if kind == 0:
            table = table.remove_column(column)
        elif kind == 1:
            table = table.slice(0, chance.randrange(len(table) + 1))
        else:
            values = table.column(column).combine_chunks().to_pylist()
            if values and isinstance(values[0], int):
                values[chance.randrange(len(values))] = chance.choice((-1, 127, -128))
                table = table.set_column(column, table.field(column), [values])
        pq.write_table(table, path)
        return
    path.write_bytes(change_bytes(path.read_bytes(), chance))


class SpecificationFile(Target):
    """What a log's columns are, in YAML."""

    def make(self) -> None:
        path = Path(__file__).parents[2] / "torchrec_sid" / "data" / "specifications" / "ml1m.yaml"
        self.good: Any = yaml.safe_load(path.read_text())

    def change(self, chance: random.Random) -> bool:
        text = yaml.safe_dump(change_value(self.good, chance), allow_unicode=True).encode()
        file = self.home / "specification.yaml"
        file.write_bytes(change_bytes(text, chance) if not chance.randrange(3) else text)
        return False

    def read(self) -> str | None:
        found = Specification.read(self.home / "specification.yaml")
        again = Specification.from_plain(found.to_plain())
        return None if again == found else "it reads back as another one"
