"""The benchmark runs, its systems agree on the pieces, and its rows have exactly the agreed fields."""

import json

from apps.bench import tables


def test_quick_run_writes_every_row(monkeypatch, tmp_path):
    path = tmp_path / "tables.json"
    monkeypatch.setattr("sys.argv", ["tables", "--quick", "--json", str(path)])
    tables.main()
    rows = json.loads(path.read_text())["rows"]
    assert all(set(row) == {"case", "system", "pass", "ms", "peak_mb"} for row in rows)
    assert all(row["ms"] > 0 and row["peak_mb"] >= 0 for row in rows)
    cases = {}
    for row in rows:
        cases.setdefault((row["case"], row["pass"]), set()).add(row["system"])
    for case in ("bags_4096x10", "history_64x4096"):
        for step in ("forward", "forward+backward"):
            assert cases.pop((case, step)) == {"raw_id", "hashed_prefix", "sentencepiece", "side"}
            assert cases.pop((f"{case}_equal_lookups", step)) == {"raw_id", "hashed_prefix"}
            assert cases.pop((f"{case}_equal_lookups_sharded", step)) == {"raw_id", "hashed_prefix"}
    assert cases == {
        (f"tokenise_{levels}_levels_{model}", "forward"): {"spm_tensor", "spm_python"}
        for levels in (4, 8)
        for model in ("unigram", "bpe")
    }
