# SPDX-License-Identifier: LGPL-2.1-or-later
"""What regions that guests map themselves can be, and on which hosts.

"security" in the sources below is reference/security.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from xshmd.machine import Arch, HostInfo
from xshmd.model import DOMAIN_0, Backing, GuestConfig, Isolation, Transport
from xshmd.policy.definitions import Definition, Said
from xshmd.policy.findings import Findings, refused
from xshmd.policy.host import security_module


def grant_under_silo(config: GuestConfig, host: HostInfo) -> Findings:
    """Under SILO no guest maps what another domain but dom0 granted (security, section 3).

    xen/xsm/silo.c, silo_grant_mapref(); the module is Xen's own choice on Arm, where its
    configuration says so (xen/common/Kconfig, XSM_SILO_DEFAULT).
    """
    if config.name == DOMAIN_0 or security_module(host) != "silo":
        return
    how = "xsm=silo" if "xsm=silo" in host.xen_command_line.split() else "silo, its own choice,"
    yield refused(
        "grant-under-silo",
        config.requests[0].place,
        f"guest '{config.name}' is to map region '{config.requests[0].region_id}' from grants,"
        f" but this Xen runs with {how} and lets guests map grants of dom0 alone",
        "boot Xen with xsm=dummy on its command line, or say transport=physmap",
    )


def grant_backing(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """Only a domain's own RAM can be granted (get_paged_frame(), common/grant_table.c)."""
    terms = definition.terms
    if terms.transport is Transport.GRANT and terms.backing is Backing.HOST:
        yield refused(
            "grant-backing",
            definition.place,
            f"region '{definition.region_id}' asks for transport=grant with backing=host, and"
            " memory of the host belongs to no domain that could grant it",
            "say transport=physmap, or leave the host address out",
        )


def grant_sealed(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """Whoever maps a region itself cannot be sealed off from it, and need not be.

    Each member reaches what it was granted and nothing else, which is more than ``sealed`` says;
    but it may keep what it has mapped, which is less.
    """
    if (definition.terms.transport, definition.terms.isolation) == (
        Transport.GRANT,
        Isolation.SEALED,
    ):
        yield refused(
            "grant-sealed",
            definition.place,
            f"region '{definition.region_id}' asks for transport=grant with isolation=sealed, and"
            " what a guest has mapped by itself cannot be taken away while it runs",
            "say isolation=region, which grants keep, or transport=physmap",
        )


def region_without_grant(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """The holder of a share group is the target of its members (security, F4)."""
    terms = definition.terms
    if terms.isolation is Isolation.REGION and terms.transport is not Transport.GRANT:
        yield refused(
            "region-without-grant",
            definition.place,
            f"region '{definition.region_id}' asks for isolation=region, which xshmd cannot keep:"
            " the members of a share group can reach all of its regions while they run",
            "say transport=grant as well; or leave it out if the members may trust each other",
        )


HOST_RULES: Final[tuple[Callable[[GuestConfig, HostInfo], Findings], ...]] = (grant_under_silo,)
"""Those of a guest and a running Xen; the configuration has entries for such regions only."""
DEFINITION_RULES: Final[tuple[Callable[[Definition, Said, Arch | None], Findings], ...]] = (
    grant_backing,
    grant_sealed,
    region_without_grant,
)
"""Those for each definition of a region."""
