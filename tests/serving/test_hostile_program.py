"""A program that somebody else made: it may be refused, it may not run code of its own."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import fbgemm_gpu  # noqa: F401  registers operators
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from tests.audit import strange, watched
from tests.parallel.test_hostile_checkpoint import Bomb
from torchrec_sid.artifact import RemotePath, record_file, sealed
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.serving.exporter import export_model
from torchrec_sid.serving.program_check import check_program
from torchrec_sid.serving.request import Bags, Request
from torchrec_sid.serving.served_model import ServedModel

GRAPH, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"


class Tiny(nn.Module):
    """A table for three features, and a dense layer."""

    def __init__(self):
        super().__init__()
        names = ["item", "a", "b"]
        table = EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=10, feature_names=names)
        self.bags = EmbeddingBagCollection(tables=[table])
        self.layer = nn.Linear(14, 1)

    def forward(self, dense: torch.Tensor, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.layer(torch.cat([dense, self.bags(features).values()], 1)).squeeze(1)


def request() -> Request:
    """Of sizes that all differ, so that none is taken for another."""
    item = Bags(torch.arange(5) % 10, torch.tensor([2, 1, 0, 2]))
    history = Bags(torch.arange(7) % 10, torch.tensor([2, 3, 0, 2]))
    return Request(torch.rand(4, 2), {"item": item, "a": history, "b": history}, {}, {})


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "served"
    export_model(Tiny(), request(), folder, together=[("a", "b")], ranges={"a": (0, 9)})
    # What torch imports at its first load makes classes by exec.
    ServedModel.load(folder)
    return folder


def rewritten(program: Path, changes: dict) -> bytes:
    """The archive with entries replaced (bytes, or a function of their JSON), added, or left out (None)."""
    out = io.BytesIO()
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(out, "w") as new:
        names = [info.filename.partition("/")[2] for info in old.infolist()]
        for name in [*names, *(name for name in changes if name not in names)]:
            data = old.read(f"program/{name}") if name in names else b""
            change = changes.get(name, data)
            if callable(change):
                value = json.loads(data)
                change(value)
                change = json.dumps(value).encode()
            if change is not None:
                new.writestr(f"program/{name}", change)
    return out.getvalue()


def first(weights: dict) -> dict:
    return next(iter(weights["config"].values()))


def put(path: tuple, value):
    def change(graph: dict) -> None:
        at = graph
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


G = ("graph_module", "graph")
SIGNATURE = ("graph_module", "module_call_graph", 0, "signature")
TREE = '[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'
HOSTILE = {
    "pickled weight": ({WEIGHTS: lambda w: first(w).update(use_pickle=True)}, "pickle"),
    "pickled inputs": ({"data/sample_inputs/model.pt": pickle.dumps(1)}, "pickled inputs"),
    "native code": ({"data/aotinductor/model/x.so": b"\x7fELF"}, "aotinductor"),
    "legacy weights": ({"data/weights/model.pt": b"x"}, "model.pt"),
    "custom object": ({"data/constants/custom_obj_0": b"x"}, "custom_obj_0"),
    "second graph": ({"models/other.json": b"{}"}, "other.json"),
    "name of another file": ({"../x": b"x"}, "entry"),
    "another format": ({"archive_format": b"pt3"}, "archive_format"),
    "system": ({GRAPH: put((*G, "nodes", 0, "target"), "torch.os.system")}, "operator"),
    "load": ({GRAPH: put((*G, "nodes", 0, "target"), "torch.load")}, "operator"),
    "from_file": ({GRAPH: put((*G, "nodes", 0, "target"), "torch.ops.aten.from_file.default")}, "operator"),
    "loaded library": ({GRAPH: put((*G, "nodes", 0, "target"), "torch.ops.load_library")}, "operator"),
    "attrgetter": ({GRAPH: put((*G, "nodes", 0, "target"), "_operator.attrgetter")}, "operator"),
    "extension": ({GRAPH: put((*G, "nodes", 0, "target"), "#x:y")}, "operator"),
    "guard": ({GRAPH: put(("guards_code",), ["__import__('os').system('true')"])}, "expression"),
    "guard by attribute": ({GRAPH: put(("guards_code",), ["L['dense'].size.__globals__"])}, "expression"),
    "lambda": ({GRAPH: put(("guards_code",), ["(lambda: 0)()"])}, "expression"),
    "huge power": ({GRAPH: put(("guards_code",), ["9 ** 9 ** 9 > 0"])}, "expression"),
    "deep guard": ({GRAPH: put(("guards_code",), ["(" * 9000 + "1" + ")" * 9000])}, "expression|program"),
    "symbol": ({GRAPH: put(("range_constraints",), {"__import__('os')": {}})}, "name"),
    "name": ({GRAPH: put((*G, "nodes", 0, "name"), "x = __import__('os')")}, "name"),
    "line": ({GRAPH: put((*G, "nodes", 0, "name"), "x\nimport os")}, "name"),
    "argument": (
        {GRAPH: put((*SIGNATURE, "forward_arg_names"), ["x=print()"])},
        "name",
    ),
    "tree": (
        {GRAPH: put((*SIGNATURE, "in_spec"), TREE)},
        "defaultdict",
    ),
    "named tuples": ({GRAPH: put(("graph_module", "treespec_namedtuple_fields"), {"os": {}})}, "classes"),
    "metadata": ({GRAPH: put((*G, "nodes", 0, "metadata"), {"source_fn_stack": "a,torch.os"})}, "metadata"),
    "not json": ({GRAPH: b"{"}, "manifest|program"),
    "empty graph": ({GRAPH: b"{}"}, "not a program"),
    "deep json": ({GRAPH: b"[" * 100_000}, "deep"),
    "no bytes for a shape": (
        {WEIGHTS: lambda w: w["config"].update({"x": {
            "path_name": "weight_9", "is_param": False, "use_pickle": False,
            "tensor_meta": {"sizes": [{"as_int": 1 << 40}]}}}), "data/weights/weight_9": b""},
        "no bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_run_code_is_refused_before_torch_sees_it(
    served: Path, tmp_path: Path, name: str
) -> None:
    changes, words = HOSTILE[name]
    folder = resealed(served, tmp_path / "served", rewritten(served / "program.pt2", changes))
    with watched() as events, pytest.raises(ArtifactError, match=words):
        ServedModel.load(folder)
    assert strange(events, folder) == []


def resealed(served: Path, folder: Path, program: bytes) -> Path:
    """A copy with another program, all hashes made anew, as an attacker can."""
    folder.mkdir()
    (folder / "program.pt2").write_bytes(program)
    (folder / "example.safetensors").write_bytes((served / "example.safetensors").read_bytes())
    body = json.loads((served / "manifest.json").read_text())
    files = {name: record_file(folder, name)._asdict() for name in body["files"]}
    body = sealed.seal(body["kind"], body["version"], body["config"], {"files": files})
    (folder / "manifest.json").write_text(sealed.to_text(body))
    return folder


def test_bytes_around_and_below_the_archive_are_refused(served: Path) -> None:
    good = (served / "program.pt2").read_bytes()
    check_program(io.BytesIO(good), "x")
    for bad in (b"", b"x", good + b"x", good[:-1], good[: len(good) // 2], b"PK\5\6" + b"\0" * 18):
        with pytest.raises(ArtifactError):
            check_program(io.BytesIO(bad), "x")


def test_an_honest_program_runs_nothing_strange(served: Path) -> None:
    with watched() as events:
        model = ServedModel.load(served)
        model(request())
    # Sizes are expressions, which sympy evaluates: those that check_program has passed.
    assert {event for event in strange(events, served) if event != ("exec", "<string>")} == set()


def test_code_in_a_pickle_never_runs(served: Path, tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    changes = {
        WEIGHTS: lambda w: first(w).update(use_pickle=True, path_name="weight_0"),
        "data/weights/weight_0": pickle.dumps(Bomb(traces)),
    }
    folder = resealed(served, tmp_path / "served", rewritten(served / "program.pt2", changes))
    with pytest.raises(ArtifactError, match="pickle"):
        ServedModel.load(folder)
    assert not traces.exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: r.dense.__setitem__((1, 0), float("inf")), "dense: inf in row 1, column 0"),
        (lambda r: r.dense.__setitem__((0, 1), float("nan")), "dense: nan in row 0, column 1"),
        (lambda r: r.features["a"].values.__setitem__(0, 300), "feature 'a': the value 300"),
        (lambda r: r.features["a"].values.__setitem__(0, -1), "feature 'a': the value -1"),
        (lambda r: r.features["item"].lengths.__setitem__(0, -2), "feature 'item': lengths from -2"),
        (
            lambda r: r.features.update(b=Bags(torch.tensor([1]), torch.tensor([0, 1, 0, 0]))),
            "feature 'b': 0 values in row 0, 'a' has 2",
        ),
        (
            lambda r: r.features.update(b=Bags(torch.empty(0, dtype=torch.int64), torch.zeros(4).long())),
            "feature 'b': 0 values in row 0, 'a' has 2",
        ),
        (
            lambda r: r.features.update(item=Bags(torch.tensor([1, 2]), torch.tensor([-1, 3, 0, 0]))),
            "feature 'item': lengths from -1",
        ),
    ],
)
def test_requests_that_would_be_answered_wrongly_are_refused_by_name(
    served: Path, spoil, words: str
) -> None:
    asked = request()
    asked = Request(
        asked.dense,
        {n: Bags(b.values.clone(), b.lengths.clone()) for n, b in asked.features.items()},
        {},
        {},
    )
    spoil(asked)
    with pytest.raises(SidError, match=words):
        ServedModel.load(served)(asked)


def test_a_served_model_lives_on_object_storage_and_is_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHREC_SID_KEY", "0123456789abcdef")
    uri = f"memory://served/{tmp_path.name}"
    torch.manual_seed(0)
    report = export_model(Tiny(), request(), uri)
    model = ServedModel.load(uri)
    example = model.example()
    torch.testing.assert_close(model(example.request), example.outputs)
    assert report.bytes == (RemotePath(uri) / "program.pt2").size()
    monkeypatch.setenv("TORCHREC_SID_KEY", "another 16 bytes")
    with pytest.raises(ArtifactError, match="another key"):
        ServedModel.load(uri)


def test_an_export_takes_the_place_of_an_export_and_of_nothing_else(served: Path, tmp_path: Path) -> None:
    export_model(Tiny(), request(), tmp_path / "a")
    (tmp_path / "a" / "mine.txt").write_text("x")
    with pytest.raises(SidError, match=r"holds 'mine.txt', which is not of this served model"):
        export_model(Tiny(), request(), tmp_path / "a")
    assert (tmp_path / "a" / "mine.txt").read_text() == "x"
    assert ServedModel.load(tmp_path / "a").manifest.precision == "float"
