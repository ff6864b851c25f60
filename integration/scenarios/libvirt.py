# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scenarios with libvirt speak of guests too: what it is asked and how is said here."""

from __future__ import annotations

import contextlib
import signal
import uuid
from xml.sax.saxutils import escape

from integration import Completed
from integration.scenarios.guest import Guest
from integration.scenarios.host import CONFIGS, WAIT_S, Host

OWN = "/etc/xshmd/guests.d"
SETTINGS = "/run/libvirtd.conf"
LOG = "/var/log/libvirt/libvirtd.log"
OLDEST_CPU = "/usr/share/libvirt/cpu_map/x86_486.xml"
# Debian's own are for a machine that was installed: a group of its own, and polkit.
_SETTINGS_TEXT = 'unix_sock_group = "root"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\n'


class Libvirt:
    """libvirtd with its driver for Xen, and virsh."""

    def __init__(self, host: Host) -> None:
        self.host = host
        host.dom0.put(SETTINGS, _SETTINGS_TEXT)
        # libvirt's driver for Xen does not start on a processor that is none of those it knows
        # (libxlCapsInitCPU), and all of those have VME, which QEMU does not emulate.
        host.dom0.run(["sed", "-i", "/vme/d", OLDEST_CPU])
        self.start()

    def start(self) -> None:
        """Start libvirtd, and wait until its driver answers."""
        log = {"LIBVIRT_LOG_OUTPUTS": f"2:file:{LOG}", "LIBVIRT_LOG_FILTERS": "3:object 3:event"}
        self._daemon = self.host.dom0.spawn(["libvirtd", "-f", SETTINGS], env=log)
        self.host.wait(self._answers, "libvirt answers")

    def _answers(self) -> bool:
        answered = not self.virsh("list", check=False).status
        if not answered:
            with contextlib.suppress(TimeoutError):
                self._daemon.wait(0)
                log = self.host.dom0.run(["tail", LOG], check=False).text
                raise AssertionError(f"libvirtd ended, and said:\n{log}")
        return answered

    def stop(self) -> None:
        """End libvirtd; guests go on."""
        self._daemon.kill(signal.SIGTERM)
        self._daemon.wait(WAIT_S)

    def virsh(self, *words: str, check: bool = True) -> Completed:
        command = ["virsh", "-c", "xen:///", *words]
        return self.host.dom0.run(command, check=check, timeout_s=2 * WAIT_S)

    def write(self, guest: Guest) -> str:
        """Write a guest's XML, and what it shares to where xshmd looks; the path of the XML."""
        path = f"{CONFIGS}/{guest.name}.xml"
        self.host.dom0.put(path, domain_xml(guest))
        if guest.entries:
            self.host.dom0.put(f"{OWN}/{guest.name}.cfg", guest.own_file())
        return path

    def create(self, guest: Guest, *, check: bool = True) -> Completed:
        """`virsh create`."""
        self.host.created.append(guest)
        return self.virsh("create", self.write(guest), check=check)

    def destroy(self, *guests: Guest) -> None:
        for guest in guests:
            self.virsh("destroy", guest.name)

    def state(self, guest: Guest) -> str:
        """What libvirt says of it; empty if it knows none of that name."""
        return self.virsh("domstate", guest.name, check=False).text.strip()

    def names(self) -> list[str]:
        """Every domain that it lists, running or not, but dom0."""
        listed = self.virsh("list", "--all", "--name").text.split()
        return [name for name in listed if name != "Domain-0"]


def domain_xml(guest: Guest) -> str:
    """A PVH guest as libvirt wants it said: as `Guest.config`, without what it shares."""
    boot = dict(guest.files)
    if "ramdisk" in boot:
        boot["initrd"] = boot.pop("ramdisk")
    boot["cmdline"] = guest.words
    files = "".join(f"<{key}>{escape(value)}</{key}>" for key, value in boot.items())
    name = uuid.uuid5(uuid.NAMESPACE_DNS, guest.name)
    return f"""\
<domain type="xen">
  <name>{guest.name}</name>
  <uuid>{name}</uuid>
  <memory unit="MiB">{guest.ram_mib}</memory>
  <vcpu>1</vcpu>
  <cputune><vcpupin vcpu="0" cpuset="1"/></cputune>
  <os><type arch="x86_64">xenpvh</type>{files}</os>
  <clock offset="utc"><timer name="tsc" mode="native"/></clock>
  <on_reboot>restart</on_reboot>
</domain>
"""
