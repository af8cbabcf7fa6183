"""One reader over all cases, in a process of its own: a line of JSON a case, as it goes."""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path

from benchmarks.conformance_readers import READERS, Reader, same_rows
from benchmarks.conformance_tables import Case

_REFUSAL = re.compile(
    r"not (yet |currently )?(been )?(support|implement)|unsupported|does ?n[o']t support|"
    r"requires reader|unknown (reader )?(table )?feature|cannot read|reader version|not .*feature",
    re.IGNORECASE,
)


def anywhere(text: str) -> str:
    """An error's text without colours, processes, and the folders of this machine."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"pid=\d+, ip=[\d.]+", "...", text)
    return re.sub(
        r"(file://)?/[^ '\"]*/(site-packages|delta-tables|lepton-conformance-\w+)/", "", text
    )


def answer(reader: Reader, case: Case) -> tuple[str, str]:
    """Return the outcome (right, refused, different, error) and what there is to say of it."""
    from lepton.errors import LakeError

    try:
        found = reader.read(case)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # noqa: BLE001 - a panic is no Exception
        text = anywhere(" ".join(str(e).split()))
        meant = isinstance(e, LakeError | NotImplementedError) or _REFUSAL.search(text)
        outcome = "refused" if meant else "error"
        if case.rows is None and outcome == "refused":
            return "right", text[:300]
        return outcome, f"{type(e).__name__}: {text[:300]}"
    if case.rows is None:
        return "different", "read what it must refuse"
    if case.ask == "count":
        wrong = "" if found == len(case.rows) else f"{found}, not {len(case.rows)}"
    else:
        wrong = same_rows(found, case, case.rows)
    return ("different" if wrong else "right"), wrong


def main() -> None:
    """Answer the cases of a file from a number on; argument: reader, file, number."""
    name, path, first = sys.argv[1:4]
    cases: list[Case] = pickle.loads(Path(path).read_bytes())
    for case in cases[int(first) :]:
        outcome, detail = answer(READERS[name], case)
        print(json.dumps({"case": case.name, "outcome": outcome, "detail": detail}), flush=True)


if __name__ == "__main__":
    main()
