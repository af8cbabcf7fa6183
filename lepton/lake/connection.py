"""Object stores by obstore, with the storage options that a table's reader takes.

deltalake and obstore share most options and not all: what only deltalake knows means nothing here,
and what concerns the connection obstore takes apart, or it does not outlive the sight of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

_PLAIN = ("allow_http", "aws_allow_http", "azure_allow_http", "google_allow_http")
_OF_CLIENTS = re.compile(
    r"(aws_|azure_|google_)?"
    r"(http[12]_.*|pool_.*|proxy_.*|.*timeout|allow_.*|user_agent|default_.*|randomize_addresses)"
)
_PUT = "aws_conditional_put"  # which lepton rests on, whatever a table's options say


def connection(url: str, options: Mapping[str, str]) -> Any:
    """Return obstore's store of a folder.

    Args:
        url: such as ``s3://bucket/prefix``.
        options: as deltalake takes them, whatever their case, with or without the cloud's name.

    Raises:
        ImportError: obstore is not installed.
        Exception: obstore's, one class for each trouble: URL or options mean nothing to it.
    """
    stores: Any = import_module("obstore.store")
    errors: Any = import_module("obstore.exceptions")
    low = {k.lower(): v for k, v in options.items()}
    client: dict[str, Any] = {k: low[k] for k in ("timeout", "connect_timeout") if k in low}
    plain = [low[k].lower() in ("true", "1", "yes") for k in _PLAIN if k in low]
    if plain:  # else the environment decides
        client["allow_http"] = any(plain)
    retries = {"max_retries": int(low["max_retries"])} if "max_retries" in low else None

    def known(one: dict[str, str]) -> bool:
        try:
            stores.from_url(url, config=one, client_options=client or None)
        except errors.UnknownConfigurationKeyError:
            return False  # deltalake's own
        except errors.BaseError:
            return True  # alone it may be too little
        return True

    config = {
        k: v for k, v in low.items() if k != _PUT and not _OF_CLIENTS.fullmatch(k) and known({k: v})
    }
    return stores.from_url(
        url, config=config or None, client_options=client or None, retry_config=retries
    )
