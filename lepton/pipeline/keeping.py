"""Changing what is said of a model version, and deleting one, for the command line."""

from __future__ import annotations

import argparse


def add_changes(command: argparse.ArgumentParser) -> None:
    """Add the flags that :func:`change_version` obeys."""
    command.add_argument("model", nargs="?", help="only this one")
    command.add_argument("version", type=int, nargs="?", help="the one to change")
    command.add_argument("--at", metavar="TIME", help="as it was then, such as 2026-11-21T12:00Z")
    for flag, shown, about in (
        ("--tag", "NAME=TEXT", "set a tag; NAME= takes it away"),
        ("--note", "TEXT", "replace the note"),
        ("--protect", None, "let nobody delete it"),
        ("--unprotect", None, "let it be deleted again"),
        ("--delete", None, "take it out of the registry, for good"),
    ):
        if shown:
            command.add_argument(flag, metavar=shown, help=about, dest="changes", action=_Change)
        else:
            command.add_argument(flag, help=about, dest="changes", action=_Change, nargs=0)


class _Change(argparse.Action):
    """Keeps the changes asked for, in their order."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        former = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*former, (str(option_string), values)])


def change_version(arguments: argparse.Namespace) -> None:
    """Do what the flags say, in one event; a deletion by itself.

    Raises:
        ValueError: no version is named, or flags do not go together.
        RegistryError: there is no such version, or it may not be deleted.
    """
    from lepton.lake import home_of
    from lepton.registry import Registry

    asked: list[tuple[str, str]] = arguments.changes
    if arguments.model is None or arguments.version is None:
        raise ValueError("name the model and the version to change, such as: models digits 3")
    registry = Registry(f"{home_of(arguments.home)}/registry")
    names = [flag for flag, _ in asked]
    if "--delete" in names:
        if len(names) > 1:
            raise ValueError("--delete goes with no other change")
        registry.delete(arguments.model, arguments.version, reason="by hand")
        return
    if "--protect" in names and "--unprotect" in names:
        raise ValueError("--protect and --unprotect do not go together")
    registry.describe(
        arguments.model,
        arguments.version,
        tags=dict(_tag(text) for flag, text in asked if flag == "--tag"),
        note=next((text for flag, text in reversed(asked) if flag == "--note"), None),
        protected={"--protect": True, "--unprotect": False}.get(
            next((n for n in names if n.endswith("protect")), "")
        ),
    )


def _tag(text: str) -> tuple[str, str | None]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--tag {text!r} must be NAME=TEXT, or NAME= to take it away")
    return name, value or None
