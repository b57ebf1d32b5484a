from pathlib import Path

import pytest

from llmos_cli.errors import UsageError
from llmos_cli.remote.open import normal_url


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("S3://bucket/team/models/", "s3://bucket/team/models"),
        ("s3a://bucket/x", "s3://bucket/x"),
        ("s3://bucket/x?endpoint=http://127.0.0.1:7480", "s3://bucket/x?endpoint=http://127.0.0.1:7480"),
        (
            "s3://b-1/x?region=eu-1&endpoint=https://s3.example.org",
            "s3://b-1/x?endpoint=https://s3.example.org&region=eu-1",
        ),
        ("s3://bucket/x?endpoint=http://[::1]:7480", "s3://bucket/x?endpoint=http://[::1]:7480"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("az://container/x?account=team", "az://container/x?account=team"),
        ("abfs://container/x", "az://container/x"),
    ],
)
def test_an_address_is_kept_in_one_form(text: str, kept: str) -> None:
    assert normal_url(text, Path("/work")) == kept
    assert normal_url(kept, Path("/work")) == kept


@pytest.mark.parametrize(
    "text",
    [
        "s3:",
        "s3://",
        "s3:bucket/x",
        "s3:///x",
        "s3://b",
        "s3://bucket/../x",
        "s3://bucket/a//b",
        "s3://bucket/%2e%2e/x",
        "s3://bucket/a b",
        "s3://bucket/.hidden",
        "s3://bucket/x#part",
        "s3://bucket:80/x",
        "s3://bucket/x?endpoint=ftp://host",
        "s3://bucket/x?endpoint=http://host/?x=1",
        "s3://bucket/x?endpoint=http://a&endpoint=http://b",
        "s3://bucket/x?region=a\nb",
        "gs://bucket/x?region=eu",
    ],
)
def test_a_malformed_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="malformed"):
        normal_url(text, Path("/work"))


@pytest.mark.parametrize(
    "text",
    [
        "s3://KEY:canary-secret@bucket/x",
        "s3://bucket/x?secret_access_key=canary-secret",
        "s3://bucket/x?endpoint=http://user:canary-secret@host",
        "az://container/x?sas_token=canary-secret",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        normal_url(text, Path("/work"))
    assert "canary" not in f"{caught.value.message} {caught.value.hint}"
