"""The quantizer bench: its schema, its measures against systems whose answer is known, its tree."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from apps.bench.planted_tree import main as tree_main
from apps.bench.planted_tree import planted_tree, purity
from apps.bench.quantizer_systems import Fitted, System, full_name, systems
from apps.bench.quantizers import BenchConfig, Row, _nearest, _split, main, measure, table
from torchrec_sid.errors import SidError

SCHEMA = {
    "dataset": str,
    "system": str,
    "bits": float,
    "fvu": float,
    "fit_s": float,
    "encode_items_per_s": float,
    "decoder_floats": int,
    "unique": int,
    "recall10": float,
    "seed": int,
}


def known(decode: str) -> System:
    """A system that remembers everything, or nothing but the mean."""

    def fit(x: Tensor, bits: int, seed: int) -> Fitted:
        if decode == "all":
            return Fitted(lambda y: y, lambda codes: codes, bits, 7)
        mean = x.mean(0)
        zeros = torch.zeros(1, 1, dtype=torch.int64)
        return Fitted(lambda y: zeros.expand(len(y), 1), lambda c: mean.expand(len(c), -1), bits, 7)

    return System("known", fit)


def test_systems_whose_answer_is_known() -> None:
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    split = _split(x, 0)
    everything = measure("x", known("all"), split, 24, 0)
    assert (everything.fvu, everything.recall10, everything.unique) == (0.0, 1.0, 200)
    assert everything.decoder_floats == 7 and everything.system == "torchrec_sid.known"
    nothing = measure("x", known("mean"), split, 24, 0)
    assert nothing.fvu == pytest.approx(1, abs=0.05) and nothing.recall10 < 0.3 and nothing.unique == 1


def test_a_split_leaks_nothing_and_depends_on_the_seed() -> None:
    x = torch.arange(500.0).unsqueeze(1)
    one, again, other = _split(x, 0), _split(x, 0), _split(x, 1)
    assert len(one.held_out) == 100 and one.queries == 25
    assert sorted(torch.cat([one.fit, one.held_out]).flatten().tolist()) == list(range(500))
    assert torch.equal(one.held_out, again.held_out) and not torch.equal(one.held_out, other.held_out)
    base = one.held_out[one.queries :]
    brute = (one.held_out[: one.queries] - base.T).abs().sort(dim=1, stable=True).values[:, :10]
    found = (one.held_out[: one.queries, :1] - base[one.neighbours].squeeze(2)).abs().sort(dim=1).values
    assert torch.equal(found, brute) and _nearest(base[:3], base).shape == (3, 10)


def test_rows_have_the_schema_and_ours_hold_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    (tmp_path / "shop").mkdir()
    x = planted_tree(1500, dim=24, rank=16).x
    np.save(tmp_path / "shop" / "item_emb.npy", x.numpy().astype(np.float16))
    chosen = "[torchrec_sid.ResidualKMeans,torchrec_sid.DiscretePca,faiss.RQ.beam1,faiss.PQ,faiss.Kmeans]"
    file = tmp_path / "rows.json"
    arguments = ["--data", str(tmp_path), "--datasets", "[shop]", "--systems", chosen, "--json", str(file)]
    main([*arguments, "--seeds", "2", "--bits", "[16]", "--threads", "1"])
    rows = json.loads(file.read_text())["rows"]
    assert all({name: type(value) for name, value in row.items()} == SCHEMA for row in rows)
    ours = {f"torchrec_sid.{name}" for name in ("ResidualKMeans", "ResidualKMeans.beam", "DiscretePca")}
    theirs = {f"faiss.{name}" for name in ("RQ.beam1", "RQ.beam1.encode5", "Kmeans.residual", "PQ")}
    expected = ours | theirs
    assert {row["system"] for row in rows} == expected and {row["seed"] for row in rows} == {0, 1}
    assert "faiss.PQ" in capsys.readouterr().out
    for seed in (0, 1):
        fvu = {row["system"]: row["fvu"] for row in rows if row["seed"] == seed}
        assert fvu["torchrec_sid.ResidualKMeans"] < fvu["faiss.RQ.beam1"] < fvu["faiss.PQ"]
        assert fvu["torchrec_sid.ResidualKMeans"] < fvu["faiss.Kmeans.residual"]
        assert fvu["torchrec_sid.ResidualKMeans.beam"] < fvu["torchrec_sid.ResidualKMeans"]


def test_names_and_means() -> None:
    names = {full_name(system) for system in systems()}
    ours = ("ResidualKMeans", "ResidualKMeans.beam", "RqVae", "DiscretePca", "VqFusion")
    assert {f"torchrec_sid.{name}" for name in ours} | {"faiss.RQ.beam1", "faiss.RQ.beam5"} <= names
    rows = [Row("x", "s", 24.0, fvu, 1.0, 10.0, 5, 6, 0.5, seed) for seed, fvu in enumerate((0.1, 0.3))]
    out = table("x", rows)
    assert list(out.columns[6].cells) == ["0.2000"] and out.row_count == 1


def test_the_tree_is_a_tree() -> None:
    tree = planted_tree(4000, seed=1)
    assert tree.x.shape == (4000, 192) and torch.allclose(tree.x.norm(dim=1), torch.ones(4000))
    assert torch.equal(tree.subtopic // 16, tree.topic) and int(tree.topic.max()) == 63
    assert torch.linalg.matrix_rank(tree.x[:200]) == 32
    centres = torch.stack([tree.x[tree.topic == t].mean(0) for t in range(64)])
    assert float((torch.cdist(tree.x, centres).argmin(1) == tree.topic).float().mean()) > 0.9


def test_purity_and_the_tree_command(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    codes, labels = torch.tensor([[0, 1], [0, 1], [0, 2], [5, 1]]), torch.tensor([0, 1, 1, 7])
    assert purity(codes[:, :1], labels) == 0.75 and purity(codes, labels) == 0.75
    assert purity(torch.arange(4).unsqueeze(1), labels) == 1.0
    tree_main(["--items", "2500", "--seeds", "1", "--threads", "1"])
    out = capsys.readouterr().out
    assert out.count("ResidualKMeans") == 3 and out.count("faiss.RQ fitted with beam 1") == 2


@pytest.mark.parametrize("fields", [{"bits": (20,)}, {"bits": (8,)}, {"seeds": 0}])
def test_bad_options_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(SidError, match=next(iter(fields))):
        BenchConfig(**fields)  # type: ignore[arg-type]


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    for option in ("--datasets", "--systems"):
        with pytest.raises(SystemExit, match="nothing"):
            main(["--data", str(tmp_path), option, "[nothing]"])
