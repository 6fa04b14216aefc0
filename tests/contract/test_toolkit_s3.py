"""The S3 repository against an S3-compatible server."""

from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

from drumline.toolkit import File, S3Repository
from drumline.toolkit.fetch import fetch


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        patch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        boto3.client("s3", endpoint_url=url).create_bucket(
            Bucket="pictures", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
        )
        yield url
    finally:
        server.stop()
        patch.undo()


def test_a_file_is_uploaded_and_its_signed_url_works(endpoint):
    file = File.from_bytes(b"abc", "image/png", "cat.png", S3Repository("pictures", "/out/", endpoint=endpoint))
    assert "Signature" in file.url
    assert fetch(file.url, allow_private=True) == (b"abc", "image/png")
    assert File(url=file.url).as_bytes(allow_private=True) == b"abc"


def test_by_the_environment_and_with_a_public_url(endpoint, monkeypatch):
    specification = f"s3://pictures/public?url=https://cdn.test/pictures&endpoint={endpoint}"
    monkeypatch.setenv("DRUMLINE_FILES", specification)
    file = File.from_bytes(b"abc", file_name="cat.txt")
    name = file.url.removeprefix("https://cdn.test/pictures/")
    stored = boto3.client("s3", endpoint_url=endpoint).get_object(Bucket="pictures", Key=f"public/{name}")
    assert stored["Body"].read() == b"abc"
    assert stored["ContentType"] == "text/plain"
    assert name.endswith(".txt")
