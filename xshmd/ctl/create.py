# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl create``: xl's own ``create``, but whole or not at all.

The daemon checks the configuration before xl is run, the guest is made paused, and it runs only
once its regions are there.  Whatever goes wrong, or a Ctrl-C, takes down what this call made, and
only that: from the moment no domain has the guest's name until xl fails, one of that name is ours.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Final

from xshmd import errors
from xshmd.ctl import render
from xshmd.ctl.signals import Signals
from xshmd.ctl.xl import Xl
from xshmd.units import human_size
from xshmd.varlink.client import Client
from xshmd.varlink.wire import MAX_CONFIG_BYTES

_SPARE_S: Final = 10
"""How much longer than the daemon we wait: its reason is better than our timeout."""
_NO_REASON: Final = (
    errors.TimedOut,
    errors.NoSuchGuest,
    errors.DaemonUnreachable,
    errors.UsageError,
)
"""What a WaitGuest that only looks replies when it knows nothing of a failure."""


def run(options: Any) -> int:
    """Create a guest with its regions; or, from a TOML file, the regions it has for the system."""
    if options.defconfig.endswith(".toml"):
        return _create_regions(options)
    text = config_text(options.defconfig, options.overrides)
    signals = Signals()
    with Client(options.socket) as client, signals.caught():
        creation = _Creation(options, client, signals)
        try:
            creation.declare(text)
            if options.dry_run:
                creation.print_plan()
                creation.undo()
                return 0
            creation.make()
        except BaseException:
            with signals.dropped():
                creation.undo()
            raise
    creation.report()
    return 0


def _create_regions(options: Any) -> int:
    if options.overrides or options.xl_flags or options.paused or options.console:
        raise errors.UsageError(
            f"{options.defconfig} has regions, not a guest: xl's options do not go with it"
        )
    # Only here: reading configurations takes longer to import than all the rest.
    from xshmd.config.files import read_regular
    from xshmd.config.toml import read_toml
    from xshmd.ctl import changes
    from xshmd.varlink.records import definition_fields

    found = read_toml(read_regular(Path(options.defconfig)), file=options.defconfig)
    if not found.regions:
        raise errors.ConfigError(
            f"{options.defconfig} defines no region that belongs to the system",
            hint="one that has an owner is made when its owner starts, if the file is in "
            "/etc/xshmd/regions.d",
            file=options.defconfig,
        )
    if found.guests:
        names = ", ".join(guest.name for guest in found.guests)
        render.say(f"{names} get nothing of it: use xshmctl attach, or /etc/xshmd/regions.d")
    return changes.apply(options, [{"add": definition_fields(each)} for each in found.regions])


def config_text(file: str, overrides: list[str]) -> str:
    """Return what xl would parse: the file, then each setting of the command line on its line.

    Raises:
        ConfigUnreadable: There is no such file, or it is no text.
    """
    try:
        data = b"" if file == "/dev/null" else Path(file).read_bytes()
        text = data.decode("utf-8")
    except OSError as exc:
        raise errors.ConfigUnreadable(
            f"{file}: {exc.strerror}", hint="see xl.cfg(5)", file=file
        ) from exc
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise errors.ConfigUnreadable(
            f"{file}:{line}: not UTF-8", hint="save it as UTF-8", file=file, place=f"line {line}"
        ) from exc
    if len(data) > MAX_CONFIG_BYTES:
        raise errors.ConfigUnreadable(
            f"{file}: {human_size(len(data))} are too much for a guest's configuration",
            hint="is it another file that you meant?",
            file=file,
        )
    return "\n".join((text, *overrides, "")) if overrides else text


