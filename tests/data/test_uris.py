"""A log in a bucket of an S3 server gives the log of the same files on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from apps.inspect import main as inspect
from apps.prepare_log import main as prepare_log
from tests.data.logs import all_examples
from tests.stranger import write_stranger
from torchrec_sid.data import LogFolder, PreparedLog, Specification, prepare
from torchrec_sid.errors import SidError


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("shops")
    yield "shops"
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


def test_a_folder_on_s3_gives_the_log_of_a_local_one(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import s3fs

    folder = write_stranger(tmp_path / "shop", events=600)
    s3fs.S3FileSystem().put(str(folder), f"{bucket}/shop", recursive=True)
    uri = f"s3://{bucket}/shop"
    drafts = []
    for data in (str(folder), uri):
        draft = tmp_path / f"draft{len(drafts)}.yaml"
        inspect(["--data", data, "--output", str(draft)])
        drafts.append(draft.read_text())
        out = str(tmp_path / f"out{len(drafts)}")
        prepare_log(["--data", data, "--output", out, "--specification", str(draft)])
    assert drafts[0] == drafts[1] and "600 rows in" in capsys.readouterr().out
    here, there = (PreparedLog.open(tmp_path / f"out{n}") for n in (1, 2))
    assert all_examples(here) == all_examples(there) and here.fingerprint == there.fingerprint
    # The folder's own specification is read from there too, and what is not there is named.
    s3fs.S3FileSystem().pipe_file(f"{bucket}/shop/specification.yaml", drafts[0].encode())
    prepare_log(["--data", uri, "--output", str(tmp_path / "own")])
    assert PreparedLog.open(tmp_path / "own").specification == Specification.from_plain(
        Specification.read(tmp_path / "draft0.yaml").to_plain()
    )
    with pytest.raises(SidError, match="s3://shops/none: no such folder"):
        LogFolder.open(f"s3://{bucket}/none")
    s3fs.S3FileSystem().rm(f"{bucket}/shop/items.parquet")
    with pytest.raises(SidError, match=r"s3://shops/shop/items.parquet: no such file"):
        prepare(uri, tmp_path / "no")  # type: ignore[arg-type]
