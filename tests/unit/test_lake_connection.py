"""Options that open a table open obstore's stores too: what one does not know is left out."""

from typing import Any

import obstore
import pytest

from lepton.checkpoints.bucket import Bucket
from lepton.errors import CheckpointError
from lepton.lake.connection import connection

KEPT = {"aws_region": "us-east-1", "aws_endpoint_url": "http://127.0.0.1:9"}
MORE = {
    "timeout": "3s",
    "connect_timeout": "2s",
    "pool_idle_timeout": "9s",
    "retry_timeout": "1s",
    "user_agent": "me",
    "proxy_url": "http://127.0.0.1:8",
    "max_retries": "4",
    "AWS_ALLOW_HTTP": "true",
    "AWS_S3_ALLOW_UNSAFE_RENAME": "true",
    "aws_conditional_put": "disabled",
    "delta_log_something": "1",
}


def plain(config: Any) -> dict[str, str]:
    return {k.removeprefix("aws_"): str(v) for k, v in config.items()}


@pytest.mark.parametrize("cut", [0, 4])
def test_names_with_and_without_the_clouds_and_what_only_deltalake_knows(cut: int) -> None:
    options = {k[cut:].upper() if cut else k: v for k, v in KEPT.items()} | MORE
    store = connection("s3://bucket/folder", options)
    found = plain(store.config)

    assert set(KEPT.values()) < set(found.values())
    assert "conditional_put" not in found
    assert store.client_options["allow_http"]
    assert store.retry_config["max_retries"] == 4


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("s3://bucket/runs", KEPT | MORE),
        ("az://folder/runs", {"account_name": "me", "azure_storage_account_key": "bWU=", **MORE}),
        ("abfss://folder@me.dfs.core.windows.net/runs", {"access_key": "bWU=", **MORE}),
        ("gs://bucket/runs", {"google_skip_signature": "true", **MORE}),
    ],
)
def test_checkpoints_take_the_options_of_tables(url: str, options: dict[str, str]) -> None:
    assert Bucket(url, options).where == url


def test_what_nothing_knows_is_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot reach checkpoints on ftp://somewhere/runs"):
        Bucket("ftp://somewhere/runs", MORE)


def test_the_environment_decides_what_no_option_says(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "open", "AWS_ALLOW_HTTP": "true"}
    for name, value in {**told, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    store = connection("s3://bucket/folder", {})

    with pytest.raises(Exception, match="error sending request"):  # it was allowed to ask
        obstore.list_with_delimiter(connection("s3://bucket/folder", {"max_retries": "0"}))
    assert store.client_options is None
