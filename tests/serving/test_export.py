"""Exported programs answer as the model does, at every size, in a process that knows none of its code."""

import logging
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from tests.serving.models import HISTORY, ITEMS, LONGEST, SPEC, USERS, Ranker, make_request
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.serving.exporter import ExportOptions, export_model
from torchrec_sid.serving.request import Bags
from torchrec_sid.serving.served_model import ServedModel

# Rows start uniform within 1 / sqrt(rows): int8 splits that into 255 steps, int4 into 15.
QUANTIZATION = {"float": 0.0, "int8": 5e-3, "int4": 1e-1}


@torch.no_grad()
def eager(model, request):
    kjt = KeyedJaggedTensor(
        keys=list(request.features),
        values=torch.cat([bags.values for bags in request.features.values()]),
        lengths=torch.cat([bags.lengths for bags in request.features.values()]),
        stride=request.rows,
    )
    return model(request.dense, kjt, **request.extras)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return Ranker()


@pytest.fixture(scope="module")
def exports(model, tmp_path_factory):
    """Precision -> report. One module scope: an export takes seconds."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    reports = {}
    # torch writes thousands of debug records while it traces, and pytest keeps each.
    logging.disable(logging.DEBUG)
    for precision in ("float", "int8", "int4"):
        folder = tmp_path_factory.mktemp(precision)
        options = ExportOptions(precision)
        reports[precision] = export_model(
            model, make_request(), folder, options, max_lengths=HISTORY, identity={"run": 1}
        )
    logging.disable(logging.NOTSET)
    assert [type(module) for module in model.modules()] == kinds, "the model is not changed"
    after = dict(model.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return reports


@pytest.fixture(scope="module")
def served(exports):
    return {name: ServedModel.load(report.folder) for name, report in exports.items()}


@pytest.mark.parametrize("precision", QUANTIZATION)
def test_it_answers_as_the_model_at_every_size(model, exports, served, precision):
    limit, report = QUANTIZATION[precision], exports[precision]
    assert report.difference <= 1e-5
    assert (report.quantization > 0) == (limit > 0)
    for request in (
        *(make_request(rows, seed) for rows, seed in ((1, 2), (2, 3), (5, 4), (64, 5))),
        make_request(3).without_values(list(HISTORY)),
        make_request(1).without_values([*HISTORY, "item", "other"]),
    ):
        found = served[precision](request)
        assert found.shape == (request.rows,)
        torch.testing.assert_close(found, eager(model, request), atol=limit + 1e-5, rtol=0)
    assert float(served[precision](make_request(64, 5)).std()) > 0.1, "equal answers would compare nothing"


def test_quantized_programs_are_smaller_and_say_how_far_off_they_are(exports, served):
    sizes = [sum(_table_bytes(model)) for model in served.values()]
    assert sizes == sorted(sizes, reverse=True)
    for precision, model in served.items():
        assert model.manifest.difference_to_float == exports[precision].quantization
        assert exports[precision].quantization <= QUANTIZATION[precision]
        assert model.manifest.identity == {"run": 1}


def _table_bytes(model):
    """Bytes of what is as large as a table."""
    with zipfile.ZipFile(model.folder / "program.pt2") as archive:
        return [i.file_size for i in archive.infolist() if "/weights/" in i.filename and i.file_size > 500]


PROGRAM = """
import sys, torch, safetensors.torch, fbgemm_gpu
for name in ("torchrec", "torchrec_sid", "apps", "tests"):
    sys.modules[name] = None  # importing it is now an error