class _Creation:
    """One guest on its way, and what has been begun for it."""

    def __init__(self, options: Any, client: Client, signals: Signals) -> None:
        self._options = options
        self._client = client
        self._signals = signals
        self._name = ""
        self._regions: list[str] = []
        self._xl: Xl | None = None
        self._domid: str | None = None
        self._ours = False
        """Whether a domain of this name is one that this call made."""
        self._guest: dict[str, Any] | None = None

    def declare(self, text: str) -> None:
        """Have the daemon check the configuration and expect the guest.

        Raises:
            XshmError: The daemon will not have it.
        """
        with self._signals.held():  # Not knowing the name, one could not take it back.
            declared = self._client.call("DeclareGuest", file=self._options.defconfig, text=text)
            self._name, self._regions = declared["name"], declared["regions"]
        if not self._name:
            raise errors.ConfigError(
                f"{self._options.defconfig} names no guest",
                hint='say name="..." in it or name=... on the command line',
                file=self._options.defconfig,
            )

    def xl_arguments(self) -> list[str]:
        """Return what ``xl create`` is given: always paused, never a console."""
        file = self._options.defconfig
        place = ["-f", file] if "=" in file or file.startswith("-") else [file]
        return ["-p", *(self._options.xl_flags or ()), *place, *self._options.overrides]

    def print_plan(self) -> None:
        """Print what would be done."""
        steps = [["xl", "create", *self.xl_arguments()]]
        if not self._options.paused:
            steps.append(["xl", "unpause", self._name])
        if self._options.console:
            steps.append(["xl", "console", self._name])
        if self._options.json != "off":
            plan = {"name": self._name, "regions": self._regions, "commands": steps}
            render.print_json(plan, self._options.json)
            return
        lines = [shlex.join(step) for step in steps]
        if self._regions:
            lines.insert(1, f"wait for {', '.join(self._regions)}")
        print("\n".join(render.printable(f"would {_verb(line)}{line}") for line in lines))

    def make(self) -> None:
        """Create the domain, wait for its regions and let it run.

        Raises:
            XshmError: It could not be done; :meth:`undo` is to be called.
        """
        xl = self._xl = Xl(self._signals)
        existing = xl.domid_of(self._name)
        if existing is not None:
            raise errors.Conflict(
                f"a domain called {self._name} exists already: domain {existing}",
                hint=f"end it with xl shutdown {self._name}, or choose another name",
            )
        if not self._regions:
            render.say(f"{self._options.defconfig} has no static_shm: xl create would do")
        self._ours = True
        status = xl.create(self.xl_arguments())
        if status:
            # libxl has taken its domain down itself: another of that name is somebody else's.
            self._ours = False
            raise self._reason() or errors.XshmError(
                f"xl create failed with status {status}", hint="xl's own messages are above"
            )
        self._domid = xl.domid_of(self._name)
        if self._domid is None:
            raise self._reason() or errors.NoSuchGuest(
                f"{self._name} ended as soon as it was created", hint="see /var/log/xen"
            )
        if self._regions:
            self._guest = self._wait(self._options.timeout, spare_s=_SPARE_S)
        if not self._options.paused:
            xl.unpause(self._domid)

    def _wait(self, timeout_s: int, *, spare_s: int) -> dict[str, Any]:
        reply = self._client.call_within(
            timeout_s + spare_s, "WaitGuest", name=self._name, timeoutSeconds=timeout_s
        )
        guest: dict[str, Any] = reply["guest"]
        return guest

    def _reason(self) -> errors.XshmError | None:
        """Return why the daemon had the domain destroyed, if it was that."""
        try:
            self._wait(0, spare_s=_SPARE_S)
        except _NO_REASON:
            return None
        except errors.XshmError as exc:
            return exc
        return None

    def undo(self) -> None:
        """Take down the domain if this call made one, and withdraw the declaration."""
        if self._xl is not None and self._ours:
            domid = self._domid or self._xl.domid_of(self._name)
            if domid and not self._xl.destroy(domid) and self._xl.domid_of(self._name) == domid:
                render.say(f"could not destroy domain {domid}: do it with xl destroy {domid}")
        if not self._name:
            return
        try:
            self._client.call("WithdrawGuest", name=self._name)
        except errors.XshmError as exc:
            render.say(f"could not withdraw the declaration of {self._name}: {exc.one_line()}")

    def report(self) -> None:
        """Say what was made, or become its console."""
        if self._options.console and self._xl is not None and self._domid is not None:
            self._xl.become_console(self._domid)
        if self._options.json != "off":
            render.print_json({"guest": self._guest} if self._guest else {}, self._options.json)
        elif "-q" not in (self._options.xl_flags or ()):
            regions = ", ".join(self._regions) or "no regions"
            state = "paused" if self._options.paused else "running"
            text = f"{self._name}: domain {self._domid}, {state}, with {regions}"
            print(render.printable(text))


def _verb(line: str) -> str:
    return "" if line.startswith("wait ") else "run: "