folder = sys.argv[1]
rank = torch.export.load(f"{folder}/program.pt2").module()
t = safetensors.torch.load_file(f"{folder}/example.safetensors")
features = {n[7:]: (t[n], t["lengths/" + n[7:]]) for n in t if n.startswith("values/")}
names = sys.argv[2].split(",")
extras = {n[6:]: t[n] for n in t if n.startswith("extra/")}
print(float((rank(t["dense"], {n: features[n] for n in names}, extras) - t["outputs"]).abs().max()))
"""


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_a_fresh_process_needs_torch_and_fbgemm_alone(served, tmp_path, precision):
    model = served[precision]
    names = ",".join(model.inputs.features)
    command = [sys.executable, "-I", "-c", PROGRAM, str(model.folder), names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) <= 1e-5


def test_nothing_in_the_folder_is_a_pickle(exports):
    folder = exports["int8"].folder
    with zipfile.ZipFile(folder / "program.pt2") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    assert not [c for c in contents if c[:2] == b"PK" or (c[:1] == b"\x80" and c[-1:] == b".")]
    assert {path.name for path in folder.iterdir()} == {
        "program.pt2",
        "manifest.json",
        "example.safetensors",
    }


def spoil(request, name, **changes):
    bags = request.features[name]
    return request._replace(features={**request.features, name: bags._replace(**changes)})


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


R = make_request()
LONG = torch.full((R.rows,), LONGEST + 1)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (R._replace(dense=R.dense[:, :2]), "dense.*\\(7, 2\\).*\\[B, 3\\]"),
        (R._replace(features=without(R.features, "user")), "'user'.*missing"),
        (R._replace(features={**R.features, "new": R.features["user"]}), "'new'.*not read"),
        (R._replace(extras={}), "'item_bytes'.*missing"),
        (R._replace(extras={"item_bytes": R.extras["item_bytes"].long()}), "'item_bytes'.*int64"),
        (spoil(R, "user", values=R.features["user"].values.float()), "'user'.*float32"),
        (spoil(R, "user", values=R.features["user"].values.view(-1, 1)), "'user'.*1\\)"),
        (spoil(R, "user", lengths=R.features["user"].lengths[:-1]), "'user'.*6 lengths for 7"),
        (spoil(R, "user", lengths=R.features["user"].lengths + 1), "'user'.*sum to"),
        (spoil(R, "history", values=torch.zeros(49).long(), lengths=LONG), "'history'.*newest 6"),
    ],
)
def test_bad_requests_are_named(served, request_, says):
    with pytest.raises(SidError, match=says):
        served["float"](request_)


def test_a_sid_outside_its_alphabet_stops_the_program(served):
    values = R.features["item"].values.clone()
    values[0] = SPEC.pack(torch.tensor([[1, 1, 4]])) + 1
    with pytest.raises(RuntimeError, match="feature 'item': a packed SID is outside its alphabet"):
        served["float"](spoil(R, "item", values=values))


@pytest.mark.parametrize("precision", QUANTIZATION)
def test_an_id_beyond_its_table_stops_every_precision(served, precision):
    values = R.features["user"].values.clone()
    values[0] = USERS
    says = "valid range" if precision == "float" else "'user': an id is outside its table of 20 rows"
    with pytest.raises((RuntimeError, IndexError), match=says):
        served[precision](spoil(R, "user", values=values))


def test_unknown_items_are_served_like_each_other(served):
    known, one, other = (
        served["float"](spoil(R, "other", values=torch.full_like(R.features["other"].values, i)))
        for i in (7, 7 * ITEMS, 8)
    )
    assert torch.equal(one, other)
    assert not torch.equal(known, one)


@pytest.mark.parametrize("name", ["program.pt2", "manifest.json", "example.safetensors"])
def test_damaged_folders_are_refused(exports, tmp_path, name):
    shutil.copytree(exports["float"].folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content if name != "manifest.json" else content[: len(content) // 2])
    with pytest.raises(ArtifactError):
        ServedModel.load(tmp_path).example()
    path.unlink()
    with pytest.raises(ArtifactError, match=r"no such file|has no manifest"):
        ServedModel.load(tmp_path).example()


class Branches(nn.Module):
    def forward(self, dense, features):
        return dense.sum(1) if float(dense.sum()) > 0 else dense.sum(1) * 2


class Forgets(nn.Module):
    """Python decides by the size of the example, which a trace cannot see."""

    def forward(self, dense, features):
        return dense.sum(1) * (0.0 if torch.compiler.is_compiling() else 1.0)


@pytest.mark.parametrize(
    ("make", "change", "says"),
    [
        (Branches, {}, "cannot be traced"),
        (Forgets, {}, "differs from the model by"),
        (Ranker, {"rows": 1}, "1 rows"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path, make, change, says):
    request = make_request(**change)
    if make is not Ranker:
        request = request._replace(extras={})
    with pytest.raises(SidError, match=says):
        export_model(make(), request, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_example_shows_every_feature(tmp_path):
    with pytest.raises(SidError, match="'other'.*0 values"):
        export_model(Ranker(), make_request().without_values(["other"]), tmp_path)
    with pytest.raises(SidError, match="tolerance"):
        ExportOptions(tolerance=0.0)
    with pytest.raises(SidError, match="precision"):
        export_model(Ranker(), make_request(), tmp_path, ExportOptions("int2"))


def test_taken_rows_are_those_rows():
    request = make_request(5)
    taken = request.take([3, 0, 3])
    for name, bags in request.features.items():
        pieces = bags.values.split(bags.lengths.tolist())
        assert torch.equal(taken.features[name].values, torch.cat([pieces[i] for i in (3, 0, 3)]))
    events = {"bytes": torch.arange(len(request.features["history"].values))}
    with_events = request._replace(extras=events, rows_of={"bytes": "history"}).take([4, 1])
    pieces = events["bytes"].split(request.features["history"].lengths.tolist())
    assert torch.equal(with_events.extras["bytes"], torch.cat([pieces[4], pieces[1]]))
    assert isinstance(taken.features["user"], Bags)


class Halves(nn.Module):
    """Not a number where the first dense feature is above a half."""

    def forward(self, dense, features, **extras):
        logits = dense.sum(1) + features.lengths().sum()
        return torch.where(dense[:, 0] > 0.5, logits * torch.nan, logits)


def test_a_program_that_answers_with_no_number_is_refused(tmp_path):
    request = make_request(8)
    nothing = request._replace(dense=request.dense * 0)
    request.dense[:, 0] = 1
    with pytest.raises(SidError, match="differs from the model by nan"):
        export_model(Halves(), request, tmp_path / "served", max_lengths=HISTORY)
    assert not (tmp_path / "served").exists()
    assert export_model(Halves(), nothing, tmp_path / "served", max_lengths=HISTORY).difference == 0
